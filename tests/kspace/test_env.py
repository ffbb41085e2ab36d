"""The environment: episodes, rewards, geometries, memory, and its view as a gymnasium environment."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO

from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.rl.env import BatchedEnv
from medrl.core.rl.rollout import RolloutBuffer
from medrl.plugins.kspace.cases import Cases, initial_lines, possible_lines
from medrl.plugins.kspace.coils import combine, expand
from medrl.plugins.kspace.env import KSpaceEnv
from medrl.plugins.kspace.fourier import fft2c, fft3c, ifft2c
from medrl.plugins.kspace.gym_env import LineGym
from medrl.plugins.kspace.imaging import Imaging, View
from medrl.plugins.kspace.models import CompactNet, ReconUNet
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.quality import ssim
from medrl.plugins.kspace.rewards import (
    Quality,
    Reward,
    asmr_reward,
    centred,
    delta_reward,
    label_quality,
    squash,
    terminal_reward,
)


def rec_reward(mode="delta"):
    return Reward(Quality(image_weight=1.0, label_weight=0.0, of_image="nmse"), mode=mode)


def random_lines(env, generator):
    return torch.multinomial(env.action_masks().float(), 1, generator=generator).squeeze(1)


def play(env, generator, steps=100):
    """Rewards ``(T, E)`` of one episode; 0 after an episode has ended."""
    rewards = []
    while len(rewards) < steps:
        _, reward, done, _, info = env.step(random_lines(env, generator))
        rewards.append(reward)
        if bool(done.all()):
            return torch.stack(rewards), info
        assert not bool(done.any())
    raise AssertionError("the episodes do not end")


# -- episodes --------------------------------------------------------------------------------------------


def test_ten_thousand_random_steps_keep_the_rules():
    width, envs = 20, 100
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, 4, width, generator=generator)
    padding = torch.zeros(7, width, dtype=torch.bool)
    padding[:, :2] = True
    padding[3:, -3:] = True
    cases = Cases(
        ids=tuple("abcdefg"),
        kspace=fft2c(images),
        target=images,
        labels=None,
        possible=possible_lines(7, width, indices=(1, 18), padding=padding),
        initial=initial_lines(7, width, 3, padding=padding),
    )
    env = KSpaceEnv(CaseObserver(cases), rec_reward(), num_envs=envs, budgets=range(1, 12), seed=5)
    assert isinstance(env, BatchedEnv)
    env.reset()
    start, taken, ended = env.mask.clone(), torch.zeros(envs, dtype=torch.int64), 0
    chosen = torch.zeros(envs, width, dtype=torch.int64)
    for _ in range(100):
        lines = random_lines(env, generator)
        assert not bool(padding[env.case].gather(1, lines[:, None]).any())
        observation, _, done, truncated, _ = env.step(lines)
        chosen.scatter_add_(1, lines[:, None], torch.ones(envs, 1, dtype=torch.int64))
        taken += 1
        assert not bool(truncated.any())
        assert torch.equal(done, taken == env.budget)
        assert torch.equal(observation["remaining"][:, 0], env.budget - taken)
        assert torch.equal(observation["taken"][:, 0], taken)
        assert torch.equal((env.mask & ~start).sum(dim=1), taken)
        assert int(chosen.max()) <= 1
        assert torch.equal(env.mask, start | (chosen > 0))
        if bool(done.any()):
            ended += int(done.sum())
            observation = env.reset(indices=torch.nonzero(done).flatten())
            assert torch.equal(observation["mask"][done], cases.initial[env.case[done]])
            start, taken = torch.where(done[:, None], env.mask, start), taken.masked_fill(done, 0)
            chosen[done] = 0
    assert ended > 500
    assert int(env.mask[:, [0, 19]].sum()) == 0
    measured = cases.measured(env.case, env.mask)
    assert torch.equal((measured.abs() > 0).any(dim=1), (measured.abs() > 0).all(dim=1))
    assert torch.equal((measured.abs() > 0).any(dim=1), env.mask)


@pytest.mark.parametrize(
    ("line", "why"), [(8, "acquired before"), (0, "acquired before or does not exist"), (16, "below 16")]
)
def test_illegal_lines_are_refused(make_cases, make_observer, line, why):
    padding = torch.zeros(4, 16, dtype=torch.bool)
    padding[:, 0] = True
    env = KSpaceEnv(make_observer(make_cases(padding=padding)), rec_reward(), num_envs=2, budgets=[3])
    with pytest.raises(RuntimeFault, match="nothing is under way"):
        env.step(torch.tensor([1, 2]))
    env.reset()
    before = env.mask.clone()
    with pytest.raises(RuntimeFault, match=why):
        env.step(torch.tensor([3, line]))
    assert torch.equal(env.mask, before)


def test_an_ended_episode_takes_no_step(make_cases, make_observer):
    env = KSpaceEnv(make_observer(make_cases()), rec_reward(), num_envs=2, budgets=[1])
    env.reset()
    done = env.step(torch.tensor([1, 2]))[2]
    assert done.tolist() == [True, True]
    env.reset(indices=torch.tensor([1]))
    with pytest.raises(RuntimeFault, match=r"episodes \[0\] have ended"):
        env.step(torch.tensor([3, 4]))


def test_budgets_are_each_episodes_own_or_common(make_cases, make_observer):
    observer = make_observer(make_cases())
    own = KSpaceEnv(observer, rec_reward(), num_envs=200, budgets=range(2, 7), seed=1)
    own.reset()
    assert sorted(set(own.budget.tolist())) == [2, 3, 4, 5, 6]
    common = KSpaceEnv(observer, rec_reward(), num_envs=20, budgets=range(2, 7), same_budget=True, seed=1)
    found = set()
    for _ in range(30):
        common.reset()
        assert len(set(common.budget.tolist())) == 1
        found.add(int(common.budget[0]))
    assert found == {2, 3, 4, 5, 6}


def test_repeats_share_case_and_budget_and_start_together(make_cases, make_observer):
    env = KSpaceEnv(
        make_observer(make_cases(9)), rec_reward(), num_envs=12, budgets=range(1, 9), repeats=3, seed=2
    )
    env.reset()
    for values in (env.case, env.budget):
        groups = values.view(4, 3)
        assert torch.equal(groups, groups[:, :1].expand(4, 3))
        assert len(set(groups[:, 0].tolist())) > 1
    kept = env.case.clone()
    env.reset(indices=torch.tensor([3, 4, 5]))
    assert torch.equal(env.case[[0, 1, 2, 6, 7, 8]], kept[[0, 1, 2, 6, 7, 8]])
    for wrong in ([3, 4], [2, 3, 4], [0, 1, 2, 3, 4, 6]):
        with pytest.raises(ConfigError, match="must start together"):
            env.reset(indices=torch.tensor(wrong))


def test_cases_are_drawn_by_their_weights(make_cases, make_observer):
    env = KSpaceEnv(
        make_observer(make_cases(), segmenter=None),
        rec_reward(),
        num_envs=4000,
        budgets=[1],
        weights=torch.tensor([0.0, 1.0, 1.0, 2.0]),
    )
    env.reset()
    share = torch.bincount(env.case, minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.0, 0.25, 0.25, 0.5]), atol=0.03, rtol=0)


def test_the_seed_fixes_cases_and_budgets(make_cases, make_observer):
    observer = make_observer(make_cases())
    drawn = []
    for seed in (1, 1, 2):
        env = KSpaceEnv(observer, rec_reward(), num_envs=16, budgets=range(1, 9))
        env.reset(seed=seed)
        drawn.append((env.case.tolist(), env.budget.tolist()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_given_cases_and_budgets_are_played(make_cases, make_observer):
    env = KSpaceEnv(make_observer(make_cases()), rec_reward(), num_envs=2, budgets=[3])
    observation = env.start(torch.tensor([3, 1]), torch.tensor([2, 5]))
    assert observation["case"].flatten().tolist() == [3, 1]
    assert observation["remaining"].flatten().tolist() == [2, 5]
    for cases, budgets in (([0], [1, 1]), ([0, 4], [1, 1]), ([0, 1], [0, 1]), ([0, 1], [1, 15])):
        with pytest.raises(ConfigError, match="are expected"):
            env.start(torch.tensor(cases), torch.tensor(budgets))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "0 environments"),
        ({"num_envs": 4, "repeats": 3}, "groups of 3"),
        ({"budgets": [0, 3]}, "0 to 3"),
        ({"budgets": [15]}, "leaves 14 lines"),
        ({"budgets": []}, "none"),
        ({"weights": torch.ones(3)}, "expected 4 numbers"),
        ({"weights": torch.zeros(4)}, "not all 0"),
        ({"observe": ["image"]}, "unknown image"),
    ],
)
def test_settings_without_a_meaning_are_refused(make_cases, make_observer, settings, message):
    arguments = {"num_envs": 2, "budgets": [3], **settings}
    with pytest.raises(ConfigError, match=message):
        KSpaceEnv(make_observer(make_cases()), rec_reward(), **arguments)


def test_a_reward_of_labels_needs_labels_and_a_network(make_cases, make_observer):
    cases = make_cases()
    with pytest.raises(ConfigError, match="segmentation network is needed"):
        KSpaceEnv(make_observer(cases, segmenter=None), delta_reward(), num_envs=1, budgets=[3])
    unlabelled = dataclasses.replace(cases, labels=None)
    with pytest.raises(ConfigError, match="labels are needed"):
        KSpaceEnv(make_observer(unlabelled), delta_reward(), num_envs=1, budgets=[3])
    with pytest.raises(DataError, match="labels"):
        Quality().truth(unlabelled, torch.tensor([0]))


# -- images and rewards ----------------------------------------------------------------------------------


def test_images_grow_line_by_line_as_the_full_transform_gives_them(make_cases, make_observer):
    cases = make_cases(size=24)
    env = KSpaceEnv(make_observer(cases), rec_reward(), num_envs=6, budgets=range(3, 20), observe=["zf"])
    generator = torch.Generator().manual_seed(0)
    observation = env.reset(seed=0)
    for _ in range(60):
        full = ifft2c(cases.measured(env.case, env.mask)).abs()
        torch.testing.assert_close(observation["zf"], full, atol=1e-5, rtol=0)
        observation, _, done, _, _ = env.step(random_lines(env, generator))
        if bool(done.any()):
            observation = env.reset(indices=torch.nonzero(done).flatten())


def test_differences_of_quality_add_up_to_the_gain_of_the_episode(make_cases, make_observer):
    observer = make_observer(make_cases())
    quality = Quality(image_weight=0.3, label_weight=0.7)
    env = KSpaceEnv(observer, Reward(quality), num_envs=5, budgets=[7])
    observation = env.reset(seed=3)
    truth = quality.truth(env.cases, env.case)
    first = quality.score(observer.view(env.case, observation["mask"]), truth).total
    rewards, info = play(env, torch.Generator().manual_seed(1))
    last = quality.score(observer.view(env.case, env.mask), truth).total
    torch.testing.assert_close(rewards.sum(dim=0), last - first, atol=1e-5, rtol=0)
    torch.testing.assert_close(info["quality"], last, atol=1e-5, rtol=0)
    assert float((last - first).abs().min()) > 1e-3


def test_weights_of_one_and_zero_reproduce_the_single_terms(make_cases, make_observer):
    observer = make_observer(make_cases())
    found = {}
    for name, weights in {"image": (1.0, 0.0), "labels": (0.0, 1.0), "both": (0.4, 0.6)}.items():
        reward = delta_reward(image_weight=weights[0], label_weight=weights[1])
        env = KSpaceEnv(observer, reward, num_envs=5, budgets=[4])
        env.reset(seed=0)
        found[name], _ = play(env, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found["both"], 0.4 * found["image"] + 0.6 * found["labels"], atol=1e-6, rtol=0)
    env.reset(seed=0)
    image = ifft2c(env.cases.measured(env.case, env.mask)).abs()
    before = ssim(image, env.cases.target[env.case])
    line = torch.tensor([1, 2, 3, 4, 5])
    only = KSpaceEnv(observer, delta_reward(image_weight=1.0, label_weight=0.0), num_envs=5, budgets=[4])
    only.reset(seed=0)
    reward = only.step(line)[1]
    after = ssim(ifft2c(only.cases.measured(only.case, only.mask)).abs(), only.cases.target[only.case])
    torch.testing.assert_close(reward, after - before, atol=1e-6, rtol=0)


def test_worked_numbers_of_the_rewards():
    reward = delta_reward()
    before = 0.5 * torch.tensor([0.50]) + 0.5 * torch.tensor([0.80])
    after = 0.5 * torch.tensor([0.55]) + 0.5 * torch.tensor([0.84])
    one, no = torch.tensor([1]), torch.tensor([False])
    assert float(reward.pay(before, after, one, no)) == pytest.approx(0.045, abs=1e-6)
    half = torch.log(torch.tensor([0.5]))
    assert float(squash(half)) == pytest.approx(-0.30190, abs=5e-6)
    original = asmr_reward()
    assert float(original.pay(before, half, torch.tensor([7]), no)) == 0.0
    assert float(original.pay(before, half, torch.tensor([8]), no)) == pytest.approx(-0.30190, abs=5e-6)
    last = terminal_reward()
    assert float(last.pay(before, after, one, no)) == 0.0
    assert float(last.pay(before, after, one, ~no)) == pytest.approx(0.695, abs=1e-6)


def test_quality_of_labels_is_a_mean_over_the_classes_that_are_there():
    truth = torch.zeros(3, 2, 4, dtype=torch.int64)
    truth[0, 0] = torch.tensor([1, 1, 2, 2])
    truth[1, 0] = 3
    logits = torch.full((3, 4, 2, 4), -30.0)
    guess = torch.zeros_like(truth)
    guess[0, 0] = torch.tensor([1, 2, 2, 2])
    guess[1, 0] = torch.tensor([3, 3, 1, 1])
    guess[2, 0] = 1
    logits.scatter_(1, guess.unsqueeze(1), 30.0)
    expected = torch.tensor([(2 / 3 + 4 / 5) / 2, 2 * 2 / 6, 0.0])
    for kind in ("dice", "soft_dice"):
        torch.testing.assert_close(label_quality(logits, truth, kind=kind), expected, atol=1e-5, rtol=0)
    flat = torch.zeros(3, 4, 2, 4)
    quarter = torch.log(torch.tensor(0.25))
    for kind in ("ce", "log_prob"):
        found = label_quality(flat, truth, kind=kind)
        torch.testing.assert_close(found, torch.stack([quarter, quarter, torch.tensor(0.0)]))


def test_slices_without_foreground_are_paid_nothing_for_labels_and_flagged(make_cases, make_observer):
    cases = make_cases()
    cases.labels[2] = 0
    for mode in ("delta", "asmr"):
        kind = "soft_dice" if mode == "delta" else "log_prob"
        reward = Reward(Quality(image_weight=0.0, label_weight=1.0, of_labels=kind), mode=mode)
        env = KSpaceEnv(make_observer(cases), reward, num_envs=2, budgets=[3])
        env.start(torch.tensor([2, 0]), torch.tensor([3, 3]))
        rewards, info = play(env, torch.Generator().manual_seed(0))
        assert info["no_foreground"].tolist() == [True, False]
        assert rewards[:, 0].tolist() == [0.0, 0.0, 0.0]
        assert bool((rewards[:, 1] != 0).any())


def test_rewards_at_the_end_pay_once_the_quality_of_the_last_mask(make_cases, make_observer):
    observer = make_observer(make_cases())
    env = KSpaceEnv(observer, terminal_reward(), num_envs=3, budgets=[4])
    env.reset(seed=1)
    rewards, _ = play(env, torch.Generator().manual_seed(0))
    assert rewards[:-1].abs().sum() == 0
    quality = env.reward.quality
    final = quality.score(observer.view(env.case, env.mask), quality.truth(env.cases, env.case))
    torch.testing.assert_close(rewards[-1], final.total, atol=1e-5, rtol=0)


def test_the_network_does_not_run_on_steps_that_are_paid_nothing(make_cases, make_observer):
    observer = make_observer(make_cases(), groups=None)
    calls = []
    observer.imaging.segmenter.register_forward_hook(lambda *_: calls.append(1))
    original = observer.imaging.segmenter.both
    observer.imaging.segmenter.both = lambda image: (calls.append(len(image)), original(image))[1]
    env = KSpaceEnv(observer, asmr_reward(delay=3), num_envs=2, budgets=[5])
    env.reset(seed=0)
    counts = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        reward = env.step(random_lines(env, generator))[1]
        counts.append(len(calls))
        assert bool((reward != 0).all()) == (len(counts) > 3)
    assert counts == [0, 0, 0, 1, 2]


def test_rewards_are_centred_within_the_episodes_of_a_case():
    rewards = torch.arange(12.0).view(2, 6)
    found = centred(rewards, 3)
    assert found.tolist() == [[-1, 0, 1, -1, 0, 1]] * 2
    assert centred(rewards, 1).abs().sum() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Quality(of_image="mse"),
        lambda: Quality(of_labels="iou"),
        lambda: Quality(image_weight=0.0, label_weight=0.0),
        lambda: Quality(image_weight=-1.0),
        lambda: Reward(Quality(), mode="sparse"),
        lambda: Reward(Quality(), mode="delta", delay=7),
    ],
)
def test_rewards_without_a_meaning_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_psnr_of_a_perfect_image_is_limited(make_cases):
    cases = make_cases()
    quality = Quality(image_weight=1.0, label_weight=0.0, of_image="psnr")
    index = torch.arange(4)
    found = quality.score(View(image=cases.target), quality.truth(cases, index))
    assert found.total.tolist() == [2.5] * 4


# -- geometries ------------------------------------------------------------------------------------------


def test_a_stack_has_one_mask_and_the_mean_quality_of_its_own_slices(make_cases, make_observer, volumes):
    slices = make_cases(5)
    stack = volumes(slices, {"long": [0, 1, 2], "short": [3, 4]})
    assert stack.kspace.shape == (2, 3, 16, 16)
    assert stack.slices.tolist() == [[True, True, True], [True, True, False]]
    observer = make_observer(stack)
    env = KSpaceEnv(observer, delta_reward(), num_envs=2, budgets=[4], observe=["columns", "seg_prob"])
    observation = env.start(torch.tensor([0, 1]), torch.tensor([4, 4]))
    assert env.observation_space.contains(
        {
            name: value[0].numpy().astype(env.observation_space[name].dtype)
            for name, value in observation.items()
        }
    )
    rewards, _ = play(env, torch.Generator().manual_seed(0))
    image = ifft2c(slices.measured(torch.tensor([3, 4]), env.mask[[1, 1]])).abs()
    each = ssim(image, slices.target[[3, 4]], data_range=slices.target[[3, 4]].max())
    only = Quality(image_weight=1.0, label_weight=0.0)
    found = only.score(observer.view(env.case, env.mask), only.truth(stack, env.case)).total[1]
    torch.testing.assert_close(found, each.mean(), atol=1e-5, rtol=0)
    dice = Quality(image_weight=0.0, label_weight=1.0, of_labels="dice")
    view = observer.view(env.case, env.mask)
    guess = view.logits.argmax(dim=1)[1, :2]
    truth = slices.labels[[3, 4]].long()
    volumetric = [
        2 * float(((guess == k) & (truth == k)).sum()) / float((guess == k).sum() + (truth == k).sum())
        for k in (1, 2, 3)
    ]
    score = dice.score(view, dice.truth(stack, env.case)).total[1]
    assert float(score) == pytest.approx(sum(volumetric) / 3, abs=1e-5)
    assert bool((rewards.abs().sum(dim=0) > 0).all())


def test_lines_and_points_of_a_volume_grow_as_its_full_transform(make_cases, make_observer, volumes):
    slices = make_cases(4)
    groups = {"one": [0, 1, 2, 3]}
    image = ifft2c(slices.kspace).unsqueeze(0)
    for points, actions in ((False, 16), (True, 64)):
        volume = volumes(slices, groups, geometry="volume3d", points=points)
        torch.testing.assert_close(volume.kspace, fft3c(image), atol=1e-5, rtol=0)
        assert volume.actions == actions
        observer = make_observer(volume, segmenter=None)
        env = KSpaceEnv(observer, rec_reward(), num_envs=2, budgets=[6], observe=["zf"])
        env.reset(seed=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            observation = env.step(random_lines(env, generator))[0]
        full = observer.imaging.reconstruct(volume, env.case, env.mask).abs()
        torch.testing.assert_close(observation["zf"], full, atol=1e-5, rtol=0)
        lines = (volume.measured(env.case, env.mask).abs() > 0).any(dim=-2)
        expected = env.mask.view(2, -1, 16).expand(2, 4, 16)
        assert torch.equal(lines & expected, lines)
        assert int(lines.sum()) == int(expected.sum())


def test_empty_slices_of_a_volume_do_not_count(make_cases, make_observer, volumes):
    groups = {"a": [0, 1, 2], "b": [3, 4]}
    cases = volumes(make_cases(5), groups, geometry="volume3d", points=True)
    observer = make_observer(cases, segmenter=None)
    quality = Quality(image_weight=1.0, label_weight=0.0)
    index = torch.arange(2)
    view = observer.view(index, cases.initial)
    reach = float(cases.target[1].max())
    expected = ssim(view.magnitude[1, :2], cases.target[1, :2], data_range=reach).mean()
    truth = quality.truth(cases, index)
    torch.testing.assert_close(quality.score(view, truth).total[1], expected, atol=1e-5, rtol=0)
    twice = truth.select(torch.tensor([1, 1, 0]))
    found = quality.score(view.select(torch.tensor([1, 1, 0])), twice).total
    torch.testing.assert_close(found[:2], expected.expand(2), atol=1e-5, rtol=0)
    truth.put(torch.tensor([0]), quality.truth(cases, torch.tensor([1])))
    found = quality.score(view.select(torch.tensor([1, 1])), truth).total
    torch.testing.assert_close(found, expected.expand(2), atol=1e-5, rtol=0)


def test_a_volume_is_segmented_by_a_network_of_three_dimensions(make_cases, make_observer, volumes):
    from medrl.plugins.kspace.models import UNet

    volume = volumes(make_cases(4), {"one": [0, 1, 2, 3]}, geometry="volume3d")
    observer = make_observer(volume, segmenter=UNet(base=2, spatial_dims=3), groups=None)
    env = KSpaceEnv(observer, delta_reward(), num_envs=1, budgets=[2], observe=["seg_prob"])
    observation = env.reset(seed=0)
    assert observation["seg_prob"].shape == (1, 4, 4, 16, 16)
    rewards, _ = play(env, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(rewards).all())


def test_coils_with_unit_sensitivity_equal_one_channel(make_cases, make_observer):
    single = make_cases()
    double = dataclasses.replace(
        single,
        kspace=single.kspace.unsqueeze(1),
        coils=True,
        sensitivities=torch.ones_like(single.kspace).unsqueeze(1),
    )
    found = []
    for cases in (single, double):
        env = KSpaceEnv(make_observer(cases), delta_reward(), num_envs=3, budgets=[5])
        env.reset(seed=4)
        found.append(play(env, torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("reconstruction", ["zf", "sense", "unet"])
def test_several_coils_share_a_mask_and_a_full_one_gives_the_image(make_cases, reconstruction):
    single = make_cases(3)
    line = torch.linspace(0.2, 1, 16)
    maps = torch.stack([line.expand(16, 16), (1.2 - line).expand(16, 16)]).to(torch.complex64)
    maps = (maps / maps.abs().square().sum(dim=0).sqrt()).expand(3, 2, 16, 16).contiguous()
    image = ifft2c(single.kspace)
    cases = dataclasses.replace(single, kspace=fft2c(expand(image, maps)), coils=True, sensitivities=maps)
    torch.testing.assert_close(combine(ifft2c(cases.kspace), maps), image, atol=1e-5, rtol=0)
    network = ReconUNet(base=2, levels=1) if reconstruction == "unet" else reconstruction
    imaging = Imaging(reconstruction=network)
    everything = torch.ones(3, 16, dtype=torch.bool)
    full = imaging.reconstruct(cases, torch.arange(3), everything)
    torch.testing.assert_close(full, image, atol=2e-3 if reconstruction == "sense" else 1e-5, rtol=0)
    env = KSpaceEnv(CaseObserver(cases, imaging), rec_reward(), num_envs=2, budgets=[14])
    env.reset(seed=0)
    rewards, info = play(env, torch.Generator().manual_seed(0))
    assert bool((info["quality"] > -1e-4).all())
    torch.testing.assert_close(rewards.sum(dim=0) > 0, torch.tensor([True, True]))


def test_coils_without_sensitivities_are_combined_by_root_sum_of_squares(make_cases):
    single = make_cases(2)
    cases = dataclasses.replace(
        single, kspace=torch.stack([0.6 * single.kspace, 0.8j * single.kspace], dim=1), coils=True
    )
    env = KSpaceEnv(CaseObserver(cases), rec_reward(), num_envs=2, budgets=[3], observe=["zf", "kspace"])
    observation = env.start(torch.tensor([0, 1]), torch.tensor([3, 3]))
    expected = ifft2c(single.measured(env.case, env.mask)).abs()
    torch.testing.assert_close(observation["zf"], expected, atol=1e-5, rtol=0)
    assert observation["kspace"].shape == (2, 2, 16, 16, 2)
    for kind in ("sense", ReconUNet(base=2, levels=1)):
        with pytest.raises(ConfigError, match="sensitivities"):
            Imaging(reconstruction=kind).reconstruct(cases, env.case, env.mask)


# -- cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"target": torch.zeros(4, 8, 16)}, DataError),
        ({"labels": torch.zeros(3, 16, 16)}, DataError),
        ({"possible": torch.ones(4, 15, dtype=torch.bool)}, DataError),
        ({"coils": True}, DataError),
        ({"geometry": "volume"}, ConfigError),
        ({"points": True}, ConfigError),
        ({"possible": torch.zeros(4, 16, dtype=torch.bool)}, ConfigError),
        ({"initial": torch.ones(4, 16, dtype=torch.bool)}, ConfigError),
    ],
)
def test_cases_that_do_not_fit_are_refused(make_cases, change, kind):
    with pytest.raises(kind):
        dataclasses.replace(make_cases(), **change)


def test_sampled_indices_are_inclusive(make_cases):
    assert possible_lines(1, 400, indices=(33, 367)).sum() == 335
    assert possible_lines(1, 400, indices=(40, 359)).sum() == 320
    assert possible_lines(1, 256, indices=(0, 255)).sum() == 256
    with pytest.raises(ConfigError, match="sampled_indices"):
        possible_lines(1, 16, indices=(3, 16))
    assert make_cases(indices=(2, 9)).fewest == 8 - 2


def test_line_energies_add_up_to_the_energy_of_the_case(make_cases, volumes):
    slices = make_cases(4)
    points = volumes(slices, {"one": [0, 1, 2, 3]}, geometry="volume3d", points=True)
    for cases in (slices, points):
        total = cases.kspace.abs().square().flatten(1).sum(dim=1)
        torch.testing.assert_close(cases.line_energy.sum(dim=1), total)
    at = points.kspace[0, 1, :, 5].abs().square().sum()
    torch.testing.assert_close(points.line_energy[0, 1 * 16 + 5], at)


def test_selected_cases_are_those_of_their_numbers(make_cases):
    cases = make_cases()
    some = cases.select([2, 0])
    assert some.ids == ("case2", "case0")
    assert torch.equal(some.kspace, cases.kspace[[2, 0]])
    assert torch.equal(some.labels, cases.labels[[2, 0]])


# -- memory and resumption -------------------------------------------------------------------------------


def test_rollouts_of_128_episodes_and_72_steps_at_256_columns_need_less_than_50_megabytes():
    envs, steps, width = 128, 72, 256
    images = torch.rand(2, 1, width)
    cases = Cases(
        ids=("a", "b"),
        kspace=fft2c(images),
        target=images,
        labels=None,
        possible=possible_lines(2, width),
        initial=initial_lines(2, width, 8),
    )
    env = KSpaceEnv(CaseObserver(cases), rec_reward(), num_envs=envs, budgets=range(5, 51))
    observation = env.reset()
    zero = torch.zeros(envs)
    no = zero.bool()
    buffer = RolloutBuffer(steps)
    buffer.add(observation, zero.long(), zero, zero, zero, no, no, masks=env.action_masks())
    stored = [
        *buffer["observations"].values(),
        *(buffer[name] for name in buffer._data if name != "observations"),
    ]
    whole = sum(value.untyped_storage().nbytes() for value in stored)
    assert all(value.untyped_storage().nbytes() >= steps * envs * value.element_size() for value in stored)
    assert whole < 50e6
    assert whole == envs * steps * 562


def test_after_a_refresh_everything_follows_from_the_state(make_cases, make_observer):
    def run(env, generator):
        found = []
        for _ in range(12):
            lines = random_lines(env, generator)
            observation, reward, done, _, _ = env.step(lines)
            if bool(done.any()):
                observation = env.reset(indices=torch.nonzero(done).flatten())
            found += [reward, observation["columns"], observation["mask"]]
        return found

    def build():
        return KSpaceEnv(
            make_observer(make_cases()), delta_reward(), num_envs=6, budgets=range(2, 7), observe=["columns"]
        )

    env = build()
    env.reset(seed=9)
    run(env, torch.Generator().manual_seed(1))
    first = env.refresh()
    state = env.state_dict()
    expected = run(env, torch.Generator().manual_seed(2))
    other = build()
    other.load_state_dict(state)
    again = other.refresh()
    assert all(torch.equal(first[name], again[name]) for name in first)
    found = run(other, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("make_reward", [delta_reward, terminal_reward])
def test_advancing_is_a_step_and_a_reset_of_what_ended(make_cases, make_observer, make_reward):
    def run(advance: bool):
        env = KSpaceEnv(
            make_observer(make_cases()), make_reward(), num_envs=5, budgets=range(1, 4), observe=["columns"]
        )
        env.reset(seed=3)
        generator, found = torch.Generator().manual_seed(1), []
        for _ in range(8):
            lines = random_lines(env, generator)
            if advance:
                observation, reward, done = env.advance(lines)
            else:
                observation, reward, done, _, _ = env.step(lines)
                if bool(done.any()):
                    observation = env.reset(indices=torch.nonzero(done).flatten())
            found.append({**observation, "reward": reward, "done": done})
        return found

    for own, expected in zip(run(advance=True), run(advance=False), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert any(bool(one["done"].any()) and not bool(one["done"].all()) for one in run(advance=True))


def test_observations_do_not_change_when_the_environment_goes_on(make_cases, make_observer):
    env = KSpaceEnv(
        make_observer(make_cases()),
        delta_reward(),
        num_envs=2,
        budgets=[5],
        observe=["columns", "zf", "kspace", "seg_prob"],
    )
    observation = env.reset(seed=0)
    kept = {name: value.clone() for name, value in observation.items()}
    env.step(torch.tensor([1, 2]))
    env.step(torch.tensor([3, 4]))
    assert all(torch.equal(kept[name], observation[name]) for name in kept)


# -- gymnasium -------------------------------------------------------------------------------------------


@pytest.fixture
def single_env(make_cases, make_observer):
    observer = make_observer(make_cases())
    return KSpaceEnv(observer, delta_reward(), num_envs=1, budgets=[4], observe=["zf", "columns"])


@pytest.mark.filterwarnings("ignore:.*Box observation space.*infinity")
@pytest.mark.filterwarnings("error")
def test_one_acquisition_passes_the_checker_of_gymnasium(single_env):
    check_env(LineGym(single_env), skip_render_check=True)


def test_the_adapter_acquires_the_nearest_line_that_is_possible(single_env):
    env = LineGym(single_env)
    observation, _ = env.reset(seed=0)
    assert "case" not in observation
    assert env.action_masks()[[6, 7, 8, 9]].tolist() == [True, False, False, True]
    info = env.step(7)[4]
    assert info["line"] == 6
    assert env.step(8)[4]["line"] == 9
    assert env.step(0)[4]["line"] == 0
    assert env.step(0)[2]


def test_stable_baselines3_learns_a_few_steps_on_lines(single_env):
    model = PPO(
        "MultiInputPolicy", LineGym(single_env), n_steps=16, batch_size=8, n_epochs=1, seed=0, device="cpu"
    )
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(16)
    assert model.num_timesteps == 16
    after = model.policy.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_imaging_in_parts_equals_imaging_at_once(make_cases):
    cases = make_cases()
    network = CompactNet(widths=(4, 6)).eval()
    index, mask = torch.arange(4), cases.initial
    whole = Imaging(network).look(ifft2c(cases.measured(index, mask)), cases, gradient=True)
    parts = Imaging(network, pixels=300, channels_last=True).look(
        ifft2c(cases.measured(index, mask)), cases, gradient=True
    )
    for name in ("logits", "prediction", "deep", "gradient"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), atol=1e-5, rtol=1e-4)
    assert whole.gradient.abs().sum() > 0
    assert not whole.logits.requires_grad
