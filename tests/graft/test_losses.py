"""Losses: known answers, masks, projections, and that gradients go where they should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.plugins.graft import losses
from medrl.plugins.graft.models import TinyUNet
from medrl.plugins.graft.regions import BINARY, THREE_CLASS, classes, make_target, separate


def volume(values, channels=1):
    return torch.tensor(values, dtype=torch.float32).view(1, channels, 1, 1, -1)


PROSTATE_AND_CANCER = volume([1, 1, 0, 0, 1, 0, 0, 0], 2)
ZERO = torch.zeros(1, 2, 1, 1, 4)


# -- supervised -------------------------------------------------------------------------------------


def test_deep_supervision_weights_of_six_outputs():
    expected = [0.5161, 0.2581, 0.1290, 0.0645, 0.0323, 0.0]
    assert losses.deep_supervision_weights(6) == pytest.approx(expected, abs=5e-5)
    assert losses.deep_supervision_weights(1) == [1.0]


def test_focal_loss_of_one_undecided_voxel():
    zero = torch.zeros(1, 1, 1, 1, 1)
    assert float(losses.focal(zero, zero + 1, gamma=2, pos_weight=(10,))) == pytest.approx(1.73287, abs=5e-6)
    assert float(losses.focal(zero, zero, gamma=2, pos_weight=(10,))) == pytest.approx(0.17329, abs=5e-6)


def test_dice_focal_and_their_sum_on_the_worked_example():
    p = torch.sigmoid(ZERO)
    assert float(losses.soft_dice(p[:, :1], PROSTATE_AND_CANCER[:, :1])) == pytest.approx(0.5, abs=1e-5)
    assert float(losses.soft_dice(p[:, 1:], PROSTATE_AND_CANCER[:, 1:])) == pytest.approx(1 / 3, abs=1e-5)
    loss = losses.supervised_loss(BINARY)
    assert loss.pos_weight == (1.0, 10.0)
    hard = losses.focal(ZERO, PROSTATE_AND_CANCER, pos_weight=loss.pos_weight, channel_weight=(1, 1))
    assert float(hard) == pytest.approx(0.36823, abs=5e-6)
    assert float(loss(ZERO, PROSTATE_AND_CANCER)) == pytest.approx(-0.04843, abs=1e-5)


def test_tversky_counts_misses_more_than_false_alarms():
    def at(predicted, truth):
        return float(losses.tversky(volume(predicted), volume(truth)))

    assert at([1, 1, 0, 1], [1, 1, 1, 0]) == pytest.approx(1 / 3, abs=1e-5)
    assert at([1, 1, 0, 0], [1, 1, 1, 1]) == pytest.approx(0.41176, abs=1e-5)


def test_channel_weights_change_only_the_balance_of_channels():
    logits = torch.randn(2, 2, 3, 4, 5)
    target = (torch.rand_like(logits) > 0.5).float()
    first, second = (losses.focal(logits[:, c : c + 1], target[:, c : c + 1]) for c in (0, 1))
    both = losses.focal(logits, target, channel_weight=(1.0, 3.0))
    assert torch.allclose(both, (first + 3 * second) / 4)


def test_the_profiles_have_their_published_weights_and_precedence():
    sharp, strong = (losses.supervised_loss(BINARY, profile=name) for name in ("sharp", "high_sensitivity"))
    assert (sharp.focal_weight, sharp.gamma, sharp.channel_weight) == (2.0, 1.5, (1.0, 2.0))
    assert (strong.dice_weight, strong.pos_weight, strong.channel_weight) == (1.5, (1.0, 30.0), (1.0, 3.0))
    assert losses.supervised_loss(BINARY, profile="mild").channel_weight == (1.0, 1.5)
    assert losses.profile_of(high_sensitivity=True, mild=True, sharp=True) == "high_sensitivity"
    assert losses.profile_of(mild=True, sharp=True) == "mild"
    assert losses.profile_of(sharp=True) == "sharp"
    assert losses.profile_of() == "default"
    with pytest.raises(ConfigError, match="sharp"):
        losses.supervised_loss(BINARY, profile="sharpp")


def test_three_regions_and_prostate_classes_take_their_published_weights():
    three = losses.supervised_loss(THREE_CLASS)
    assert (three.pos_weight, three.channel_weight) == ((1.0, 5.0, 10.0), (1.0, 3.0, 5.0))
    exclusive = losses.supervised_loss(make_target("binary_classes"))
    assert (exclusive.foreground_weight, exclusive.class_weight) == ((10.0, 30.0), (1.0, 10.0, 30.0))
    assert losses.brats_loss().pos_weight == (3.0, 7.0, 15.0)


def test_other_label_sets_take_equal_weights():
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    assert losses.supervised_loss(separate(labels)).pos_weight is None
    assert losses.supervised_loss(classes(labels)).class_weight is None


def test_summing_dice_over_the_batch_is_chosen_by_its_flag():
    p = torch.stack((volume([1.0, 1.0])[0], volume([0.0, 0.0])[0]))
    y = torch.stack((volume([1.0, 1.0])[0], volume([1.0, 0.0])[0]))
    assert float(losses.soft_dice(p, y, batch_dice=True)) == pytest.approx(4 / 5, abs=1e-4)
    assert float(losses.soft_dice(p, y, batch_dice=False)) == pytest.approx(0.5, abs=1e-4)


def test_nnunet_losses_are_dice_plus_cross_entropy():
    logits, index = torch.randn(2, 3, 2, 4, 4), torch.randint(0, 3, (2, 2, 4, 4))
    target = F.one_hot(index, 3).movedim(-1, 1).float()
    p = torch.softmax(logits, 1)
    overlap = (p * target).sum((2, 3, 4))
    dice = (2 * overlap + 1e-5) / (p.sum((2, 3, 4)) + target.sum((2, 3, 4)) + 1e-5)
    expected = 1 - dice[:, 1:].mean() + F.cross_entropy(logits, index)
    assert torch.allclose(losses.nnunet_loss(softmax=True)(logits, target), expected)
    region = losses.nnunet_loss()(logits, target)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    q = torch.sigmoid(logits)
    soft = (2 * (q * target).sum((2, 3, 4)) + 1e-5) / (q.sum((2, 3, 4)) + target.sum((2, 3, 4)) + 1e-5)
    assert torch.allclose(region, bce - soft.mean())


def test_softmax_focal_without_focusing_is_cross_entropy():
    logits, index = torch.randn(2, 3, 2, 4, 4), torch.randint(0, 3, (2, 2, 4, 4))
    target = F.one_hot(index, 3).movedim(-1, 1).float()
    assert torch.allclose(losses.SoftmaxFocal(gamma=0.0)(logits, target), F.cross_entropy(logits, index))
    assert float(losses.SoftmaxFocal(gamma=2.0)(logits, target)) < float(F.cross_entropy(logits, index))


@pytest.mark.parametrize("make", [losses.IoULoss, losses.TverskyLoss])
def test_overlap_losses_vanish_for_a_perfect_answer_in_both_modes(make):
    target = F.one_hot(torch.randint(0, 3, (2, 2, 4, 4)), 3).movedim(-1, 1).float()
    confident = (target * 2 - 1) * 50
    for softmax in (False, True):
        assert float(make(softmax=softmax)(confident, target)) == pytest.approx(0.0, abs=1e-5)


def test_deep_supervision_resizes_targets_and_leaves_the_last_output_out():
    target = (torch.rand(1, 2, 4, 8, 8) > 0.5).float()
    outputs = [torch.randn(1, 2, 4, 8, 8), torch.randn(1, 2, 4, 4, 4), torch.full((1, 2, 2, 2, 2), torch.nan)]
    loss = losses.BceDice()
    small = F.interpolate(target, size=(4, 4, 4), mode="nearest")
    expected = 2 / 3 * loss(outputs[0], target) + 1 / 3 * loss(outputs[1], small)
    assert torch.allclose(losses.deep_supervised(loss, outputs, target), expected)


def test_weights_of_the_wrong_number_are_refused():
    with pytest.raises(ConfigError, match="3 weights for 2 channels"):
        losses.focal(ZERO, PROSTATE_AND_CANCER, pos_weight=(1, 2, 3))


def test_supervised_losses_stay_finite_for_extreme_and_half_precision_logits():
    target = PROSTATE_AND_CANCER
    for scale in (1e4, -1e4):
        logits = (ZERO + scale).bfloat16().requires_grad_()
        value = losses.supervised_loss(BINARY)(logits, target)
        value.backward()
        assert math.isfinite(float(value.detach()))
        assert bool(torch.isfinite(logits.grad).all())


# -- features ---------------------------------------------------------------------------------------


def test_feature_distance_of_two_directions_ignores_the_teachers_scale():
    s, t = volume([3.0, 4.0]), volume([4.0, 3.0])
    distance = losses.feature_loss("cosine")
    assert float(distance(s, t)) == pytest.approx(0.08, abs=1e-6)
    assert float(distance(s, 100 * t)) == pytest.approx(0.08, abs=1e-6)
    assert float(distance(s, -s)) == pytest.approx(4.0, abs=1e-6)


def test_masked_distance_normalises_each_voxel_and_averages_over_the_mask():
    s = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 1, 2)
    t = torch.tensor([[4.0, 3.0], [-1.0, 0.0]]).T.reshape(1, 2, 1, 1, 2)
    distance = losses.feature_loss("cosine")
    assert float(distance(s, t, volume([1, 0]))) == pytest.approx(0.08, abs=1e-6)
    assert float(distance(s, t, volume([1, 1]))) == pytest.approx((0.08 + 4.0) / 2, abs=1e-6)
    assert float(distance(s, t, volume([0, 0]))) == 0.0


@pytest.mark.parametrize("kind", ["cosine", "mse", "kl", "smooth_l1"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_feature_loss_gives_one_number_a_sample_and_a_gradient_to_the_student_only(kind, masked):
    torch.manual_seed(0)
    s = torch.randn(3, 4, 2, 4, 4, requires_grad=True)
    t = torch.randn(3, 4, 2, 4, 4, requires_grad=True)
    mask = (torch.rand(3, 1, 2, 4, 4) > 0.5).float() if masked else None
    value = losses.feature_loss(kind)(s, t, mask)
    assert value.shape == (3,)
    assert bool((value > 0).all())
    value.sum().backward()
    assert t.grad is None
    outside = s.grad if mask is None else s.grad * (1 - mask)
    assert bool((s.grad != 0).any())
    assert masked == (float(outside.abs().max()) == 0.0)


@pytest.mark.parametrize("kind", ["cosine", "mse", "kl", "smooth_l1"])
def test_a_student_that_equals_its_target_has_no_feature_loss(kind):
    t = torch.randn(2, 4, 2, 4, 4)
    s = losses.standardised(t) if kind in ("mse", "smooth_l1") else t
    assert float(losses.feature_loss(kind)(s, t).abs().max()) < 1e-5


def test_features_of_different_shapes_name_both():
    with pytest.raises(DataError, match=r"\(1, 3, 1, 2, 2\)"):
        losses.feature_loss("cosine")(torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(ConfigError, match="cosine"):
        losses.feature_loss("cosin")


def test_misses_near_a_hit_are_forgiven_and_false_alarms_never():
    truth, predicted = torch.zeros(1, 1, 9, 9, 9), torch.zeros(1, 1, 9, 9, 9)
    truth[0, 0, 4, 4, 4] = predicted[0, 0, 4, 4, 4] = 1
    truth[0, 0, 7, 7, 7] = 1
    truth[0, 0, 8, 4, 4] = 1
    predicted[0, 0, 4, 4, 5] = 1
    mask = losses.correctness_mask(predicted, truth, radius=3)
    assert mask[0, 0, 4, 4, 4] == 1
    assert mask[0, 0, 7, 7, 7] == 1
    assert mask[0, 0, 8, 4, 4] == 0
    assert mask[0, 0, 4, 4, 5] == 0
    assert mask.sum() == 9**3 - 2


def test_the_mask_follows_features_of_lower_resolution():
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., 2:] = 1
    small = losses.resized_mask(mask, (2, 2, 2))
    assert small.shape == (1, 1, 2, 2, 2)
    assert small[..., 0].sum() == 0
    assert small[..., 1].sum() == 4


def test_the_weighted_sum_is_linear_in_the_weights_and_gives_them_no_gradient():
    each = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]], requires_grad=True)
    total = losses.weighted_sum(each, weights)
    assert float(total.detach()) == pytest.approx((0.5 + 1.0 + 3.0) / 2)
    total.backward()
    assert weights.grad is None


# -- logits -----------------------------------------------------------------------------------------


def test_contrastive_loss_of_the_worked_example():
    s, t = volume([1.0, 2.0, 0.0], 3), volume([3.0, 1.0, 0.0], 3)
    loss = losses.logit_loss("contrastive", softmax=True, temperature=4.0)
    assert float(loss(s, t)) == pytest.approx(4.5120, abs=5e-5)
    assert float(loss(t, t)) == 0.0


def test_kl_divergence_agrees_with_torch():
    s, t = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    expected = (
        F.kl_div(torch.log_softmax(s / 4, 1), torch.softmax(t / 4, 1), reduction="none")
        .sum(1)
        .flatten(1)
        .mean(1)
        * 16
    )
    assert torch.allclose(losses.logit_loss("kl", softmax=True)(s, t), expected, atol=1e-5)
    assert torch.allclose(losses.logit_loss("angular", softmax=True)(s, t), expected, atol=1e-5)


def test_region_mode_compares_probabilities():
    s, t = volume([0.0, 100.0], 2), volume([0.0, -100.0], 2)
    assert float(losses.logit_loss("l1", softmax=False)(s, t)) == pytest.approx(0.5)
    legacy = losses.logit_loss("contrastive", softmax=False, legacy=True)
    assert float(legacy(s, t)) == pytest.approx(0.5)


def test_relation_compares_the_cosine_matrices_of_the_batch():
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1, 1)
    t = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(2, 2, 1, 1, 1)
    assert losses.logit_loss("relation", softmax=True)(s, t).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kind", ["l1", "kl", "contrastive", "relation", "angular"])
@pytest.mark.parametrize("softmax", [False, True])
def test_every_logit_loss_gives_one_number_a_sample_and_is_zero_for_equal_logits(kind, softmax):
    if kind == "l1" and softmax:
        with pytest.raises(ConfigError):
            losses.logit_loss(kind, softmax=softmax)
        return
    loss = losses.logit_loss(kind, softmax=softmax)
    s, t = torch.randn(2, 3, 2, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 4, 4)
    value = loss(s, t)
    assert value.shape == (2,)
    assert bool((value > 0).all())
    value.sum().backward()
    assert bool((s.grad != 0).any())
    assert float(loss(t, t).abs().max()) < 1e-5


# -- projections ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [(8, 8), (4, 8), (8, 4)])
def test_the_orthogonal_projection_learns_and_stays_orthogonal(student, teacher):
    torch.manual_seed(0)
    projection = losses.Projection(student, teacher, kind="orthogonal")
    before = projection.matrix.detach().clone()
    optimizer = torch.optim.SGD(projection.parameters(), lr=0.5)
    x, t = torch.randn(2, student, 2, 4, 4), torch.randn(2, teacher, 2, 4, 4)
    for _ in range(10):
        optimizer.zero_grad()
        losses.feature_loss("cosine")(projection(x, (2, 4, 4)), t).sum().backward()
        assert all(float(p.grad.abs().max()) > 0 for p in projection.parameters())
        optimizer.step()
    w = projection.matrix
    small = w.T @ w if teacher >= student else w @ w.T
    assert float((small - torch.eye(min(student, teacher))).norm().detach()) < 1e-5
    assert float((w - before).abs().max().detach()) > 1e-2


@pytest.mark.parametrize("kind", ["conv", "linear", "orthogonal"])
def test_every_projection_fits_size_and_channels_and_survives_a_checkpoint(kind, tmp_path):
    make = lambda: losses.Projections({"neg1": 4}, [{"neg1": 6}, {"neg1": 3}], kind=kind)  # noqa: E731
    maps = make()
    x = torch.randn(1, 4, 4, 8, 8)
    out = maps("neg1", x, [(4, 4, 4), (4, 8, 16)])
    assert [tuple(o.shape) for o in out] == [(1, 6, 4, 4, 4), (1, 3, 4, 8, 16)]
    other = make()
    other.load_state_dict(maps.state_dict())
    again = other("neg1", x, [(4, 4, 4), (4, 8, 16)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out, again, strict=True))


def test_resizing_pools_when_the_student_is_larger_and_interpolates_otherwise():
    x = torch.arange(16.0).view(1, 1, 1, 4, 4)
    assert losses.resized(x, (1, 2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    up = losses.resized(x, (2, 7, 2))
    assert up.shape == (1, 1, 2, 7, 2)
    assert (float(up.min()), float(up.max())) == (0.0, 15.0)
    assert losses.resized(x, (1, 4, 4)) is x


def test_missing_taps_are_all_named():
    with pytest.raises(ConfigError) as error:
        losses.Projections({"neg1": 4}, [{"neg1": 4}, {}], taps=("neg1", "neg2"))
    assert len(error.value.problems) == 4


def test_equal_speed_gives_the_student_its_weights_and_every_projection_the_same_gradient():
    torch.manual_seed(0)
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    x, t = torch.randn(2, 4, 2, 4, 4), [torch.randn(2, 4, 2, 4, 4) for _ in range(2)]
    maps = losses.Projections({"neg1": 4}, [{"neg1": 4}] * 2, kind="linear")

    def gradients(equal):
        maps.zero_grad()
        features = x.clone().requires_grad_()
        projected = maps("neg1", features, [(2, 4, 4)] * 2, weights if equal else None)
        each = torch.stack(
            [losses.feature_loss("mse")(s, y) for s, y in zip(projected, t, strict=True)], dim=1
        )
        if equal:
            loss, value = losses.equal_speed_loss(each, weights)
        else:
            loss = value = losses.weighted_sum(each, weights)
        loss.backward()
        return features.grad, [m.map.weight.grad.clone() for m in maps.maps["neg1"]], float(value.detach())

    student, _, value = gradients(equal=False)
    student_equal, projections, value_equal = gradients(equal=True)
    assert torch.allclose(student, student_equal, atol=1e-7)
    assert value == pytest.approx(value_equal)
    plain = losses.Projections({"neg1": 4}, [{"neg1": 4}] * 2, kind="linear")
    plain.load_state_dict(maps.state_dict())
    each = [
        losses.feature_loss("mse")(s, y) for s, y in zip(plain("neg1", x, [(2, 4, 4)] * 2), t, strict=True)
    ]
    (torch.stack(each, 1).mean(0).sum() / 2).backward()
    for got, module in zip(projections, plain.maps["neg1"], strict=True):
        assert torch.allclose(got, module.map.weight.grad, atol=1e-7)


@pytest.mark.parametrize("taps", [("neg1",), ("neg2",), ("neg1", "neg2")])
@pytest.mark.parametrize("kind", ["conv", "orthogonal"])
def test_every_choice_of_taps_trains_one_step_with_every_parameter_in_the_optimizer(taps, kind):
    torch.manual_seed(0)
    student, teacher = TinyUNet(features=(4, 6, 8)), TinyUNet(features=(6, 8, 10))
    maps = losses.Projections(student.feature_channels, [teacher.feature_channels], taps=taps, kind=kind)
    trained = [p for p in [*student.parameters(), *maps.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    before = [p.detach().clone() for p in maps.parameters()]
    image = torch.randn(1, 3, 2, 8, 8)
    with torch.no_grad():
        goal = teacher(image).features
    with torch.autocast("cpu", torch.bfloat16):
        output = student(image)
        projected = {name: maps(name, output.features[name], [goal[name].shape[2:]])[0] for name in taps}
    sum(losses.feature_loss("cosine")(projected[name], goal[name]).sum() for name in taps).backward()
    optimizer.step()
    assert all(p.grad is not None for p in maps.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, maps.parameters(), strict=True))


# -- balance ----------------------------------------------------------------------------------------


def test_the_balancer_divides_by_the_running_mean_after_its_warmup():
    balancer = losses.LossBalancer(momentum=0.5, warmup=1)
    first = balancer({"a": torch.tensor(3.0)})
    assert float(first["a"]) == 3.0
    assert balancer.means["a"] == 2.0
    second = balancer({"a": torch.tensor(4.0)})
    assert float(second["a"]) == pytest.approx(4.0 / 3.0)
    balancer({"a": torch.tensor(torch.nan)})
    assert balancer.means["a"] == 3.0
    other = losses.LossBalancer(momentum=0.5, warmup=1)
    other.load_state_dict(balancer.state_dict())
    assert other.state_dict() == balancer.state_dict()
    with pytest.raises(CheckpointError):
        other.load_state_dict({})
