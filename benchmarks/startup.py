"""Wall time of ``medrl --help`` beside ``python -c pass``, best of several runs.

    python benchmarks/startup.py [--runs 20] [--json]

Both start a fresh interpreter. The goal is under 200 ms; nothing is asserted, because a busy machine is no
defect.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

GOAL_MS = 200.0
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "medrl --version": ["-m", "medrl.cli", "--version"],
    "medrl --help": ["-m", "medrl.cli", "--help"],
    "medrl methods": ["-m", "medrl.cli", "methods"],
    "medrl train graft --help": ["-m", "medrl.cli", "train", "graft", "--help"],
    "medrl train graft --print-config": ["-m", "medrl.cli", "train", "graft", "--print-config"],
}


def best_ms(arguments: list[str], runs: int) -> float:
    """Return the shortest of `runs` wall times in milliseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append((time.perf_counter() - start) * 1000)
    return min(times)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {name: round(best_ms(arguments, options.runs), 1) for name, arguments in COMMANDS.items()}
    if options.json:
        print(json.dumps({"runs": options.runs, "goal_ms": GOAL_MS, "best_ms": found}))
        return
    print(f"best of {options.runs} runs; the goal of medrl --help is {GOAL_MS:.0f} ms")
    for name, value in found.items():
        print(f"{name.ljust(34)} {value:8.1f} ms")


if __name__ == "__main__":
    main()
