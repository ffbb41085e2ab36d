"""Windows: starts, weights, exact blending, and frames that are given back as they are finished."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.rl4seg3d.windows import (
    Blender,
    TimePlan,
    chunks,
    plan_time,
    weight_map,
    window_starts,
)


def blended(plan, weights, outputs):
    blender = Blender(weights, plan)
    found = {}
    for output in outputs:
        found.update(blender.add(output))
    return torch.stack([found[k] for k in range(plan.length)], dim=-1)


def plain(length):
    return TimePlan(tuple(range(length)), 0, length, tuple(window_starts(length)))


@pytest.mark.parametrize(
    ("length", "starts"),
    [(5, [0, 1]), (7, [0, 2, 3]), (8, [0, 2, 4]), (21, [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]), (4, [0])],
)
def test_windows_begin_where_the_original_begins_them(length, starts):
    assert window_starts(length) == starts


def test_twenty_frames_are_padded_by_six_and_seen_by_fifteen_windows():
    plan = plan_time(20)
    assert len(plan.frames) == 32
    assert len(window_starts(32)) == 15
    assert plan.frames[:8] == (6, 5, 4, 3, 2, 1, 0, 1)
    assert plan.frames[-7:] == (19, 18, 17, 16, 15, 14, 13)


def test_windows_of_reflected_frames_alone_are_left_out_and_change_nothing():
    plan = plan_time(20)
    every = TimePlan(plan.frames, plan.first, plan.length, tuple(window_starts(32)))
    assert set(every.starts) - set(plan.starts) == {0, 2, 26, 28}
    weights = weight_map(6, 5)
    sequence = torch.randn(3, 6, 5, 20, generator=torch.Generator().manual_seed(0))

    def outputs(which):
        return [torch.tanh(sequence[..., which.window(s)]) * (1 + s) for s in which.starts]

    assert torch.equal(blended(plan, weights, outputs(plan)), blended(every, weights, outputs(every)))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 13])
def test_every_frame_is_given_back_once_and_in_order(length):
    plan = plan_time(length)
    blender = Blender(weight_map(3, 3), plan)
    order = [frame for _ in plan.starts for frame, _ in blender.add(torch.zeros(1, 3, 3, 4))]
    assert order == list(range(length))
    assert not blender._mean


def test_equal_outputs_blend_to_their_value():
    plan = plan_time(20)
    outputs = [torch.full((1, 8, 8, 4), 0.7) for _ in plan.starts]
    for blend in ("gaussian", "legacy", "uniform"):
        result = blended(plan, weight_map(8, 8, blend), outputs)
        assert (result - 0.7).abs().max() <= 2e-7


@pytest.mark.parametrize(
    ("blend", "place", "expected"),
    [
        ("gaussian", (31, 31), (0.018, 0.982)),
        ("legacy", (32, 32), (0.31, 0.69)),
        ("gaussian", (0, 0), (0.5, 0.5)),
        ("uniform", (31, 31), (0.5, 0.5)),
    ],
)
def test_frame_three_of_eight_has_the_weights_of_the_specification(blend, place, expected):
    plan = plain(8)
    outputs = [torch.full((1, 64, 64, 4), float(k == 1)) for k in range(3)]
    second = blended(plan, weight_map(64, 64, blend), outputs)[0, place[0], place[1], 3].item()
    tolerance = 0.0005 if blend != "legacy" else 0.005
    assert (1 - second, second) == pytest.approx(expected, abs=tolerance)


def test_weights_in_time_are_those_of_the_specification():
    centre = weight_map(64, 64)[31, 31] / weight_map(64, 64)[31, 31].max()
    assert (centre * 0.6065).tolist() == pytest.approx([0.0111, 0.6065, 0.6065, 0.0111], abs=1e-4)
    legacy = weight_map(64, 64, "legacy")[32, 32]
    assert (legacy / legacy.max() * 0.980).tolist() == pytest.approx([1e-3, 0.198, 0.980, 0.089], abs=1e-3)


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="3 frames"):
        window_starts(3)
    blender = Blender(weight_map(2, 2), plan_time(4))
    with pytest.raises(RuntimeFault, match="5 frames"):
        list(blender.add(torch.zeros(1, 2, 2, 5)))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(8, [[0, 1, 2, 3], [4, 5, 6, 7]]), (6, [[0, 1, 2, 3], [2, 3, 4, 5]]), (2, [[0, 1, 1, 1]])],
)
def test_chunks_do_not_overlap_but_the_last(length, expected):
    assert chunks(length) == expected
