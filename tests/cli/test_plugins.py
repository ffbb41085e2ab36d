"""``medrl plugins new`` and ``medrl plugins check``: what they write, refuse and say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from medrl.cli.main import run
from medrl.cli.templates import FILES, distribution_of, write_project
from medrl.core.errors import ConfigError


def test_a_new_project_holds_every_file_and_no_placeholder(tmp_path):
    files = write_project("my_method", tmp_path / "project")
    names = sorted(path.relative_to(tmp_path / "project").as_posix() for path in files)
    assert len(names) == len(FILES)
    assert "medrl_my_method/plugin.py" in names
    assert "tests/test_my_method.py" in names
    for path in files:
        assert not re.search(r"\$\{?[a-zA-Z]", re.sub(r"\$\$?[^$]+\$\$?", "", path.read_text())), path
    text = (tmp_path / "project" / "pyproject.toml").read_text()
    assert 'name = "medrl-my-method"' in text
    assert 'my_method = "medrl_my_method.plugin"' in text


def test_a_new_project_passes_the_linter_of_medrl(tmp_path):
    write_project("shift", tmp_path / "project")
    rules = "E,F,W,UP,B,PTH,RUF,SIM,C4,PIE,RET,BLE,PT"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "110"]
    done = subprocess.run(
        [*command, "--select", rules, "--ignore", "RUF001,RUF002,RUF003", str(tmp_path / "project")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Upper", "1st", "with-dash", "with space", "../up", "ends_", "x" * 41])
def test_a_name_that_is_no_name_of_a_plugin_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="lower-case letters, digits and underscores"):
        write_project(name, tmp_path / "project")
    assert list(tmp_path.iterdir()) == []


def test_the_distribution_has_dashes_as_package_indexes_do():
    assert distribution_of("my_method") == "medrl-my-method"


def test_the_command_writes_a_folder_and_says_what_comes_next(no_policy, capsys):
    assert run(["plugins", "new", "cine"]) == 0
    assert (no_policy / "medrl-cine" / "medrl_cine" / "plugin.py").is_file()
    said = capsys.readouterr().err
    assert "next: pip install -e medrl-cine" in said
    assert "medrl plugins check cine" in said
    assert "medrl train cine --fast-dev-run" in said


def test_a_folder_that_is_not_empty_is_left_alone(no_policy, capsys):
    (no_policy / "mine").mkdir()
    (no_policy / "mine" / "work.txt").write_text("kept")
    assert run(["plugins", "new", "cine", "-o", "mine"]) == 2
    assert "it is not empty" in capsys.readouterr().err
    assert [path.name for path in (no_policy / "mine").iterdir()] == ["work.txt"]


@pytest.mark.parametrize(("name", "why"), [("graft", "installed already"), ("train", "a command of medrl")])
def test_a_name_that_is_taken_is_refused(no_policy, capsys, name, why):
    assert run(["plugins", "new", name]) == 2
    assert why in capsys.readouterr().err
    assert list(no_policy.iterdir()) == []


def test_a_policy_that_forbids_the_new_plugin_is_named(no_policy, capsys):
    (no_policy / "plugins.toml").write_text("[settings]\nthird_party = 'listed'\n")
    assert run(["plugins", "new", "cine"]) == 0
    assert "plugins.toml does not allow it; add a line '[plugins.cine]' there" in capsys.readouterr().err


def test_a_healthy_plugin_passes_the_quick_check(write_plugin, capsys):
    write_plugin("healthy")
    assert run(["plugins", "check", "healthy", "--quick"]) == 0
    said = capsys.readouterr().err
    assert "no rule is broken" in said
    assert said.count("ok ") == 2
    for rule in ("parts: not checked, it registers no parts", "config: not checked, it has no config model"):
        assert f"-       {rule}" in said


def test_a_broken_rule_says_what_to_do_and_the_exit_code_is_5(write_plugin, capsys):
    write_plugin("heavy", "import numpy")
    assert run(["plugins", "check", "heavy", "--quick"]) == 5
    said = capsys.readouterr().err
    assert "broken  import weight" in said
    assert "do: import them inside the functions that use them" in said
    assert "1 broken rule" in said


def test_a_plugin_that_does_not_load_is_a_broken_rule(write_plugin, capsys):
    write_plugin("bad", "raise ValueError('no')")
    assert run(["plugins", "check", "bad", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [rule["rule"] for rule in found["rules"]] == ["loads"]
    assert "ValueError: no" in found["rules"][0]["findings"][0]["what"]


def test_without_a_name_all_plugins_are_checked_quickly(write_plugin, capsys):
    write_plugin("healthy")
    write_plugin("bad", "raise ValueError('no')")
    assert run(["plugins", "check", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)["rules"]
    assert {"graft", "kspace", "rl4seg", "healthy", "bad"} <= {rule["plugin"] for rule in found}
    assert {rule["plugin"] for rule in found if rule["findings"]} == {"bad"}


def test_values_for_all_plugins_are_refused(no_policy, capsys):
    assert run(["plugins", "check", "--set", "train.lr=1"]) == 2
    assert "NAME is missing" in capsys.readouterr().err


def test_a_name_that_does_not_exist_gets_near_matches(no_policy, capsys):
    assert run(["plugins", "check", "grfat", "--quick"]) == 5
    assert "did you mean 'graft'" in capsys.readouterr().err


def test_the_help_with_twenty_plugins_imports_nothing_heavy_and_lists_all(tmp_path):
    names = [f"method{number}" for number in range(20)]
    for name in names:
        write_project(name, tmp_path / name)
        info = tmp_path / "site" / f"medrl_{name}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: medrl-{name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[medrl.plugins]\n{name} = medrl_{name}.plugin\n")
    code = (
        "import sys; from medrl.cli.main import run; code = run(['--help']);"
        "heavy = ('torch', 'numpy', 'monai', 'pydantic', 'gymnasium');"
        "print([name for name in heavy if name in sys.modules]); sys.exit(code)"
    )
    folders = [tmp_path / "site", *(tmp_path / name for name in names)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDRL")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(re.search(rf"^  {name} ", done.stdout, flags=re.MULTILINE) for name in names)
