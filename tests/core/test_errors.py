"""Errors: what, why, do; exit codes; travelling between processes; suggestions."""

from __future__ import annotations

import pickle
import signal

import pytest

from medrl.core import errors
from medrl.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MedrlError,
    PluginError,
    RuntimeFault,
    did_you_mean,
    near_matches,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (MedrlError, 1),
        (RuntimeFault, 1),
        (ConfigError, 2),
        (DataError, 3),
        (CheckpointError, 4),
        (PluginError, 5),
    ],
)
def test_every_kind_of_error_has_its_exit_code(kind, code):
    assert kind("x").exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_128_plus_its_number(number, code):
    error = Interrupted(int(number), checkpoint="last.pt")
    assert error.exit_code == code
    assert "checkpoint saved to last.pt" in str(error)


def test_an_error_reads_what_colon_why():
    error = DataError(
        "case a: a_0000.nii.gz", why="ends after 61 % of its voxels", do="copy it again", case="a"
    )
    assert str(error) == "case a: a_0000.nii.gz: ends after 61 % of its voxels"
    assert (error.do, error.case) == ("copy it again", "a")
    assert str(DataError("only what")) == "only what"


def test_a_config_error_lists_every_problem():
    error = ConfigError("config.yaml", why="2 problems", problems=["first", "second"])
    assert str(error) == "config.yaml: 2 problems\n  - first\n  - second"


@pytest.mark.parametrize(
    "error",
    [
        DataError("case a", why="damaged", do="copy it", case="a"),
        ConfigError("file", why="wrong", problems=["one", "two"]),
        Interrupted(15, checkpoint="last.pt"),
        PluginError("plugin 'x'", why="broken"),
    ],
)
def test_an_error_survives_the_way_from_a_worker_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__
    assert copy.exit_code == error.exit_code


def test_near_matches_ignore_case_and_come_best_first():
    assert near_matches("GRAPHT", ["graft", "spars", "grant"])[0] in ("graft", "grant")
    assert near_matches("Graft", ["graft", "spars"]) == ["graft"]
    assert near_matches("zzz", ["graft", "spars"]) == []


def test_a_suggestion_names_near_matches_or_everything_known():
    assert did_you_mean("sparz", ["graft", "spars"]) == "did you mean 'spars'?"
    assert did_you_mean("zzz", ["spars", "graft"]) == "known: graft, spars"
    assert did_you_mean("zzz", []) == "none is known"


def test_all_exit_codes_differ():
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert len(codes) == len(set(codes)) == 8
