"""Weights of teachers: rules on the simplex, measures, probe, alignment, meta optimisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.plugins.graft import weighting as w
from medrl.plugins.graft.models import TinyUNet
from medrl.plugins.graft.regions import BINARY, THREE_CLASS, classes

Q = torch.tensor([[0.7, 0.3, 0.2]])
C = torch.tensor([[0.9, 0.5, 0.1]])
H = w.uniform(3)


def rounded(values):
    return [round(v, 5) for v in values.flatten().tolist()]


# -- rules ------------------------------------------------------------------------------------------


def test_the_published_weights_of_the_worked_example():
    quality, unlike = w.from_quality(Q), w.diversity(C)
    assert rounded(quality) == [0.97556, 0.01787, 0.00657]
    assert rounded(unlike) == [0.21198, 0.31624, 0.47178]
    assert rounded(w.gated_diversity(quality, unlike)) == [0.95940, 0.02621, 0.01439]
    assert rounded(w.legacy_weights(H, Q, C)) == [0.75610, 0.12581, 0.11810]
    assert rounded(w.legacy_weights(H, Q, C, gated=False)) == [0.65445, 0.17560, 0.16995]


def test_equal_learned_factors_are_the_plain_mean_and_others_shift_it():
    assert torch.allclose(w.legacy_weights(H, Q, C, factors=torch.ones(3)), w.legacy_weights(H, Q, C))
    learned = w.legacy_weights(H, Q, C, factors=torch.tensor([50.0, 0.0, 0.0]))
    assert torch.allclose(learned, H, atol=1e-6)


@given(
    values=hnp.arrays("float32", (2, 3, 5), elements=st.floats(-1, 1, width=32)),
    half=st.booleans(),
    gated=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_published_weights_always_lie_on_the_simplex(values, half, gated):
    q, c, h = (torch.from_numpy(values[:, i].copy()) for i in range(3))
    if half:
        q, c, h = q.bfloat16(), c.bfloat16(), h.bfloat16()
    weights = w.legacy_weights(torch.softmax(h.float(), 1), q.abs(), c, gated=gated)
    assert bool((weights >= 0).all())
    assert float((weights.sum(1) - 1).abs().max()) < 1e-6


def test_warm_up_blends_from_uniform_and_the_original_from_ones():
    weights = torch.tensor([0.8, 0.1, 0.1])
    first = w.warmup_blend(weights, w.warmup_alpha(1, 4, total=10))
    assert first.tolist() == pytest.approx([0.45, 0.275, 0.275])
    assert w.warmup_blend(weights, w.warmup_alpha(4, 4, total=10)) is weights
    sums = [
        float(w.warmup_blend(weights, w.warmup_alpha(e, 4, total=10, legacy=True), legacy=True).sum())
        for e in range(5)
    ]
    assert sums == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0])


def test_warm_up_can_start_from_the_prior():
    weights, prior = torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([0.2, 0.2, 0.6])
    assert w.warmup_blend(weights, 0.0, start=prior).tolist() == [pytest.approx([0.2, 0.2, 0.6])]
    assert w.warmup_blend(weights, 0.5, start=prior).tolist() == [pytest.approx([0.5, 0.15, 0.35])]


def test_a_warm_up_as_long_as_the_run_gives_exactly_the_uniform_weights_throughout():
    weights = torch.tensor([[0.8, 0.1, 0.1]])
    for warmup in (10, 11):
        assert w.agent_is_off(warmup, 10)
        for epoch in range(10):
            blended = w.warmup_blend(weights, w.warmup_alpha(epoch, warmup, total=10))
            assert torch.equal(blended, w.uniform(3))
    assert not w.agent_is_off(9, 10)
    assert w.warmup_alpha(9, 10, total=10, legacy=True) == 0.9
    assert w.warmup_alpha(0, 0, total=10) == 1.0


def test_projection_onto_the_simplex():
    assert w.project_simplex(torch.tensor([0.5, 0.8, -0.2])).tolist() == pytest.approx([0.35, 0.65, 0.0])
    assert w.project_simplex(torch.tensor([0.2, 0.3, 0.5])).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert w.project_simplex(torch.tensor([-5.0, -9.0])).tolist() == [1.0, 0.0]


@given(hnp.arrays("float64", 5, elements=st.floats(-10, 10)))
@settings(max_examples=100, deadline=None)
def test_no_point_of_the_simplex_is_nearer_than_the_projection(values):
    x = torch.from_numpy(values.copy())
    p = w.project_simplex(x)
    assert bool((p >= 0).all())
    assert float(p.sum()) == pytest.approx(1.0)
    corners = torch.eye(5, dtype=torch.float64)
    assert float(((corners - p) @ (x - p)).max()) < 1e-8


def test_the_floor_keeps_every_teacher_and_the_sum():
    floored = w.with_floor(torch.tensor([1.0, 0.0]), 0.1)
    assert floored.tolist() == pytest.approx([0.95, 0.05])


def test_entropy_is_the_logarithm_of_the_number_when_equal_and_zero_on_one():
    assert float(w.entropy(w.uniform(5))) == pytest.approx(math.log(5))
    assert float(w.entropy(torch.tensor([1.0, 0.0]))) == 0.0


# -- measures ---------------------------------------------------------------------------------------


def test_quality_is_the_cancer_dice_and_a_true_negative_scores_one():
    truth = torch.zeros(2, 2, 1, 1, 4)
    truth[0, 1, 0, 0, :2] = 1
    said = torch.full((2, 2, 1, 1, 4), -9.0)
    said[0, 1, 0, 0, 1:3] = 9.0
    quality = w.teacher_quality([said, -said], truth, BINARY)
    assert quality[0].tolist() == pytest.approx([0.5, 0.5])
    assert quality[1].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_quality_of_classes_looks_at_every_structure():
    target = classes({"background": 0, "a": 1, "b": 2})
    truth = target.encode(torch.tensor([0, 1, 2, 2]).view(1, 1, 1, 4))
    wrong_b = target.encode(torch.tensor([0, 1, 0, 0]).view(1, 1, 1, 4)) * 20 - 10
    assert float(w.teacher_quality([wrong_b], truth, target)) == pytest.approx(0.5, abs=1e-6)


def test_quality_applies_each_familys_own_threshold():
    truth = torch.zeros(1, 2, 1, 1, 2)
    truth[0, 1, 0, 0, 0] = 1
    maps = torch.full((1, 3, 1, 1, 2), -20.0)
    maps[0, 1, 0, 0] = torch.logit(torch.tensor([0.9, 0.9 * 0.01]))
    assert float(w.teacher_quality([maps], truth, BINARY, families=["prostatlasdiff"])) == pytest.approx(1.0)
    maps[0, 1, 0, 0] = torch.logit(torch.tensor([0.9, 0.9 * 0.05]))
    found = w.teacher_quality([maps], truth, BINARY, families=["prostatlasdiff"])
    assert float(found) == pytest.approx(2 / 3, abs=1e-5)


def test_disagreement_is_the_distance_from_the_mean_of_teachers():
    p = [torch.full((1, 2, 2, 2, 2), 0.9), torch.full((1, 2, 2, 2, 2), 0.5)]
    assert w.disagreement(p, BINARY.focus).tolist() == [pytest.approx([0.2, 0.2])]


def test_similarity_is_the_cosine_of_the_flattened_features():
    s = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1, 1)
    t = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1, 1)
    assert w.similarity([s, s], [t, -s]).tolist() == [pytest.approx([0.96, -1.0])]


def test_the_ensemble_is_the_mean_or_the_weighted_mean():
    p = [torch.full((1, 1, 1, 1, 1), 0.9), torch.full((1, 1, 1, 1, 1), 0.5)]
    assert float(w.ensemble(p)) == pytest.approx(0.7)
    assert float(w.ensemble(p, torch.tensor([[0.75, 0.25]]))) == pytest.approx(0.8)


def test_the_composite_reward_of_the_worked_example():
    assert float(w.composite_reward(0.60, 0.55, 1.2, alpha=0.7)) == pytest.approx(3.14, abs=1e-5)


def test_reward_cross_entropy_weighs_foreground_and_cancer():
    zero, log2 = torch.zeros(1, 2, 1, 1, 1), math.log(2)
    assert float(w.reward_ce(zero, zero, BINARY)) == pytest.approx(log2 * (1 + 5) / 2)
    assert float(w.reward_ce(zero, zero + 1, BINARY)) == pytest.approx(log2 * (1 + 10 * 5) / 2)
    three = torch.zeros(1, 3, 1, 1, 1)
    expected = log2 * (1 + 3 * 5 + 5 * 10) / 3
    assert float(w.reward_ce(three, three + 1, THREE_CLASS)) == pytest.approx(expected)
    target = classes({"background": 0, "a": 1})
    one_hot = target.encode(torch.ones(1, 1, 1, 1))
    assert float(w.reward_ce(zero, one_hot, target)) == pytest.approx(log2)


def test_the_terminal_reward_is_the_improvement_over_its_running_mean():
    reward = w.TerminalReward(0.5)
    assert reward(0.6) == 0.0
    assert reward(0.8) == pytest.approx(20.0)
    assert reward(0.8) == pytest.approx(10.0)
    other = w.TerminalReward(0.5)
    other.load_state_dict(reward.state_dict())
    assert other(0.8) == reward(0.8)
    assert w.TerminalReward(legacy=True)(0.6) == pytest.approx(60.0)


# -- probe ------------------------------------------------------------------------------------------


def cases(count=4, size=(6, 12, 12)):
    """Cases with a box of label 1 and one of label 2 at random places."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        labels = torch.zeros(size, dtype=torch.int64)
        a, b = torch.randint(0, 5, (2,), generator=generator).tolist()
        labels[1:5, a : a + 6, b : b + 4] = 1
        labels[2:4, a + 2 : a + 7, b + 4 : b + 7] = 2
        found.append(labels)
    return found


