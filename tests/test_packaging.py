"""What is shipped: packages, entry points, light imports, and rules that hold for every source file."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from medrl.core.manager import PluginManager
from medrl.core.testing import HEAVY, check_plugin

ROOT = Path(__file__).parents[1]
TOP = ("core", "cli", "plugins")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/plugin.py"))
SOURCES = sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))
LIGHT_CORE = (
    "errors",
    "types",
    "jobs",
    "hookspecs",
    "isolation",
    "registry",
    "discovery",
    "manager",
    "testing",
)

IMPORT_NAMES = {
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "simpleitk": "SimpleITK",
    "pillow": "PIL",
}
BORROWED = {"SimpleITK": "torchio", "PIL": "matplotlib"}
"""Packages that a declared dependency brings: import name to that dependency."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["medrl", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Return every imported module of a file, also those inside functions, with its line."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Return every call of a file with its dotted name, such as ``torch.load``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def heavy_modules_after(code: str) -> list[str]:
    """Run code in a fresh interpreter and return which heavy modules it imported."""
    script = f"{code}\nimport sys\nprint('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.anchor, check=False
    )
    assert done.returncode == 0, done.stderr
    marker, *found = done.stdout.strip().splitlines()[-1].split()
    assert marker == "HEAVY"
    return found


def test_pyproject_lists_every_folder_that_is_a_package():
    found = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_source_file_lies_in_a_package():
    assert [path for path in SOURCES if not (path.parent / "__init__.py").is_file()] == []


def test_every_data_file_of_a_package_is_shipped():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [
        path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix != ".py"
    ]
    files = [path for path in files if "__pycache__" not in path.parts and path.name != "README.md"]
    assert [path for path in files if not any(fnmatch.fnmatch(path.name, item) for item in patterns)] == []


def test_every_top_package_is_marked_as_typed():
    assert [top for top in TOP if not (ROOT / top / "py.typed").is_file()] == []


@pytest.mark.parametrize("top", TOP)
def test_a_top_folder_cannot_be_imported_under_its_bare_name(top):
    done = subprocess.run(
        [sys.executable, "-c", f"import {top}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import this package as 'medrl.{top}'" in done.stderr


def test_entry_points_and_policy_name_exactly_the_plugins_that_exist():
    declared = PROJECT["project"]["entry-points"]["medrl.plugins"]
    policy = tomllib.loads((ROOT / "plugins.toml").read_text())
    assert sorted(declared) == PLUGINS
    assert sorted(policy["plugins"]) == PLUGINS
    assert declared == {name: f"medrl.plugins.{name}.plugin" for name in PLUGINS}


def test_the_installed_medrl_has_the_entry_points_of_this_folder():
    installed = {
        point.name: point.value
        for point in importlib.metadata.entry_points(group="medrl.plugins")
        if point.dist is not None and point.dist.name == "medrl"
    }
    assert installed == PROJECT["project"]["entry-points"]["medrl.plugins"]


@pytest.mark.parametrize("name", PLUGINS)
def test_a_bundled_plugin_conforms(name):
    found = check_plugin(name, manager=PluginManager.create(plugins_file=ROOT / "plugins.toml"))
    assert [str(item) for item in found] == []


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "methods", "plugins list"])
def test_the_command_line_starts_without_heavy_modules(arguments):
    code = f"""
import sys
from medrl.cli.main import main
sys.argv = ["medrl", *{arguments.split()!r}]
try:
    main()
except SystemExit as end:
    if end.code:
        raise
"""
    assert heavy_modules_after(code) == []


@pytest.mark.parametrize("module", [*(f"medrl.core.{name}" for name in LIGHT_CORE), "medrl.core"])
def test_a_light_file_of_core_imports_nothing_heavy(module):
    assert heavy_modules_after(f"import {module}") == []


def test_no_file_of_the_command_line_imports_anything_heavy():
    modules = [module_of(path) for path in SOURCES if path.is_relative_to(ROOT / "cli")]
    modules.remove("medrl.cli.__main__")
    assert heavy_modules_after("\n".join(f"import {name}" for name in modules)) == []


@pytest.mark.parametrize(
    "module", [f"medrl.plugins.{name}.{file}" for name in PLUGINS for file in ("plugin", "commands")]
)
def test_the_light_files_of_a_plugin_import_nothing_heavy(module):
    assert heavy_modules_after(f"import {module}") == []


def forbidden_packages(path: Path) -> list[str]:
    """Return which packages of medrl a file must not import."""
    top, *rest = path.relative_to(ROOT).parts
    if top == "core":
        return ["medrl.cli", "medrl.plugins"]
    if top == "cli":
        return ["medrl.plugins"]
    return ["medrl.cli", *(f"medrl.plugins.{name}" for name in PLUGINS if name != rest[0])]


