"""Policies and critics: distributions, frozen statistics, references, shrink and perturb, learning."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from medrl.core.adaptation.actors import (
    BinaryActor,
    CategoricalActor,
    Critic,
    build_actor,
    logits_of,
    out_channels,
    recalibrate,
    shrink_and_perturb,
)
from medrl.core.errors import ConfigError
from medrl.core.rl.pixelwise import PixelwisePPOConfig, plain_steps, rollout, update
from medrl.plugins.rl4seg.models import ResNet18, SmallUNet, UNet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(labels=3, seed=0, inputs=1):
    torch.manual_seed(seed)
    return SmallUNet(in_channels=inputs, out_channels=labels, channels=(4, 8))


def warmed(actor, seed=1):
    """Give batch normalisations statistics that differ from those of any batch."""
    actor.network.train()
    with torch.no_grad():
        for index in range(3):
            actor.network(torch.rand(4, 1, 16, 16, generator=generator(seed + index)) * 2)
    actor.train()
    return actor


def actor_of(labels=3, bn_mode="eval", seed=0):
    return warmed(CategoricalActor(small(labels, seed), classes=labels, bn_mode=bn_mode))


def images(count=4, size=(16, 16), seed=3):
    return torch.rand(count, 1, *size, generator=generator(seed))


def bright(actions, rows):
    return (actions == (rows[:, 0] > 0.5).long()).float()


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def train(actor, reference, critic, *, batches=2, config=None, lr=0.01):
    config = config or PixelwisePPOConfig(kl=0.05, entropy=0.01)
    parts = {"actor": actor, "critic": critic} if critic is not None else {"actor": actor}
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=lr) for name, part in parts.items()}
    draws, stats = generator(), []
    for _ in range(batches):
        batch = rollout(actor, reference, images(), bright, config, generator=draws)
        stats.append(update(actor, critic, batch, config, step=plain_steps(optimizers, {"actor": 0.5})))
    return stats


# -- policies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [2, 3, 4, 5])
def test_a_categorical_actor_draws_labels_for_images_of_any_size(labels):
    actor, batch = actor_of(labels), images(2, (100, 70))
    actions, log_probs = actor.act(batch, generator=generator(), sigma_px=2.0)
    assert actions.shape == log_probs.shape == (2, 100, 70)
    assert actions.dtype == torch.int64
    assert int(actions.max()) < labels
    again, entropy = actor.evaluate(batch, actions)
    assert torch.equal(again.detach(), log_probs)
    assert bool(((entropy >= 0) & (entropy <= math.log(labels) + 1e-6)).all())
    torch.testing.assert_close(actor.probabilities(batch).sum(dim=1), torch.ones(2, 100, 70))
    assert torch.equal(actor.greedy(batch), actor.log_probs(batch).argmax(dim=1))


def test_a_binary_actor_is_the_sigmoid_of_one_channel():
    actor = warmed(BinaryActor(small(1)))
    batch = images(2)
    logits = actor.logits(batch)[:, 0]
    torch.testing.assert_close(actor.probabilities(batch)[:, 1], torch.sigmoid(logits))
    assert torch.equal(actor.greedy(batch), (logits > 0).long())
    actions, log_probs = actor.act(batch, generator=generator())
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(actions.float())
    torch.testing.assert_close(log_probs, expected)


def test_actors_are_built_by_kind():
    assert isinstance(build_actor(small(3), classes=3), CategoricalActor)
    assert isinstance(build_actor(small(1), classes=2, kind="binary"), BinaryActor)
    assert (out_channels("binary", 2), out_channels("categorical", 4)) == (1, 4)
    with pytest.raises(ConfigError, match="3 classes"):
        build_actor(small(1), classes=3, kind="binary")
    with pytest.raises(ConfigError, match="unknown"):
        build_actor(small(1), classes=2, kind="continuous")
    with pytest.raises(ConfigError, match="bn_mode"):
        build_actor(small(3), classes=3, bn_mode="train")
    with pytest.raises(ConfigError, match="1 classes"):
        CategoricalActor(small(1), classes=1)


def test_a_network_with_other_channels_is_named():
    with pytest.raises(ConfigError, match=r"(?s)3 channels.*4 are needed"):
        CategoricalActor(small(3), classes=4).greedy(images())
    with pytest.raises(ConfigError, match=r"(?s)3 channels.*1 are needed"):
        Critic(small(3))(images())


def test_networks_that_return_several_resolutions_are_read_at_the_first():
    logits = torch.zeros(1, 3, 4, 4)
    assert logits_of(logits) is logits
    assert logits_of([logits, torch.zeros(1)]) is logits
    assert logits_of(([logits, torch.zeros(1)], {"neg1": torch.zeros(1)})) is logits
    with pytest.raises(ConfigError, match="dict"):
        logits_of({"logits": logits})


def test_a_network_of_another_plugin_can_be_an_actor():
    from medrl.core.manager import PluginManager

    manager = PluginManager.create(third_party=False)
    network = manager.registry("models").build("graft.tiny", in_channels=1, out_channels=3, features=[4, 8])
    actor = CategoricalActor(network, classes=3)
    volume = torch.rand(1, 1, 4, 16, 16, generator=generator())
    batch = rollout(
        actor,
        actor.frozen(),
        volume,
        lambda actions, rows: (actions == 1).float(),
        PixelwisePPOConfig(baseline="constant"),
        generator=generator(),
    )
    assert batch.actions.shape == (1, 4, 16, 16)


def test_critics_give_a_map_or_one_value_in_the_unit_interval():
    batch = images(3)
    value_map = Critic(small(1))(batch)
    assert value_map.shape == (3, 16, 16)
    single = Critic(ResNet18())(batch)
    assert single.shape == (3, 1, 1)
    for values in (value_map, single):
        assert bool(((values >= 0) & (values <= 1)).all())


def test_a_critic_of_one_value_learns_the_mean_reward_of_the_image():
    actor, critic = actor_of(2), Critic(ResNet18())
    stats = train(actor, actor.frozen(), critic, batches=2)
    assert all(math.isfinite(item.critic_loss) for item in stats)
    assert stats[-1].critic_loss < 0.25


# -- statistics and references ------------------------------------------------------------------------


def test_frozen_statistics_survive_training_and_ratios_begin_at_one():
    actor = actor_of()
    before = {name: value for name, value in state(actor).items() if "running" in name or "num_" in name}
    assert before
    stats = train(actor, actor.frozen(), Critic(small(1)), batches=2)
    after = {name: value for name, value in state(actor).items() if name in before}
    assert same(before, after)
    assert actor.training
    assert [item.ratio_error for item in stats] == [0.0, 0.0]
    assert stats[0].kl == 0.0
    assert stats[1].kl > 0.0


def test_ratios_begin_at_one_without_the_kept_graph_at_any_batch_size():
    for count in (1, 3):
        actor = actor_of()
        config = PixelwisePPOConfig(baseline="constant", inner_steps=1)
        batch = rollout(
            actor,
            actor.frozen(),
            images(count),
            bright,
            config,
            generator=generator(),
            keep_graph=False,
        )
        optimizer = torch.optim.Adam(actor.parameters())
        stats = update(actor, None, batch, config, step=plain_steps({"actor": optimizer}))
        assert (stats.ratio_error, stats.ratio, stats.kl) == (0.0, 1.0, 0.0)


def test_batch_statistics_follow_the_batches_if_asked():
    actor = actor_of(bn_mode="batch")
    norm = next(module for module in actor.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    actor.train()
    actor.log_probs(images())
    assert not torch.equal(before, norm.running_mean)
    actor.eval()
    kept = norm.running_mean.clone()
    actor.log_probs(images())
    assert torch.equal(kept, norm.running_mean)


@pytest.mark.parametrize("bn_mode", ["eval", "batch"])
def test_the_reference_stays_bit_identical(bn_mode):
    actor = actor_of(bn_mode=bn_mode)
    reference = actor.frozen()
    before, own = state(reference), state(actor)
    train(actor, reference, Critic(small(1)))
    reference.train()
    reference.log_probs(images())
    assert same(before, state(reference))
    assert not same(own, state(actor))
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in actor.parameters())


def test_a_reference_of_batch_statistics_equals_the_actor_that_it_copies():
    actor = actor_of(bn_mode="batch")
    reference = actor.frozen()
    assert torch.equal(actor.log_probs(images()), reference.log_probs(images()))
    assert not torch.equal(actor.eval().log_probs(images()), reference.log_probs(images()))


# -- shrink and perturb -------------------------------------------------------------------------------


def test_shrinking_halves_weights_and_leaves_biases_and_statistics():
    actor = actor_of()
    before = state(actor)
    shrink_and_perturb(actor, factor=0.5, std=0.0)
    for name, value in state(actor).items():
        halved = name.endswith("weight")
        assert torch.equal(value, before[name] * 0.5 if halved else before[name])
    assert sum(name.endswith("weight") for name in before) > 10


def test_perturbing_adds_noise_of_its_own_stream():
    first = UNet(init_channels=4)
    second = copy.deepcopy(first)
    before, stream = state(first), torch.get_rng_state()
    for network in (first, second):
        shrink_and_perturb(network, generator=generator(5))
    assert same(state(first), state(second))
    assert torch.equal(stream, torch.get_rng_state())
    noise = torch.cat(
        [
            (value - 0.5 * before[name]).flatten()
            for name, value in state(first).items()
            if name.endswith("weight")
        ]
    )
    assert float(noise.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(noise.mean())) < 4 * 0.01 / math.sqrt(noise.numel())
    with pytest.raises(ConfigError, match="factor"):
        shrink_and_perturb(first, factor=1.5)


def test_recalibrated_statistics_are_the_means_over_all_batches():
    actor = actor_of()
    first = next(module for module in actor.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    handle = first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    recalibrate(actor, [images(4, seed=1), images(4, seed=2)])
    handle.remove()
    mean = torch.stack([maps.mean(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, mean)
    assert first.momentum == 0.1
    assert actor.training
    assert not first.training, "the actor's statistics are frozen again"


# -- learning -----------------------------------------------------------------------------------------


def blobs(count, seed, gain=1.0):
    """Images of bright discs in noise and the discs themselves."""
    draws = generator(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    centres = 5 + 6 * torch.rand(count, 2, 1, 1, generator=draws)
    masks = ((grid - centres).square().sum(dim=1) < 4.0**2).long()
    noise = 0.1 * torch.randn(count, 1, 16, 16, generator=draws)
    return gain * (0.6 * masks[:, None] + 0.2 + noise), masks


def dice(first, second):
    return float(2 * (first * second).sum() / (first.sum() + second.sum()))


@pytest.mark.parametrize("kind", ["categorical", "binary"])
def test_a_true_reward_adapts_an_actor_to_darker_images(kind):
    torch.manual_seed(0)
    actor = build_actor(SmallUNet(out_channels=out_channels(kind, 2), channels=(8, 16)), classes=2, kind=kind)
    source, masks = blobs(64, 1)
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.01)
    actor.network.train()
    for start in range(0, 64 * 4, 16):
        chosen = slice(start % 64, start % 64 + 16)
        loss = -actor.log_probs(source[chosen]).gather(1, masks[chosen][:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    actor.train()
    target, truth = blobs(64, 2, gain=0.45)
    before = dice(actor.greedy(target), truth)

    config = PixelwisePPOConfig(baseline="constant", inner_steps=3, kl=0.02, sigma_px=1.0)
    reference, draws = actor.frozen(), generator()
    step = plain_steps({"actor": torch.optim.Adam(actor.parameters(), lr=3e-3)}, {"actor": 0.5})
    for start in range(0, 64 * 8, 16):
        chosen = slice(start % 64, start % 64 + 16)
        batch = rollout(
            actor,
            reference,
            target[chosen],
            lambda actions, _rows, chosen=chosen: (actions == truth[chosen]).float(),
            config,
            generator=draws,
        )
        update(actor, None, batch, config, step=step)
    after = dice(actor.greedy(target), truth)
    assert after > before + 0.3
    assert after > 0.9
