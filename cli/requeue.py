"""``--requeue``: a job that Slurm is about to end saves and is queued again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medrl.cli.console import console, rank
from medrl.cli.launch import has_speaker
from medrl.core.errors import EXIT_TERMINATED, ConfigError, Interrupted


@contextmanager
def queued_again(wanted: bool) -> Iterator[Callable[[int], None]]:
    """Queue this Slurm job again if what happens inside is stopped by SIGTERM.

    A script with ``#SBATCH --signal=TERM@120`` and ``--requeue`` gets that signal two minutes before its time
    is over, saves, and goes on in its next turn. Ctrl-C ends it for good.

    Yields:
        Takes the exit code of what was done.

    Raises:
        ConfigError: It is asked for outside a Slurm job, or Slurm's commands are missing.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if wanted and not job:
        raise ConfigError("--requeue", why="this is no Slurm job", do="leave it out, or use sbatch")
    if wanted and shutil.which("scontrol") is None:
        raise ConfigError("--requeue", why="there is no scontrol on this node", do="leave it out")
    code = 0

    def ended(value: int) -> None:
        nonlocal code
        code = value

    try:
        yield ended
    except Interrupted as error:
        code = error.exit_code
        raise
    finally:
        # Ranks that another medrl started leave this to it.
        if wanted and code == EXIT_TERMINATED and rank() == 0 and not has_speaker():
            _queue_again(job)


def _queue_again(job: str) -> None:
    restarted = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    if restarted:
        job = f"{restarted}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    try:
        done = subprocess.run(  # noqa: S603 - Slurm's own tool; the number comes from Slurm
            [shutil.which("scontrol") or "scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        console().line(f"warning: job {job} could not be queued again: {error}")
        return
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        console().line(f"warning: job {job} could not be queued again: {why}")
    else:
        console().line(f"job {job} is queued again and will go on")
