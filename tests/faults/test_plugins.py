"""Faults of plugins: isolated, visible with their reason, and policy keeps code from running.

The plugins are distributions that pip installed into an environment of their own.
"""

from __future__ import annotations

import json
import logging
import signal

import pytest

from medrl.core.manager import PluginManager

pytestmark = pytest.mark.slow

BROKEN = {
    "absent": "importing medrl_absent.plugin failed: ModuleNotFoundError: No module named",
    "exiting": "importing medrl_exiting.plugin failed: it ended the program (SystemExit)",
    "keyboard": "importing medrl_keyboard.plugin failed: KeyboardInterrupt",
    "nowhere": "importing medrl_nowhere.plugin failed: ModuleNotFoundError: No module named "
    "'medrl_nowhere.plugin'",
    "misspelt": "there is no hook 'medrl_register_modles', did you mean 'medrl_register_models'",
    "signature": "a hook has a wrong signature: hookimpl definition: medrl_register_models(regis",
    "future": "written for plugin API 99, this medrl has 1",
}

STATE = """
import json
from medrl.core.manager import PluginManager
manager = PluginManager.create({options})
manager.load_all()
print(json.dumps([[e.name, e.distribution, e.status, e.reason, e.file] for e in manager.entries()]))
"""

LOAD = """
import sys
from medrl.core.errors import MedrlError
from medrl.core.manager import PluginManager
try:
    PluginManager.create().load(sys.argv[1])
except MedrlError as error:
    print(error, error.do, sep="|")
    sys.exit(error.exit_code)
"""


