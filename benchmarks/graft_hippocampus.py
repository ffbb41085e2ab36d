"""Five teachers on folds of the hippocampus set, one student from five labels, cases that no stage has seen.

Runs the medrl commands one after the other and writes the results page::

    python benchmarks/graft_hippocampus.py --data ../shared/data/hippocampus --work /tmp/hippocampus \
        --page docs/results/graft-hippocampus.md

150 cases are shuffled once (seed 0): 60 train the teachers (five folds, each teacher leaves one out), 50 are
the student's (5 labelled, the rest unlabelled), 40 are the test. Finished stages are kept, so that the script
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

TEACHERS = 5
LABELLED = 5


def medrl(log: list[str], *words: str | Path) -> None:
    """Run one medrl command on one thread, and remember it for the results page."""
    command = ["medrl", *map(str, words)]
    log.append(shlex.join(command))
    print("$", log[-1], flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "medrl.cli", *command[1:]], check=True, env=environment)


def divide(source: Path, work: Path, log: list[str]) -> None:
    """Convert to nnU-Net raw and put the cases into `teachers/` and `student/` (with its test part)."""
    raw = work / "raw"
    if not raw.exists():
        medrl(log, "data", "convert", source, raw, "--from", "folder", "--label", "anterior=1", "--label", "posterior=2")
    names = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
    random.Random(0).shuffle(names)
    groups = {
        ("teachers", "Tr"): names[:60],
        ("student", "Tr"): names[60:110],
        ("student", "Ts"): names[110:],
    }
    for (folder, part), cases in groups.items():
        images, labels = work / folder / f"images{part}", work / folder / f"labels{part}"
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for name in cases:
            shutil.copyfile(raw / "imagesTr" / f"{name}_0000.nii.gz", images / f"{name}_0000.nii.gz")
            shutil.copyfile(raw / "labelsTr" / f"{name}.nii.gz", labels / f"{name}.nii.gz")
    for folder in ("teachers", "student"):
        description = json.loads((raw / "dataset.json").read_text())
        description["numTraining"] = len(groups[folder, "Tr"])
        (work / folder / "dataset.json").write_text(json.dumps(description, indent=2))


def train(work: Path, steps: int, log: list[str]) -> None:
    """Train the teachers, write their features, train the student and its control without teachers."""
    teachers, student = work / "teachers", work / "student"
    shared = ["--set", "train.precision=bf16", "--threads", "1"]
    medrl(log, "graft", "train-teachers", "--data", teachers, "-o", work / "runs", "--max-steps", str(steps), *shared)
    medrl(log, "graft", "extract-features", "--data", student, "--teachers", work / "runs", "-o", work / "features", *shared)
    common = ["--data", student, "--labelled", str(LABELLED), "--max-steps", str(steps), *shared]
    medrl(log, "train", "graft", *common, "-o", work / "supervised")
    for weighting in ("uniform", "quality", "reinforce"):
        medrl(
            log, "train", "graft", *common, "--teachers", work / "features",
            "--weighting", weighting, "-o", work / weighting,
        )  # fmt: skip


def models(work: Path) -> dict[str, list[Path]]:
    """Return the models that are compared: name on the page to run folders."""
    runs = [work / "runs" / f"teacher_{number}" for number in range(TEACHERS)]
    return {
        **{f"teacher {number}": [run] for number, run in enumerate(runs)},
        "ensemble of the teachers": runs,
        "student, 5 labels, no teachers": [work / "supervised"],
        "student, weighting uniform": [work / "uniform"],
        "student, weighting quality": [work / "quality"],
        "student, weighting reinforce": [work / "reinforce"],
    }


def measure(work: Path, log: list[str]) -> dict[str, dict[str, float]]:
    """Predict and evaluate the 40 test cases with every model."""
    rows = {}
    for name, runs in models(work).items():
        key = name.replace(" ", "_").replace(",", "")
        prediction, result = work / "predictions" / key, work / "evaluation" / key
        started = time.process_time(), os.times().children_user
        chosen = [word for run in runs for word in ("--model", run)]
        medrl(
            log, "predict", "graft", "-i", work / "student" / "imagesTs", "-o", prediction, *chosen,
            "--threads", "1", "--continue",
        )  # fmt: skip
        seconds = os.times().children_user - started[1]
        medrl(
            log, "evaluate", "-p", prediction, "-r", work / "student" / "labelsTs",
            "--metrics", "dice,hd95,nsd", "--ci", "-o", result,
        )  # fmt: skip
        rows[name] = {**summary(result), "seconds": seconds}
    return rows


def summary(folder: Path) -> dict[str, float]:
    """Read the mean of each metric over cases and labels, with the interval of Dice."""
    table = json.loads((folder / "summary.json").read_text())
    return table


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    log: list[str] = []
    divide(options.data.resolve(), options.work, log)
    train(options.work, options.steps, log)
    rows = measure(options.work, log)
    (options.work / "rows.json").write_text(json.dumps(rows, indent=2))
    (options.work / "commands.txt").write_text("\n".join(log))


if __name__ == "__main__":
    main()
