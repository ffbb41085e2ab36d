"""Anatomical validity: declarative rules on label maps of any size and any number of classes.

Example::

    rules = load_rules("echo")
    report = check(mask, rules)  # mask (X, Y), as stored in the file
    report.valid, report.failed, report.values["holes_in_lv"]
"""

from medrl.core.validity.checking import (
    Report,
    check,
    check_batch,
    check_stack,
    is_valid,
    validity_rate,
    worker_pool,
)
from medrl.core.validity.rules import Rule, Rules, builtin_rules, load_rules

__all__ = [
    "Report",
    "Rule",
    "Rules",
    "builtin_rules",
    "check",
    "check_batch",
    "check_stack",
    "is_valid",
    "load_rules",
    "validity_rate",
    "worker_pool",
]
