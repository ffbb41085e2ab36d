"""Networks of policies, and what they read."""

from __future__ import annotations

import inspect

import pytest
import torch

from medrl.core.config import ModelConfig
from medrl.core.errors import ConfigError
from medrl.plugins.spars.agent import CompactAgent, ConvAgent, FaithfulAgent, Sighted, build_agent
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.lattice import Lattice
from medrl.plugins.spars.observer import GLIMPSE, Observer, glimpses
from medrl.plugins.spars.rewards import SignReward


def agents(table):
    observer = Observer.of(table, view_size=(8, 8, 6))
    return [
        Sighted(CompactAgent(16), observer),
        Sighted(ConvAgent((8, 8, 6), channels=(4, 8), width=16), observer),
        Sighted(FaithfulAgent((8, 8, 8), width=8), observer),
    ]


def test_the_network_of_the_original_has_1509958343_parameters_at_full_size():
    with torch.device("meta"):
        agent = FaithfulAgent((256, 256, 180))
    assert sum(weights.numel() for weights in agent.parameters()) == 1_509_958_343


def test_a_glimpse_holds_means_and_deviations_of_boxes_about_the_window():
    volume = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0))
    lattice = Lattice.of(volume.shape, (6, 6, 6), 3)
    found = glimpses(volume, lattice)
    assert found.shape == (lattice.size, GLIMPSE)
    number = int(lattice.flat(torch.tensor([3, 2, 4])))
    x, y, z = lattice.corner(torch.tensor([3, 2, 4])).tolist()
    inner = volume[x : x + 6, y : y + 6, z : z + 6].unfold(0, 2, 2).unfold(1, 2, 2).unfold(2, 2, 2)
    boxes = inner.reshape(27, 8)
    assert torch.allclose(found[number, :27], boxes.mean(dim=1), atol=1e-6)
    assert torch.allclose(found[number, 81:], boxes.std(dim=1, correction=0), atol=1e-5)
    wide = volume[x - 3 : x + 9, y - 3 : y + 9, z - 3 : z + 9].unfold(0, 4, 4).unfold(1, 4, 4).unfold(2, 4, 4)
    assert torch.allclose(found[number, 27:54], wide.reshape(27, 64).mean(dim=1), atol=1e-6)
    # At a corner of the volume, boxes outside are 0.
    assert not found[0, 54:55].any()
    assert bool((found[0, :27] > 0).all())


def test_the_view_shows_the_volume_and_the_window_in_it(make_table):
    table = make_table(volumes=[torch.rand(24, 24, 12)], stride=2)
    observer = Observer.of(table, view_size=(6, 6, 3))
    case, node = torch.zeros(1, dtype=torch.int64), torch.tensor([[1, 2, 0]])
    view = observer.view(case, node)[0]
    assert torch.allclose(view[0, 0, 0, 0], table.volumes[0][:4, :4, :4].mean(), atol=1e-6)
    # The window covers voxels 2 to 9, 4 to 11 and 0 to 7 of cells of 4 voxels.
    assert view[1, :, 1, 0].tolist() == [0.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert float(view[1].sum()) * 64 == pytest.approx(512.0)
    window = observer.window(case, node)
    assert torch.equal(window[0, 0], table.volumes[0][2:10, 4:12, 0:8])
    large = Observer.of(table, window_size=(16, 16, 16)).window(case, node)
    assert torch.equal(large[0, 0, ::2, ::2, ::2], window[0, 0])


def test_views_are_floats_and_rise_with_the_volume(make_table):
    dim, bright = torch.full((24, 24, 16), 0.2), torch.full((24, 24, 16), 0.9)
    observer = Observer.of(make_table(volumes=[dim, bright]))
    case, node = torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.int64)
    for found in (observer.view(case, node)[:, 0], observer.window(case, node), observer.glimpse(case, node)):
        assert found.dtype == torch.float32
        assert bool((found[1] >= found[0]).all())
    assert float(observer.view(case, node)[1, 0].max()) == pytest.approx(0.9)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_agent_gives_legal_moves_and_gradients(make_table, number):
    table = make_table()
    policy = agents(table)[number]
    env = HuntEnv(table, SignReward(), num_envs=6)
    observation = env.reset()
    masks = env.action_masks()
    actions, log_probs, values = policy.act(observation, masks, torch.Generator().manual_seed(0))
    assert bool(masks.gather(1, actions.unsqueeze(1)).all())
    again, entropy, _ = policy.evaluate_actions(observation, actions, masks)
    assert torch.allclose(again, log_probs, atol=1e-6)
    assert torch.equal(policy.value(observation), values)
    loss = again.sum() + entropy.sum() + policy.evaluate_actions(observation, actions, masks)[2].sum()
    loss.backward()
    assert all(weights.grad is not None for weights in policy.agent.parameters())
    likeliest, _, _ = policy.act_with(observation, masks, torch.zeros(6, 6))
    assert torch.equal(
        likeliest, policy.agent(policy.observer.seen(observation, policy.agent.needs), masks)[0].argmax(1)
    )


def test_scales_of_glimpses_are_learned_and_kept(make_table):
    table = make_table()
    observer = Observer.of(table)
    agent = CompactAgent(8)
    agent.fit_scales(observer)
    every = torch.cat([observer.glimpses(index) for index in range(3)])
    scaled = (every - agent.mean) * agent.scale
    wide = every.std(dim=0) > 2e-3
    assert torch.allclose(scaled[:, wide].mean(dim=0), torch.zeros(int(wide.sum())), atol=1e-3)
    assert torch.allclose(scaled[:, wide].std(dim=0), torch.ones(int(wide.sum())), atol=2e-2)
    other = CompactAgent(8)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.mean, agent.mean)


def test_place_and_trail_can_be_hidden(make_table):
    table = make_table()
    env = HuntEnv(table, SignReward(), num_envs=1, tau=None)
    env.begin(torch.zeros(1, dtype=torch.int64), torch.tensor([[[1, 1, 1], [3, 3, 2]]]))
    observer = Observer.of(table)
    blind = CompactAgent(8, trail=False, place=False)
    seen = dict(observer.seen(env.observation(), "features"))
    before = blind(seen)[0]
    seen["state"] = seen["state"] + torch.tensor([1.0] * 6 + [0.0] + [1.0] * 10)
    assert torch.equal(blind(seen)[0], before)
    seen["state"] = seen["state"] + 1.0
    assert not torch.equal(blind(seen)[0], before)


def test_networks_are_built_for_what_the_observer_gives(make_table):
    class Manager:
        def registry(self, kind):
            assert kind == "agents"
            return self

        def fit(self, key, offered, **params):
            made = {"conv": ConvAgent, "mlp": FaithfulAgent, "other": torch.nn.Linear}[key]
            taken = inspect.signature(made).parameters
            return made(**{k: v for k, v in offered.items() if k in taken} | params)

    observer = Observer.of(make_table(), view_size=(8, 8, 6), window_size=(4, 4, 4))
    conv = build_agent(ModelConfig(name="conv", width=7), Manager(), observer)
    assert conv.policy.in_features == 7
    assert build_agent(ModelConfig(name="mlp"), Manager(), observer).actor[0].in_features == 64
    with pytest.raises(ConfigError, match="does not move windows"):
        build_agent(ModelConfig(name="other", in_features=1, out_features=1), Manager(), observer)
    with pytest.raises(ConfigError, match="width"):
        CompactAgent(0)
