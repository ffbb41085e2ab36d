"""Correctors of windows: frames that jump are mended, motion is left alone, the denoiser learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import Corrector
from medrl.core.phantoms.echo import make_sequence
from medrl.core.validity.temporal import check_sequence
from medrl.plugins.rl4seg3d.corrector import (
    KINDS,
    TemporalCorrector,
    WindowDenoiser,
    build_corrector,
    temporal_median,
)

SPACING = (154 / 48, 154 / 48)


@pytest.fixture(scope="module")
def sequence() -> torch.Tensor:
    """One valid sequence ``(1, X, Y, T)``."""
    return torch.from_numpy(make_sequence(0, 0, size=(48, 48), frames=16).label.astype(np.int64))[None]


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).float().mean())


def test_the_median_takes_what_most_frames_have():
    masks = torch.tensor([[[[0, 1, 0, 2, 2, 1, 2]]]])
    assert temporal_median(masks, 3).tolist() == [[[[0, 0, 1, 2, 2, 2, 2]]]]


def test_a_voxel_decides_between_equals_and_steady_motion_stays():
    masks = torch.tensor([[[[0, 1, 2, 2]], [[0, 0, 1, 1]], [[2, 2, 1, 1]]]])
    assert temporal_median(masks, 3).tolist() == masks.tolist()
    with pytest.raises(RuntimeFault, match="expected"):
        temporal_median(masks[0], 3)


def test_a_wrong_frame_is_mended(sequence):
    spoiled = sequence.clone()
    spoiled[..., 7] = spoiled[..., 7].roll(9, dims=1)
    spoiled[..., 11] = 0
    fixed = TemporalCorrector(3).correct(spoiled)
    assert fixed.dtype == torch.int64
    before, after = (check_sequence(each[0], SPACING) for each in (spoiled, fixed))
    assert before.wrong_frames == (6, 7, 8, 10, 11, 12)
    assert after.valid
    for frame in (7, 11):
        assert agreement(fixed[..., frame], sequence[..., frame]) > 0.97


def test_a_beating_heart_is_hardly_changed(sequence):
    fixed = TemporalCorrector(3).correct(sequence)
    assert agreement(fixed, sequence) > 0.985
    assert check_sequence(fixed[0], SPACING).valid


def test_holes_and_stray_blobs_are_mended_in_every_frame(sequence):
    spoiled = sequence.clone()
    spoiled[:, :3, :3] = 1
    middle = torch.nonzero((sequence[0] == 1).all(dim=-1))
    x, y = middle[len(middle) // 2].tolist()
    spoiled[0, x, y] = 0
    fixed = TemporalCorrector(3).correct(spoiled)
    assert (fixed[:, :3, :3] == 0).all()
    assert (fixed[0, x, y] == 1).all()


def test_single_frames_short_windows_and_radius_zero_get_morphology_alone(sequence):
    plain = build_corrector("morphology", classes=3)
    corrector = TemporalCorrector(3)
    assert torch.equal(corrector.correct(sequence[..., 0]), plain.correct(sequence[..., 0]))
    assert torch.equal(corrector.correct(sequence[..., :1]), plain.correct(sequence[..., :1]))
    still = TemporalCorrector(3, radius=0)
    assert torch.equal(still.correct(sequence), plain.correct(sequence))
    assert not corrector.correct(torch.zeros(2, 8, 8, 4, dtype=torch.int64)).any()


def test_probabilities_are_those_of_the_corrected_map(sequence):
    corrector = TemporalCorrector(3)
    assert isinstance(corrector, Corrector)
    found = corrector.probabilities(sequence)
    assert found.shape == (1, 3, *sequence.shape[1:])
    assert torch.equal(found.argmax(dim=1), corrector.correct(sequence))


def test_the_denoiser_of_windows_sees_frames_made_wrong(sequence):
    clean = sequence[..., :4].expand(6, 48, 48, 4)
    settings = {"jitter": None, "corruption": {"salt": 1.0, "warp": 0, "blob": 0, "grow": 0, "band": 0}}
    plain, wrong = (
        build_corrector("denoiser", classes=3, network=nn.Conv3d(3, 3, 1), glitch=glitch, **settings)
        for glitch in (0.0, 0.5)
    )
    first, again, without = (made.batch(clean, seed=0, keys=range(6))[0] for made in (wrong, wrong, plain))
    assert torch.equal(first, again)
    same = (first == without).flatten(1, 2).all(dim=1)
    assert 4 <= int((~same).sum()) <= 20
    assert isinstance(wrong, WindowDenoiser)
    assert torch.equal(wrong.batch(clean, seed=0, keys=range(6))[1], clean)


def test_the_denoiser_of_windows_learns():
    generator = torch.Generator().manual_seed(0)
    clean = torch.zeros(4, 16, 16, 4, dtype=torch.int64)
    clean[:, 4:12, 4:12] = 2
    clean[:, 6:10, 6:10] = 1
    network = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    made = WindowDenoiser(network, 3, jitter=None)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    losses = []
    for step in range(30):
        loss = made.loss(clean, seed=0, keys=[(step, k) for k in range(4)])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert made.correct(clean).shape == clean.shape


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("denoiser", "vae", "atlas")])
def test_correctors_without_weights_are_built_by_name(kind, sequence):
    made = build_corrector(kind, classes=3)
    assert not made.learned
    assert made.correct(sequence[..., :4]).shape == (1, 48, 48, 4)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("temporl", {}, "temporal"),
        ("temporal", {"radios": 2}, "radius"),
        ("temporal", {"radius": -1}, "radius -1"),
        ("denoiser", {"network": nn.Identity(), "glitch": 2.0}, "expected a probability"),
        ("denoiser", {"network": nn.Identity(), "glich": 0.1}, "glitch"),
        ("denoiser", {}, "no network"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, params, message):
    with pytest.raises(ConfigError) as caught:
        build_corrector(kind, classes=3, **params)
    assert message in str(caught.value)
