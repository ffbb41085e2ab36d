"""Fixtures for all tests: plugins written on the fly, and an environment with installed fixture plugins."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parent / "plugin_host" / "fixtures"
_numbers = itertools.count()


@pytest.fixture
def no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder where no plugins.toml applies."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MEDRL_PLUGINS", raising=False)
    monkeypatch.delenv("MEDRL_PLUGINS_STRICT", raising=False)
    return folder


@pytest.fixture
def write_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_policy: Path
) -> Iterator[Callable[..., str]]:
    """Return a function that makes a plugin from source code: a module and the metadata of a distribution."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    modules: list[str] = []

    def write(name: str, code: str | None = None, *, distribution: str = "", version: str = "1.0") -> str:
        module = f"medrl_written_{next(_numbers)}"
        modules.append(module)
        distribution = distribution or f"medrl-{name}"
        head = "from medrl.core import PluginInfo, hookimpl\n"
        if code is None or "medrl_plugin_info" not in code:
            head += f"""
@hookimpl
def medrl_plugin_info():
    return PluginInfo(name={name!r}, api=1, summary="a plugin for a test")

"""
        (root / f"{module}.py").write_text(head + textwrap.dedent(code or ""))
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[medrl.plugins]\n{name} = {module}\n")
        return module

    yield write
    for module in modules:
        sys.modules.pop(module, None)


@dataclass(frozen=True)
class PluginEnvironment:
    """A virtual environment in which the fixture plugins are installed."""

    python: Path
    folder: Path

    def run(
        self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python outside the repository and its plugins.toml."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEDRL_", "PYTHON"))}
        clean |= {"OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(self.folder / "xdg"), "NO_COLOR": "1"}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.folder,
            env=clean | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def medrl(
        self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line of medrl in this environment."""
        return self.run("-m", "medrl.cli", *arguments, cwd=cwd, env=env)


@pytest.fixture(scope="session")
def plugin_environment(tmp_path_factory: pytest.TempPathFactory) -> PluginEnvironment:
    """Install all fixture distributions with pip into an environment of their own, offline.

    What they depend on is borrowed from the environment of the tests through a path file.
    """
    folder = tmp_path_factory.mktemp("plugin_environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env").glob("lib/python*/site-packages"))
    borrowed = sysconfig.get_path("purelib")
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")
    sources = []
    for project in sorted(FIXTURES.glob("*/pyproject.toml")):
        copy = folder / "sources" / project.parent.name
        shutil.copytree(project.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        sources.append(str(copy))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *sources], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the fixture plugins could not be installed:\n{done.stderr}")
    work = folder / "work"
    work.mkdir()
    return PluginEnvironment(python=python, folder=work)


@pytest.fixture(autouse=True)
def _same_draws():
    """Begin every test with the same global random state, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_as_it_was():
    """Undo what the command line, called in this process, changes on medrl's logger."""
    logger = logging.getLogger("medrl")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers[:] = before[0], before[1], before[2]


@pytest.fixture
def in_this_process():
    """An executor that does the tasks one after the other in this process, as their words say."""
    from medrl.cli.main import run
    from medrl.core.executors import Executor, TaskEnd

    class InThisProcess(Executor):
        def __init__(self):
            self.asked = []

        def run(self, tasks, *, folder, tell=None):
            ends = {}
            for task in tasks:
                blocked = [name for name in task.after if not ends[name].ok]
                self.asked += [] if blocked else [task.name]
                code = -1 if blocked else run(list(task.arguments))
                ends[task.name] = TaskEnd(name=task.name, code=code, log=folder / f"{task.name}.log")
            return ends

    return InThisProcess()


# -- executors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slurm_node():
    """A real Slurm of one node; skips, with the reason, where there can be none."""
    pytest.importorskip("submitit")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "core" / "ranks"))
        import slurm_here
    reason = slurm_here.why_not()
    if reason:
        pytest.skip(reason)
    with slurm_here.started() as here:
        yield here


@pytest.fixture
def slurm(slurm_node, monkeypatch):
    """The same, found by the commands of Slurm as long as a test lasts."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {**slurm_node.environment, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    return slurm_node


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slow)])
def elsewhere(request):
    """An executor that does tasks in other processes: of this machine, or jobs of Slurm."""
    from medrl.core.executors import LocalExecutor, Resources, SubmititExecutor

    if request.param == "local":
        return LocalExecutor()
    request.getfixturevalue("slurm")
    return SubmititExecutor(Resources(minutes=10, cpus=1, memory_gb=0.5), poll_s=0.5)
