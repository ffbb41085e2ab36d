"""A toy method on the path, and a way to run one command line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from medrl.cli.main import run as run_command_line

TOY = Path(__file__).parent / "toy"


@dataclass
class Answer:
    """What one command line gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """An empty working folder in which the method 'toy' and the broken plugin 'wreck' are installed."""
    monkeypatch.syspath_prepend(str(TOY))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (
        "MEDRL_PLUGINS",
        "MEDRL_PLUGINS_STRICT",
        "MEDRL_TOY_FAIL",
        "RANK",
        "WORLD_SIZE",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def medrl(toy, capsys):
    """Run one command line in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = run_command_line([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def medrl_process(toy):
    """Run one command line in a process of its own."""

    def call(*arguments: object, **environment: str) -> Answer:
        settings = {**os.environ, "PYTHONPATH": str(TOY), "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [sys.executable, "-m", "medrl.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=settings,
            cwd=toy,
            timeout=300,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return call
