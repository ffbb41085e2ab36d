"""Time of ``medrl --help`` with 5 and with 20 plugins of others installed, and what it imports.

    python benchmarks/help_time.py [--runs 15] [--plugins 0 5 20] [--json]

The plugins are projects as ``medrl plugins new`` writes them, beside those that medrl ships. The arms take
turns, each run in a fresh interpreter; shown are medians. CPU seconds of the whole process come first: a busy
machine lengthens wall time alone. The modules that are imported are counted in one further run of each arm.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from medrl.cli.templates import write_project
from medrl.core.testing import HEAVY

HELP = ["-m", "medrl.cli", "--help"]


def install(folder: Path, count: int) -> dict[str, str]:
    """Install so many plugins into a folder; return the environment in which Python finds them."""
    site = folder / f"site{count}"
    site.mkdir()
    for number in range(count):
        name = f"method{number:02d}"
        project = folder / f"project{count}_{number}"
        write_project(name, project)
        (project / f"medrl_{name}").rename(site / f"medrl_{name}")
        info = site / f"medrl_{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: medrl-{name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[medrl.plugins]\n{name} = medrl_{name}.plugin\n")
    policy = folder / "plugins.toml"
    policy.write_text('[settings]\nthird_party = "all"\n')
    return os.environ | {"PYTHONPATH": str(site), "MEDRL_PLUGINS": str(policy)}


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return CPU and wall seconds of one run."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def imported(environment: dict[str, str]) -> list[str]:
    """Return the names of all modules that one run imports."""
    code = (
        "import json, sys; from medrl.cli.main import run; code = run(['--help']);"
        "sys.stderr.write(json.dumps(sorted(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return list(json.loads(done.stderr.splitlines()[-1]))


def measure(counts: list[int], runs: int) -> dict[str, Any]:
    """Measure every number of plugins, in turn."""
    with tempfile.TemporaryDirectory(prefix="medrl-help-") as name:
        arms = {count: install(Path(name), count) for count in counts}
        found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
        for turn in range(runs + 1):
            for count, environment in arms.items():
                once = timed(HELP, environment)
                if turn:  # the first turn writes the compiled files
                    found[count].append(once)
        modules = {count: imported(environment) for count, environment in arms.items()}
    return {
        str(count): {
            "cpu_s": round(median(cpu for cpu, _ in found[count]), 3),
            "wall_s": round(median(wall for _, wall in found[count]), 3),
            "modules": len(modules[count]),
            "plugins_imported": sum(module.endswith(".plugin") for module in modules[count]),
            "heavy": sorted({module for module in modules[count] if module.partition(".")[0] in HEAVY}),
        }
        for count in counts
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--plugins", type=int, nargs="+", default=[0, 5, 20])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.plugins, options.runs)
    if options.json:
        print(json.dumps({"runs": options.runs, "plugins": found}))
        return
    print(f"medrl --help, medians of {options.runs} runs in turn")
    print("| plugins of others | CPU s | wall s | modules | plugins imported | torch and other heavy ones |")
    print("|---|---|---|---|---|---|")
    for count, row in found.items():
        heavy = ", ".join(row["heavy"]) or "0"
        numbers = f"{row['cpu_s']:.3f} | {row['wall_s']:.3f} | {row['modules']} | {row['plugins_imported']}"
        print(f"| {count} | {numbers} | {heavy} |")


if __name__ == "__main__":
    main()
