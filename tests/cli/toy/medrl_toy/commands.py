"""Commands of the toy method: they count steps and write what a run writes, without torch.

The class of an error that `MEDRL_TOY_FAIL` names is raised instead of the last step.
"""

import json
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import click

from medrl.core import errors
from medrl.core.jobs import DemoResult, config_option


@dataclass
class Outcome:
    done: list
    failed: dict = field(default_factory=dict)
    report: Path | None = None


def _fail():
    name = os.environ.get("MEDRL_TOY_FAIL", "")
    if name == "signal":
        raise errors.Interrupted(15, checkpoint="last.pt")
    if name == "wait":
        _wait()
    if name == "linger":
        _linger()
        return
    if name == "bug":
        raise ZeroDivisionError("division by zero")
    if name:
        raise getattr(errors, name)("case toy_001", why="it is broken", do="mend it")


def _wait():
    """Wait for SIGTERM and end as the runtime does."""
    arrived = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    Path(f"waiting_{os.environ.get('RANK', '0')}").touch()
    while not arrived.wait(0.05):
        pass
    raise errors.Interrupted(signal.SIGTERM, checkpoint="last.pt")


def _linger():
    """Wait for a file that says go."""
    Path("lingering").touch()
    while not Path("go").exists():
        threading.Event().wait(0.05)


@click.command("train")
@config_option("--mode", key="policy.mode", type=click.Choice(["fair", "greedy"]), help="What it prefers.")
@click.option("--shout/--no-shout", default=False, help="Say it loudly.")
def train(job, shout):
    from medrl.core.runlog import RunFolder

    if os.environ.get("RANK", "0") != "0":
        Path(f"rank_{os.environ['RANK']}_of_{os.environ['WORLD_SIZE']}").touch()
        _fail()
        return
    if (job.run_dir / "manifest.json").exists():
        run = RunFolder.open(job.run_dir)
        run.note(resumed=True)
    else:
        run = RunFolder.create(
            job.run_dir,
            config_yaml=job.resolved.to_yaml(),
            command=job.command,
            manifest={"method": job.method, "world_size": 1},
        )
    total = job.config.train.max_steps
    outcome = "failed"
    try:
        for step in range(1, total + 1):
            if step == total:
                _fail()
            metrics = {"loss": 1.0 / step, "val_dice": step / total * (1 - job.config.data.fold / 10)}
            run.metrics(step, **metrics)
            job.extra["progress"](step, total, metrics)
            (run.checkpoints_dir / "last.pt").write_text(str(step))
        (run.dir / "seen.json").write_text(
            json.dumps(
                {
                    "shout": shout,
                    "resume": job.resume,
                    "mode": job.config.policy.mode,
                    "command": list(job.command),
                }
            )
        )
        outcome = "finished"
    finally:
        run.close(outcome)


@click.command("predict")
@click.option("--loud", is_flag=True, help="Say it loudly.")
def predict(job, loud):
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / "seen.json").write_text(
        json.dumps({"checkpoints": [str(path) for path in job.checkpoints], "loud": loud, "part": job.part})
    )
    failed = {"toy_001": "it is broken"} if os.environ.get("MEDRL_TOY_FAIL") else {}
    if job.part[1] > 1:
        _write_part(job)
    return Outcome(done=["toy_000"], failed=failed)


def _write_part(job):
    """Write the report of a part as the loop over cases does; part 2 dies if it is asked to."""
    from medrl.core.predicting import part_name
    from medrl.core.predicting.record import CaseRecord, PredictReport

    if os.environ.get("MEDRL_TOY_KILL") == str(job.part[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    name = f"toy_{job.part[0]:03d}"
    good = os.environ.get("MEDRL_TOY_BAD") != str(job.part[0])
    record = CaseRecord(status="done") if good else CaseRecord(status="failed", error={"why": "it is broken"})
    path = job.output / part_name("report.json", job.part)
    facts = {
        "planned": 1,
        "max_memory_gb": job.max_memory_gb,
        "overlap": job.overlap,
        "continue": job.continue_,
    }
    PredictReport(path=path, facts=facts, cases={name: record}).write()
    if not good:
        raise errors.DataError(f"case {name}", why="it is broken")


@click.command("demo")
def demo(job):
    job.say("step one of one")
    report = job.folder / "report.html"
    report.write_text("<html></html>")
    return DemoResult(
        columns=["Dice"],
        rows=[("uniform", "baseline", [0.5]), ("toy", "method", [0.75]), ("random", "control", [0.25])],
        report=report,
        notes=["Higher is better."],
    )


@click.command("shout")
@click.option("--word", default="hey", help="What to say.")
@click.pass_obj
def shout(manager, word):
    """Say a word loudly."""
    click.echo(f"{word.upper()} {','.join(manager.names())}")