def teacher(labels, quality, *, seed=0):
    """Features that hold the labels in two of four channels, under noise of standard deviation 1/quality."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(4, *labels.shape)
    maps[1], maps[2] = (labels == 1).float(), (labels == 2).float()
    return 7.0 * (maps + torch.randn(maps.shape, generator=generator) / quality) + 3.0


def test_the_probe_ranks_teachers_by_what_their_features_hold():
    labels = cases()
    kinds = {
        "good": lambda k: teacher(labels[k], 20.0, seed=k),
        "weak": lambda k: teacher(labels[k], 2.5, seed=k),
        "shuffled": lambda k: teacher(labels[(k + 1) % 4], 20.0, seed=k),
        "noise": lambda k: torch.randn(4, 6, 12, 12, generator=torch.Generator().manual_seed(k)),
    }
    good, weak, shuffled, noise = w.probe_qualities(list(kinds.values()), labels).tolist()
    assert good > 0.95
    assert good > weak > shuffled
    assert noise < 0.1
    weights = w.from_quality(torch.tensor([good, weak, shuffled, noise]), temperature=w.PROBE_TEMPERATURE)
    assert int(weights.argmax()) == 0
    assert float(weights[3]) < 0.5 / 4


def test_the_probe_ignores_scale_offset_and_order_of_channels():
    labels = cases()
    plain = w.probe_quality(lambda k: teacher(labels[k], 3.0, seed=k), labels)
    changed = w.probe_quality(lambda k: teacher(labels[k], 3.0, seed=k)[[2, 0, 3, 1]] * 100 - 5, labels)
    assert changed == pytest.approx(plain, abs=0.02)


def test_the_probe_is_repeatable_and_reads_features_of_lower_resolution():
    labels = cases()

    def half(k):
        return torch.nn.functional.avg_pool3d(teacher(labels[k], 20.0, seed=k)[None], (1, 2, 2))[0]

    first = w.probe_quality(half, labels)
    assert first == w.probe_quality(half, labels)
    assert first > 0.6


def test_the_probe_sees_rare_classes_with_few_voxels():
    labels = cases()
    settings = w.ProbeSettings(voxels=150)
    assert w.probe_quality(lambda k: teacher(labels[k], 20.0, seed=k), labels, settings) > 0.9


def test_the_probe_needs_two_labelled_cases_and_a_structure():
    with pytest.raises(DataError, match="two"):
        w.probe_quality(lambda k: torch.zeros(1, 2, 2, 2), [torch.ones(2, 2, 2)])
    with pytest.raises(DataError, match="one label"):
        w.probe_quality(lambda k: torch.zeros(1, 2, 2, 2), [torch.zeros(2, 2, 2)] * 2)
    with pytest.raises(DataError, match="shape"):
        w.probe_quality(lambda k: torch.zeros(2, 2, 2), cases(2))


# -- alignment --------------------------------------------------------------------------------------


def test_alignment_is_the_directional_derivative_of_every_teachers_loss():
    torch.manual_seed(0)
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    goals = torch.randn(3, 6, dtype=torch.float64)

    def each():
        return ((theta - goals) ** 2).sum(dim=1)

    theta.grad = torch.randn(6, dtype=torch.float64)
    direction = w.descent_direction([theta])
    assert float(torch.stack([d.square().sum() for d in direction]).sum()) == pytest.approx(1.0, abs=1e-6)
    start = theta.detach().clone()
    found = w.alignment(each, [theta], direction, epsilon=0.02)
    exact = (2 * (start - goals)) @ direction[0].double()
    assert torch.allclose(found.double(), exact, atol=1e-4)
    assert torch.equal(theta.detach(), start)


def test_parameters_are_restored_to_the_last_bit_even_when_the_forward_pass_fails():
    network = TinyUNet(features=(2, 4))
    before = [p.detach().clone() for p in network.parameters()]
    directions = [torch.randn_like(p) for p in network.parameters()]

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        w.alignment(fails, list(network.parameters()), directions)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_direction_is_preconditioned_like_adam_and_zero_without_a_gradient():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([p], lr=0.0, betas=(0.0, 0.0))
    p.grad = torch.tensor([4.0, 0.25])
    optimizer.step()
    (direction,) = w.descent_direction([p], optimizer)
    assert direction.tolist() == pytest.approx([2**-0.5, 2**-0.5], abs=1e-4)
    p.grad = torch.tensor([torch.nan, 1.0])
    assert float(w.descent_direction([p])[0].abs().sum()) == 0.0
    p.grad = None
    assert float(w.descent_direction([p])[0].abs().sum()) == 0.0


def test_alignment_scores_favour_the_teacher_that_helps_and_resume():
    scores = w.AlignmentScores(3)
    assert torch.allclose(scores.weights(), w.uniform(3)[0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores.update(torch.tensor([1.0, 0.0, -1.0]) + 0.5 * torch.randn(3, generator=generator))
    weights = scores.weights()
    assert float(weights[0]) > 0.9
    assert float(weights[2]) < 0.01
    assert bool((scores.scores.abs() <= 1.0 + 1e-6).all())
    held = scores.weights(torch.tensor([1e-6, 0.5, 0.5]))
    assert float(held[0]) < 0.01
    other = w.AlignmentScores(3)
    other.load_state_dict(scores.state_dict())
    assert torch.equal(other.weights(), weights)
    scores.update(torch.tensor([torch.nan, 0.0, 0.0]))
    assert torch.equal(scores.weights(), weights)
    with pytest.raises(CheckpointError, match="3 teachers"):
        w.AlignmentScores(2).load_state_dict(scores.state_dict())


# -- meta -------------------------------------------------------------------------------------------


def test_one_meta_step_is_a_projected_gradient_step_from_uniform():
    losses = torch.tensor([1.0, 2.0, 4.0])
    expected = w.project_simplex(torch.full((3,), 1 / 3) - 0.1 * (losses + 0.02 / 3))
    assert torch.allclose(w.meta_weights(losses, w.MetaSettings(steps=1)), expected)


def test_meta_weights_prefer_small_losses_and_lie_on_the_simplex():
    losses = torch.tensor([[0.5, 0.8, 0.9], [0.5, 0.8, 0.9]])
    weights = w.meta_weights(losses)
    assert weights[0] > weights[1] > weights[2] >= 0
    assert float(weights.sum()) == pytest.approx(1.0)
    softer = w.meta_weights(losses, w.MetaSettings(temperature=2.0))
    assert float(w.entropy(softer)) > float(w.entropy(weights))


def test_the_adaptive_schedule_shortens_and_sharpens():
    at = {e: w.adaptive_settings(e) for e in (0, 19, 20, 49, 50, 51, 101)}
    assert [at[e].temperature for e in (0, 19, 20, 49, 50)] == [2.0, 2.0, 1.5, 1.5, 1.0]
    assert [at[e].steps for e in (50, 51, 101)] == [3, 2, 1]
    assert at[101].lr == pytest.approx(0.05 * 0.95**10)


def test_context_weights_prefer_the_teacher_like_the_student():
    s = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1)
    t = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    weights = w.context_weights([s, s], [s, t])
    assert weights.tolist() == [pytest.approx(torch.softmax(torch.tensor([1.0, 0.0]), 0).tolist())]


def test_a_quality_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError):
        w.from_quality(Q, temperature=0.0)