def state(environment, options="", **kwargs):
    """Load everything in the environment and return {(name, distribution): (status, reason, file)}."""
    done = environment.run("-c", STATE.format(options=options), **kwargs)
    assert done.returncode == 0, done.stderr
    return {(row[0], row[1]): tuple(row[2:]) for row in json.loads(done.stdout)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_shown_with_its_reason_and_its_file(plugin_environment, name):
    status, reason, file = state(plugin_environment)[name, f"medrl-{name}"]
    assert status == "broken"
    assert reason.startswith(BROKEN[name])
    if name == "nowhere":
        assert file == ""
        return
    assert file.endswith("plugin.py")
    assert str(plugin_environment.python.parents[1]) in file


@pytest.mark.parametrize("name", BROKEN)
def test_naming_a_broken_plugin_fails_with_exit_code_5_and_an_advice(plugin_environment, name):
    done = plugin_environment.run("-c", LOAD, name)
    assert done.returncode == 5
    assert done.stdout.startswith(f"plugin '{name}' of medrl-{name} 1.0: {BROKEN[name]}")
    assert done.stdout.strip().rpartition("|")[2]
    assert done.stderr == ""


def test_the_healthy_plugins_work_beside_the_broken_ones(plugin_environment):
    found = state(plugin_environment)
    assert found["cine", "medrl-cine"][:2] == ("loaded", "")
    assert found["graft", "medrl"][:2] == ("loaded", "")


def test_a_duplicate_name_names_both_owners_and_is_not_imported(plugin_environment, tmp_path):
    trace = tmp_path / "trace"
    found = state(plugin_environment, env={"MEDRL_TEST_TRACE": str(trace), "MEDRL_PLUGINS": ""})
    reason = "brought by 'medrl-duplicate 2.0' and 'medrl-twin 1.0'; uninstall one of them"
    assert found["twin", "medrl-twin"][:2] == ("duplicate", reason)
    assert found["twin", "medrl-duplicate"][:2] == ("duplicate", reason)
    done = plugin_environment.run("-c", LOAD, "twin")
    assert (done.returncode, reason in done.stdout) == (5, True)
    assert (
        trace.read_text() == "the hostile plugin was imported"
    )  # nothing forbids it here; the duplicate was not


def test_a_third_party_plugin_cannot_replace_a_bundled_one(plugin_environment):
    found = state(plugin_environment)
    assert found["graft", "medrl"][0] == "loaded"
    assert found["graft", "medrl-duplicate"][0] == "duplicate"
    assert "the one of medrl is used" in found["graft", "medrl-duplicate"][1]


def test_an_unlisted_plugin_is_never_imported(plugin_environment, tmp_path):
    trace = tmp_path / "trace"
    policy = tmp_path / "plugins.toml"
    policy.write_text("[settings]\nthird_party = 'listed'\n\n[plugins.cine]\n")
    env = {"MEDRL_TEST_TRACE": str(trace), "MEDRL_PLUGINS": str(policy)}
    found = state(plugin_environment, env=env)
    assert found["hostile", "medrl-hostile"][0] == "disabled"
    assert "not listed in" in found["hostile", "medrl-hostile"][1]
    assert found["cine", "medrl-cine"][0] == "loaded"
    done = plugin_environment.run("-c", LOAD, "hostile", env=env)
    assert done.returncode == 5
    assert not trace.exists()


def test_no_third_party_imports_none_of_them(plugin_environment, tmp_path):
    trace = tmp_path / "trace"
    found = state(plugin_environment, "third_party=False", env={"MEDRL_TEST_TRACE": str(trace)})
    loaded = {key for key, value in found.items() if value[0] == "loaded"}
    assert ("graft", "medrl") in loaded
    assert {distribution for _, distribution in loaded} == {"medrl"}
    assert found["hostile", "medrl-hostile"][1] == "third-party plugins are switched off by --no-third-party"
    assert not trace.exists()


def test_strict_mode_raises_the_first_defect(plugin_environment):
    done = plugin_environment.run("-c", STATE.format(options="strict=True"))
    assert done.returncode == 1
    assert "PluginError" in done.stderr.splitlines()[-1]


def test_the_command_line_lists_all_plugins_and_fails_only_for_the_named_one(plugin_environment):
    listed = plugin_environment.medrl("plugins", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    for name in (*BROKEN, "cine", "graft", "hostile", "twin"):
        assert name in listed.stdout
    named = plugin_environment.medrl("plugins", "info", "exiting")
    assert named.returncode == 5
    assert "it ended the program (SystemExit)" in named.stderr
    assert "Traceback" not in named.stderr


def test_the_help_of_the_command_line_survives_every_broken_plugin(plugin_environment):
    done = plugin_environment.medrl("--help")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "train" in done.stdout + done.stderr


PART = """
import sys
from medrl.core.errors import MedrlError
from medrl.core.manager import PluginManager
manager = PluginManager.create()
print(manager.registry("losses").get("extras.plain").__name__)
try:
    manager.registry("losses").get("extras.fancy")
except MedrlError as error:
    print(error, error.do, sep="|")
    sys.exit(error.exit_code)
"""


def test_a_missing_extra_is_named_with_its_installation_and_the_other_parts_work(plugin_environment):
    assert state(plugin_environment)["extras", "medrl-extras"][:2] == ("loaded", "")
    done = plugin_environment.run("-c", PART)
    assert done.returncode == 5
    assert done.stdout.splitlines() == [
        "plain",
        "loss 'extras.fancy': importing 'medrl_extras.fancy' failed: ModuleNotFoundError: No module named "
        "'medrl_package_that_is_not_there'|pip install 'medrl-extras[fancy]'",
    ]


def test_a_policy_that_requires_a_package_says_how_to_install_it(plugin_environment, tmp_path):
    policy = tmp_path / "plugins.toml"
    policy.write_text("[settings]\nthird_party = 'all'\n\n[plugins.cine]\nrequires = ['not-there-9']\n")
    found = state(plugin_environment, env={"MEDRL_PLUGINS": str(policy)})
    assert found["cine", "medrl-cine"][0] == "disabled"
    assert found["cine", "medrl-cine"][1].endswith("run: pip install not-there-9")
    assert found["graft", "medrl"][0] == "loaded"


def test_a_command_that_raises_ends_with_one_line_that_says_where(plugin_environment):
    done = plugin_environment.medrl("raising", "explode")
    assert done.returncode == 1
    first, *_ = done.stderr.splitlines()
    assert first.startswith("error: unexpected ValueError: the tool is broken (in ")
    assert first.endswith("commands.py, line 11)")
    assert "Traceback" not in done.stderr


def test_a_command_that_ends_the_program_ends_with_its_own_exit_code(plugin_environment):
    assert plugin_environment.medrl("raising", "leave").returncode == 7


def test_a_run_is_finished_beside_an_observer_that_raises(plugin_environment, tmp_path):
    run = tmp_path / "run"
    done = plugin_environment.medrl(
        "train", "cine", "-o", str(run), "--preset", "smoke", "--device", "cpu", "--max-steps", "1"
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "its observers are off" in line]
    assert warnings == [
        "warning: plugin 'raising': its observers are off, because medrl_run_started failed: OSError: the "
        "disk of the observer is full"
    ]
    assert (run / "cine_outcome.txt").read_text() == "finished"


def test_a_slow_plugin_is_called_slow_with_its_seconds(plugin_environment):
    found = state(plugin_environment, env={"MEDRL_TEST_SLOW_S": "2.2"})
    status, reason, _ = found["slow", "medrl-slow"]
    assert status == "loaded"
    assert reason == f"slow: importing it took {float(reason.split()[4]):.1f} s of every command"
    assert 2.2 <= float(reason.split()[4]) < 30
    assert found["cine", "medrl-cine"][:2] == ("loaded", "")


def test_a_slow_plugin_delays_no_command_that_does_not_need_it(plugin_environment):
    done = plugin_environment.medrl("cine", "show-profile", env={"MEDRL_TEST_SLOW_S": "100"})
    assert done.returncode == 0, done.stderr


def test_ctrl_c_of_the_user_still_stops_an_import(write_plugin, no_policy):
    write_plugin("waiting", "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)")
    manager = PluginManager.create()
    # A test run in the background may have been started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            manager.load("waiting")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_observer_that_fails_does_not_stop_a_run(write_plugin, no_policy, caplog):
    write_plugin(
        "watcher",
        """
        @hookimpl
        def medrl_run_started(run):
            raise OSError("the disk of the observer is full")

        @hookimpl
        def medrl_run_finished(run, outcome):
            (run / "finished").touch()
        """,
    )
    manager = PluginManager.create()
    manager.load("watcher")
    with caplog.at_level(logging.WARNING, logger="medrl.plugins"):
        manager.notify("medrl_run_started", run=no_policy)
        manager.notify("medrl_run_finished", run=no_policy, outcome="finished")
    assert not (no_policy / "finished").exists()
    assert [record.getMessage() for record in caplog.records] == [
        "plugin 'watcher': its observers are off, because medrl_run_started failed: "
        "OSError: the disk of the observer is full"
    ]
