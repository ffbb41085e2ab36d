"""Random streams: independence, capture and restore."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medrl.core import rng


def draw():
    return (
        random.random(),
        float(np.random.rand()),
        float(torch.rand(1)),
        float(np.random.randn()),
        random.gauss(0, 1),
    )


def test_a_derived_seed_is_the_same_on_every_machine():
    assert rng.derive_seed(1, "loader", 0) == 3505308772226710814


@given(st.integers(0, 2**32 - 1), st.integers(0, 63))
def test_derived_seeds_fit_torch_and_numpy(seed, rank):
    found = rng.derive_seed(seed, "rank", rank)
    assert 0 <= found < 2**63


def test_neighbouring_seeds_and_ranks_share_no_stream():
    seeds = {rng.derive_seed(seed, "rank", rank) for seed in range(50) for rank in range(50)}
    assert len(seeds) == 2500


def test_names_are_not_run_together():
    assert rng.derive_seed(1, "ab", "c") != rng.derive_seed(1, "a", "bc")


def test_the_same_seed_gives_the_same_draws_and_another_rank_others():
    rng.seed_run(3, 0)
    first = draw()
    rng.seed_run(3, 0)
    assert draw() == first
    rng.seed_run(3, 1)
    other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("draws_before", [0, 1, 2])
def test_restored_streams_continue_exactly(draws_before):
    rng.seed_run(7)
    for _ in range(draws_before):
        draw()  # an odd number of normal draws leaves one in reserve, which is part of the state
    state = rng.capture()
    expected = [draw() for _ in range(3)]
    rng.restore(state)
    assert [draw() for _ in range(3)] == expected


def test_a_captured_state_survives_weights_only_storage(tmp_path):
    rng.seed_run(9)
    np.random.randn()
    state = rng.capture()
    torch.save(state, tmp_path / "state.pt")
    expected = draw()
    rng.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_isolated_draws_depend_on_their_seed_and_leave_the_streams_alone():
    rng.seed_run(1)
    expected = [draw(), draw()]
    rng.seed_run(1)
    first = draw()
    with rng.isolated(42):
        inside = draw()
    second = draw()
    with rng.isolated(42):
        again = draw()
    assert [first, second] == expected
    assert inside == again


def test_isolated_streams_come_back_after_an_error():
    rng.seed_run(1)
    expected = draw()
    rng.seed_run(1)
    with pytest.raises(ValueError, match="stop"), rng.isolated(42):
        raise ValueError("stop")
    assert draw() == expected


def test_generators_of_their_own_do_not_touch_the_global_streams():
    rng.seed_run(1)
    expected = draw()
    rng.seed_run(1)
    a = torch.rand(2, generator=rng.torch_generator(5, "a"))
    b = torch.rand(2, generator=rng.torch_generator(5, "b"))
    rng.numpy_generator(5, "a").random(3)
    assert draw() == expected
    assert not torch.equal(a, b)
