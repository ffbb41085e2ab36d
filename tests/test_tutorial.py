"""The tutorial, typed word for word as a new user does: an empty folder, and only the wheel installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|diff|text)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.slow


@dataclass
class Desk:
    """An empty folder, and an environment with the wheel of medrl and nothing else of this repository."""

    folder: Path
    bin: Path

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run one line in a shell."""
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("MEDRL", "PYTHON", "PIP"))
        }
        clean |= {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "XDG_CONFIG_HOME": str(self.folder.parent / "xdg"),
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            # pip builds and installs from what is here already.
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_NO_DEPS": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=clean,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


def make_wheel(folder: Path) -> Path:
    """Build the wheel of this repository in a folder."""
    source = folder / "source"
    source.mkdir()
    for name in ("core", "cli", "plugins", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("medrl-*.whl"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Install the wheel; what it depends on is borrowed from the environment of the tests."""
    folder = tmp_path_factory.mktemp("tutorial")
    wheel = make_wheel(folder)
    env = folder / "env"
    subprocess.run(
        ["bash", str(ROOT / ".ci" / "wheel-env"), sys.executable, str(wheel), str(env)], check=True
    )
    pip = env / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {env}/bin/python "$@"\n')
    pip.chmod(0o755)
    (folder / "empty").mkdir()
    return Desk(folder / "empty", env / "bin")


def apply(diff: str, folder: Path) -> None:
    """Change a file as a reader would: what a diff shows as it was becomes what it shows as it is."""
    first, *lines = diff.splitlines()
    path = folder / first.removeprefix("--- ")
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(before) == 1, f"{path}: the lines of the tutorial are not there once"
    path.write_text(text.replace(before, after))


def test_every_command_of_the_tutorial_works_word_for_word(desk):
    shown, failed, times = "", [], []
    for kind, text in BLOCKS:
        if kind == "diff":
            apply(text, desk.folder)
        elif kind == "text":
            for line in text.splitlines():
                assert line in shown, f"the tutorial shows {line!r}, the command said:\n{shown}"
        else:
            for line in text.splitlines():
                command, _, remark = line.partition("  # exit code ")
                start = time.perf_counter()
                done = desk.type(line)
                times.append((time.perf_counter() - start, command))
                shown = done.stderr
                if done.returncode != int(remark or 0):
                    failed.append(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    for seconds, command in times:
        sys.stdout.write(f"{seconds:6.1f} s  {command}\n")
    assert failed == []
    assert len(times) >= 18
    assert (desk.folder / "runs" / "first" / "report.html").stat().st_size > 1000
    assert (desk.folder / "evaluation" / "evaluation.json").is_file()
    assert len(list((desk.folder / "predictions").glob("*.nii.gz"))) > 0
    assert "gamma: 1.5" in (desk.folder / "runs" / "focal" / "config.yaml").read_text()


def test_the_pages_that_the_tutorial_names_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
