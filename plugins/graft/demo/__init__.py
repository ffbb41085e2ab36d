"""The demonstration: two synthetic hospitals, teachers from one, a student with few labels in the other.

Hospital A trains teachers and keeps its images. Hospital B has many images and few labels. Some teachers are
spoilt on purpose, as happens when models of unknown quality are collected; the method has to find out which.
"""

from __future__ import annotations

from medrl.core.jobs import DemoJob, DemoResult

from .page import Page
from .scales import SCALES, SWAPPED, TUNED, UNTRAINED, Scale
from .stages import Demo

__all__ = ["SCALES", "SWAPPED", "TUNED", "UNTRAINED", "Demo", "Page", "Scale", "run"]


def run(job: DemoJob) -> DemoResult:
    """Make the data, train everything, predict the test cases, evaluate, write the report."""
    demo = Demo(job, SCALES[job.preset])
    demo.write_data()
    demo.train_teachers()
    demo.extract()
    demo.train_students()
    demo.evaluate()
    return Page(demo).result()
