"""The images of rl4seg: readers, division by patient, preparation, and the wall around target labels."""

from __future__ import annotations

from medrl.core.adaptation.labels import join_labels

from .dividing import Division, divide_source, divide_target, open_domain
from .loading import DataBlocks, load_source, load_target, plan_of
from .plan import (
    Placement,
    Prepared,
    SamplePlan,
    equalise,
    make_plan,
    place,
    prepare_labels,
    prepare_volume,
    restore_labels,
    restore_volume,
)
from .readers import EchoDataset, open_camus, open_esed
from .sets import Domain, ImageSet
from .vital import VitalDataset, open_vital

__all__ = [
    "DataBlocks",
    "Division",
    "Domain",
    "EchoDataset",
    "ImageSet",
    "Placement",
    "Prepared",
    "SamplePlan",
    "VitalDataset",
    "divide_source",
    "divide_target",
    "equalise",
    "join_labels",
    "load_source",
    "load_target",
    "make_plan",
    "open_camus",
    "open_domain",
    "open_esed",
    "open_vital",
    "place",
    "plan_of",
    "prepare_labels",
    "prepare_volume",
    "restore_labels",
    "restore_volume",
]
