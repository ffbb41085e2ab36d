"""The commands of the README work as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Words of each `medrl` command."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("medrl ")]


def medrl(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDRL")}
    return subprocess.run(
        [sys.executable, "-m", "medrl.cli", *words[1:]],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_five_minutes_work_word_for_word(tmp_path):
    (session,) = blocks("bash")
    listed = commands(session)
    assert len(listed) >= 6
    for words in listed:
        done = medrl(words, tmp_path)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 1000
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) > 0


def test_every_other_command_of_the_readme_parses(tmp_path):
    from medrl.core.manager import PluginManager

    known = {
        option
        for command in (
            "train graft",
            "predict graft",
            "evaluate",
            "data convert",
            "data split",
            "data check",
            "init",
        )
        for option in re.findall(r"--[a-z-]+", medrl(["medrl", *command.split(), "--help"], tmp_path).stdout)
    }
    tools = PluginManager.create().commands("graft").tools
    known |= {name for tool in tools.values() for option in tool.params for name in option.opts}
    plain = "\n".join(blocks(""))
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", plain)) - {"--nproc-per-node"}
    assert used <= known
    for name in re.findall(r"medrl graft ([a-z-]+)", plain):
        assert name in tools


def test_the_two_commands_exist_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_files_and_methods_that_the_readme_names_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["medrl.plugins"]
    rows = re.findall(r"^\| \**(\w+)\** \| [^|]+ \| ([^|]+) \|$", README, flags=re.MULTILINE)
    here = {name for name, status in rows if "not yet here" not in status and name != "method"}
    assert here == set(plugins)
