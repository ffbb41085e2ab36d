"""Several ranks on this machine: torchrun's launcher starts ``medrl.cli`` once for each."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

from medrl.cli.console import Console
from medrl.core.errors import EXIT_RUNTIME, RuntimeFault

STARTED_BY = "MEDRL_STARTED_BY"
"""Environment variable by which a rank knows that another medrl started it and speaks for it."""


def has_speaker() -> bool:
    """Whether another medrl started this rank, and tells the person what is common to all ranks."""
    return STARTED_BY in os.environ


def inside_launcher() -> bool:
    """Whether this process is a rank that torchrun or srun started, one of several."""
    if os.environ.get("WORLD_SIZE", "").isdigit() and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"]) > 1
    tasks = os.environ.get("SLURM_NTASKS", "")
    return (
        tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ
    )


def launcher_token() -> str:
    """Return a short text that the ranks of one launch share, and no other launch; empty if none."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        value = os.environ.get(name, "")
        if value and value != "none":
            import hashlib

            return hashlib.sha256(value.encode()).hexdigest()[:6]
    return ""


def launch(arguments: Sequence[str], ranks: int, console: Console) -> int:
    """Run ``medrl ARGUMENTS`` in `ranks` processes and return the exit code of the first that failed.

    Raises:
        RuntimeFault: A rank was killed from outside.
    """
    console.loading()
    # Each rank computes with the threads that train.threads says; without this torchrun warns at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ranks that were asked to stop get time to save; torch's own limit of 30 s is short for large models.
    os.environ.setdefault("TORCHELASTIC_SHUTDOWN_TIMEOUT", "120")
    from torch.distributed import run as torch_run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not console.debug:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    torchrun: Any = torch_run  # torch leaves it unannotated
    options = torchrun.parse_args(
        ["--standalone", "--nproc-per-node", str(ranks), "--module", "medrl.cli", *arguments]
    )
    os.environ[STARTED_BY] = "medrl"
    try:
        torchrun.run(options)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code < 0:
            raise RuntimeFault(
                f"rank {number} was killed",
                why=f"by {signal.Signals(-code).name}"
                + (", perhaps for lack of memory" if code == -9 else ""),
                do="medrl resume RUN",
            ) from error
        return code or EXIT_RUNTIME
    finally:
        os.environ.pop(STARTED_BY, None)
    return 0
