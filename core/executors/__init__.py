"""Commands of medrl as tasks: one after the other, several at a time, or as jobs of Slurm. Light."""

from medrl.core.executors.cluster import Resources, SubmititExecutor, parse_resources
from medrl.core.executors.local import LocalExecutor
from medrl.core.executors.tasks import Executor, Task, TaskEnd, Tell, make_executor

__all__ = [
    "Executor",
    "LocalExecutor",
    "Resources",
    "SubmititExecutor",
    "Task",
    "TaskEnd",
    "Tell",
    "make_executor",
    "parse_resources",
]