def test_core_imports_neither_cli_nor_plugins_and_plugins_import_neither_cli_nor_each_other():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        for module, line in imports_of(path)
        if any(within(module, package) for package in forbidden_packages(path))
    ]
    assert wrong == []


def test_medrl_is_imported_by_its_full_name_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        for module, line in imports_of(path)
        if module.partition(".")[0] in TOP
    ]
    assert wrong == []


def test_torch_load_is_called_only_by_core_checkpoint_and_with_weights_only():
    wrong = []
    for path in SOURCES:
        allowed = path.relative_to(ROOT).parts[:2] in {("core", "checkpoint"), ("core", "checkpoint.py")}
        for name, call in calls_of(path):
            if name != "torch.load":
                continue
            options = {item.arg: item.value for item in call.keywords}
            only = options.get("weights_only")
            safe = isinstance(only, ast.Constant) and only.value is True
            stubbed = "pickle_module" in options and path.stem == "foreign"
            if not allowed or not (safe or stubbed):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {module}"
            for module, line in imports_of(path)
            if module in ("torch.load", "torch.jit.load")
        ]
    assert wrong == []


@pytest.mark.parametrize(
    "name",
    ["extractall", "unpack_archive", "eval", "exec", "read_pickle", "add_safe_globals", "system", "popen"],
)
def test_no_file_unpacks_archives_or_runs_text_as_code(name):
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        for called, call in calls_of(path)
        if called == name or (called.endswith(f".{name}") and called not in ("model.eval", "self.eval"))
        if not (
            name == "eval" and isinstance(call.func, ast.Attribute)
        )  # torch's module.eval() is another thing
    ]
    assert wrong == []


def test_nothing_is_unpickled_outside_the_reader_of_foreign_checkpoints():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        for module, line in imports_of(path)
        if module.partition(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
        and path.relative_to(ROOT).parts[:2] not in {("core", "checkpoint"), ("core", "checkpoint.py")}
    ]
    assert wrong == []


def test_numpy_never_loads_pickles():
    wrong = []
    for path in SOURCES:
        for name, call in calls_of(path):
            options = {item.arg: item.value for item in call.keywords}
            allow = options.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert wrong == []


def test_shipped_code_has_no_assert_and_no_stub():
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            raised = ast.unparse(node.exc) if isinstance(node, ast.Raise) and node.exc else ""
            if isinstance(node, ast.Assert) or raised.startswith("NotImplementedError"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def declared_dependencies() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [line for name in ("io", "log", "export", "slurm", "video") for line in extras[name]]
    lines = [*PROJECT["project"]["dependencies"], *optional]
    return {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in lines}


def test_every_imported_package_is_a_declared_dependency():
    declared = declared_dependencies()
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    known |= {name for name, bringer in BORROWED.items() if bringer in declared}
    wrong = sorted(
        {
            f"{path.relative_to(ROOT)}:{line} imports {module}"
            for path in SOURCES
            for module, line in imports_of(path)
            if module.partition(".")[0] not in {*sys.stdlib_module_names, *known, "medrl"}
            and not (path.stem == "pytest_plugin" and within(module, "pytest"))  # pytest imports it
        }
    )
    assert wrong == []


def pins() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_constraints_pin_torch_and_every_declared_dependency_once():
    assert pins()["torch"] == "2.13.0"
    assert "medrl" not in pins()
    extras = PROJECT["project"]["optional-dependencies"]["dev"]
    development = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in extras}
    assert {
        name for name in declared_dependencies() | development if name.replace("_", "-") not in pins()
    } == set()


def test_the_top_level_holds_what_the_architecture_names():
    allowed = {
        *TOP,
        "tests",
        "docs",
        "benchmarks",
        "examples",
        "pyproject.toml",
        "plugins.toml",
        "README.md",
        "Makefile",
        "constraints.txt",
        ".ci",
        ".gitignore",
        "LICENSE",
    }
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no git checkout")
    assert {line.partition("/")[0] for line in done.stdout.splitlines()} <= allowed


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_creates_the_environment_from_the_constraints_with_torch_first(tmp_path, target):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
    commands = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert "-m venv .venv" in done.stdout
    assert len(commands) == 2
    assert all("-c constraints.txt" in line for line in commands)
    assert commands[0].endswith(" torch")
    assert commands[1].endswith("-e '.[all,dev]'")


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (*TOP, "pyproject.toml", "README.md", "LICENSE"):
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
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("medrl-*.whl"))) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = wheel.read(
            next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        )
    expected = {
        f"medrl/{path.relative_to(ROOT)}"
        for top in TOP
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml", ".tmpl") or path.name == "py.typed"
    }
    assert shipped == expected
    assert "graft = medrl.plugins.graft.plugin" in entry_points.decode()
