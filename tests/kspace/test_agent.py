"""Agents: sizes, the complex convolution, distributions, ratios before the first step, and what is seen."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from medrl.core.checkpoint import load_into
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.rl.ppo import PPOConfig, ppo_update
from medrl.core.rl.rollout import Collector, RolloutBuffer
from medrl.plugins.kspace.agent import ColumnAgent, FaithfulAgent, FeatureScale, FFTConv, Sighted
from medrl.plugins.kspace.env import KSpaceEnv
from medrl.plugins.kspace.features import BLIND, ColumnFeatures
from medrl.plugins.kspace.fourier import fft2c, fftc
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.policies import observation_of
from medrl.plugins.kspace.rewards import Quality, Reward, delta_reward


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def column_agent(observer, **settings):
    features = observer.features
    return ColumnAgent(
        **{
            "actions": observer.cases.actions,
            "features": len(features.names),
            "pooled": len(features.pooled_names),
            "width": 8,
            "blind": features.blind,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def faithful():
    torch.manual_seed(0)
    return FaithfulAgent(actions=16, image_shape=(16, 16))


# -- the original's network ------------------------------------------------------------------------------


def test_the_original_network_has_its_number_of_parameters():
    with torch.device("meta"):
        assert parameters(FaithfulAgent()) == 22_805_069
        assert parameters(FaithfulAgent(norm="group")) == 22_805_069
        assert parameters(FFTConv()) == 50


def test_the_complex_convolution_equals_a_product_of_spectra():
    generator = torch.Generator().manual_seed(0)
    image = torch.complex(*torch.randn(2, 3, 12, 15, generator=generator))
    layer = FFTConv()
    with torch.no_grad():
        layer.imag.copy_(torch.randn(5, 5, generator=generator) / 25)
        kernel = torch.zeros(12, 15, dtype=torch.complex64)
        kernel[:5, :5] = torch.complex(layer.real, layer.imag)
        kernel = torch.roll(kernel, (-2, -2), (0, 1))
        product = torch.fft.ifft2(torch.fft.fft2(image) * torch.fft.fft2(kernel).conj())
        torch.testing.assert_close(layer(image), product, atol=1e-5, rtol=0)
        direct = torch.zeros_like(image)
        for row in range(-2, 3):
            for column in range(-2, 3):
                weight = torch.complex(layer.real, layer.imag)[row + 2, column + 2].conj()
                direct += weight * torch.roll(image, (-row, -column), (1, 2))
        torch.testing.assert_close(layer(image), direct, atol=1e-5, rtol=0)


def test_the_kernel_starts_real_and_small():
    torch.manual_seed(0)
    kernels = [FFTConv() for _ in range(200)]
    real = torch.stack([kernel.real.detach() for kernel in kernels])
    assert abs(float(real.std()) - 1 / 25) < 0.002
    assert all(not bool(kernel.imag.any()) for kernel in kernels)


def test_rows_of_a_batch_do_not_touch_each_other(faithful, make_cases, make_observer):
    cases = make_cases(8)
    observer = make_observer(cases)
    case = torch.arange(8)
    for agent in (faithful, column_agent(observer)):
        policy = Sighted(agent, observer)
        whole = observation_of(case, cases.initial, 5, 0)
        with torch.no_grad():
            log_probs = policy.distribution(whole, None).log_probs
            values = policy.value(whole)
            for number in (0, 5):
                one = {name: value[[number]] for name, value in whole.items()}
                torch.testing.assert_close(
                    policy.distribution(one, None).log_probs[0], log_probs[number], atol=1e-5, rtol=0
                )
                torch.testing.assert_close(policy.value(one)[0], values[number], atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree(faithful):
    generator = torch.Generator().manual_seed(0)
    image = torch.complex(*torch.randn(2, 3, 16, 16, generator=generator))
    seen = {"image": image, "remaining": torch.tensor([[3], [4], [5]])}
    there = {name: value.cuda() for name, value in seen.items()}
    import copy

    twin = copy.deepcopy(faithful).cuda()
    with torch.no_grad():
        torch.testing.assert_close(twin.logits(there).cpu(), faithful.logits(seen), atol=1e-4, rtol=0)
        layer = FFTConv()
        torch.testing.assert_close(layer.cuda()(image.cuda()).cpu(), layer.cpu()(image), atol=1e-4, rtol=0)


def test_the_image_and_the_remaining_budget_both_count(faithful):
    generator = torch.Generator().manual_seed(0)
    image = torch.complex(*torch.randn(2, 1, 16, 16, generator=generator))
    seen = {"image": image, "remaining": torch.tensor([[3]])}
    with torch.no_grad():
        first = faithful.logits(seen)
        assert not torch.allclose(first, faithful.logits({**seen, "remaining": torch.tensor([[4]])}))
        assert not torch.allclose(first, faithful.logits({**seen, "image": image.roll(3, 2)}))
        # The layer normalisation takes the scale away.
        bright = faithful.logits({**seen, "image": 50 * image})
        torch.testing.assert_close(first, bright, atol=1e-3, rtol=1e-3)


def test_budgets_that_cannot_be_counted_are_refused(faithful):
    assert faithful.longest == 59
    faithful.check_budget(59)
    with pytest.raises(ConfigError, match="budget of 60 lines"):
        faithful.check_budget(60)
    ColumnAgent(actions=4, features=6, width=4).check_budget(500)


def test_batch_normalisation_never_follows_the_data(faithful):
    faithful.train()
    layers = [module for module in faithful.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 40
    before = [layer.running_mean.clone() for layer in layers]
    seen = {"image": torch.randn(4, 16, 16) + 0j, "remaining": torch.full((4, 1), 3)}
    faithful.logits(seen)
    assert not any(layer.training for layer in layers)
    assert all(torch.equal(layer.running_mean, mean) for layer, mean in zip(layers, before, strict=True))
    assert faithful.actor.hidden.training


def test_linear_layers_start_orthogonal_without_bias(faithful):
    for network in (faithful.actor, faithful.critic):
        for layer in (network.features, network.hidden, network.output):
            assert not bool(layer.bias.any())
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)


def test_weights_of_torchvision_are_taken_over_by_both_networks(tmp_path, faithful):
    donor = faithful.actor.resnet
    state = {name: torch.randn_like(value.float()) for name, value in donor.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    file = tmp_path / "resnet18.pth"
    torch.save(state, file)
    for norm in ("batch", "group"):
        agent = FaithfulAgent(actions=4, image_shape=(8, 8), norm=norm, pretrained=file)
        for network in (agent.actor, agent.critic):
            assert torch.equal(network.resnet.conv1.weight, state["conv1.weight"])
            assert torch.equal(network.resnet.layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    name = "layer4.0.downsample.0.weight"
    assert torch.equal(agent.actor.resnet.layer4[0].downsample[0].weight, state[name])
    del state["layer1.0.conv1.weight"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight"):
        FaithfulAgent(actions=4, image_shape=(8, 8), pretrained=file)
    file.write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError):
        FaithfulAgent(actions=4, image_shape=(8, 8), pretrained=file)


def test_images_are_cropped_about_their_middle_and_must_be_large_enough(faithful):
    small = torch.zeros(1, 20, 18, dtype=torch.complex64)
    seen = {"image": small, "remaining": torch.tensor([[1]])}
    assert faithful.logits(seen).shape == (1, 16)
    wide = torch.randn(1, 16, 16) + 0j
    padded = torch.zeros(1, 20, 20, dtype=torch.complex64)
    padded[:, 2:-2, 2:-2] = wide
    layer = faithful.actor.kernel
    with torch.no_grad():
        inner = layer(padded)[:, 4:-4, 4:-4]
        torch.testing.assert_close(inner, layer(wide)[:, 2:-2, 2:-2])
    with pytest.raises(ConfigError, match="images are 8×16"):
        faithful.logits({**seen, "image": torch.zeros(1, 8, 16, dtype=torch.complex64)})


def test_features_of_a_stack_are_averaged_over_its_slices(faithful):
    image = torch.randn(1, 3, 16, 16) + 0j
    seen = {"image": image, "remaining": torch.tensor([[2]])}
    with torch.no_grad():
        whole = faithful.logits(seen)
        order = faithful.logits({**seen, "image": image[:, [2, 0, 1]]})
        torch.testing.assert_close(whole, order, atol=1e-5, rtol=1e-5)
        filled = torch.cat([image, torch.zeros(1, 2, 16, 16)], dim=1)
        there = torch.tensor([[True, True, True, False, False]])
        some = faithful.logits({**seen, "image": filled, "slices": there})
        torch.testing.assert_close(whole, some, atol=1e-5, rtol=1e-5)
        wrong = faithful.logits({**seen, "image": filled})
        assert float((whole - wrong).abs().max()) > 10 * float((whole - some).abs().max())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FaithfulAgent(norm="layer"),
        lambda: FaithfulAgent(image_shape=(16,)),
        lambda: FaithfulAgent(steps_dim=1),
        lambda: ColumnAgent(actions=0, features=3),
        lambda: ColumnAgent(actions=8, features=3, width=6),
    ],
)
def test_agents_without_a_meaning_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


# -- the compact network ---------------------------------------------------------------------------------


def test_the_compact_agent_is_small():
    with torch.device("meta"):
        separate = ColumnAgent(actions=64, features=17, pooled=43)
        shared = ColumnAgent(actions=64, features=17, pooled=43, shared=True)
    assert parameters(separate.actor) == 21_680
    assert parameters(separate) == 43_446
    assert parameters(shared) == 21_766


def test_a_shared_trunk_runs_once_and_gives_the_same(make_cases, make_observer):
    observer = make_observer(make_cases())
    agent = column_agent(observer, shared=True)
    calls = []
    agent.actor.register_forward_hook(lambda *_: calls.append(1))
    seen = observer.seen(observation_of(torch.arange(4), observer.cases.initial, 3, 0), "features")
    logits, values = agent.logits_and_values(seen)
    assert len(calls) == 1
    torch.testing.assert_close(logits, agent.logits(seen))
    torch.testing.assert_close(values, agent.values(seen))


def test_a_compact_agent_starts_nearly_uniform_and_takes_part_in_every_weight(make_cases, make_observer):
    observer = make_observer(make_cases())
    agent = column_agent(observer)
    seen = observer.seen(observation_of(torch.arange(4), observer.cases.initial, 3, 0), "features")
    log_probs, values = agent(seen, ~observer.cases.initial)
    legal = log_probs[~observer.cases.initial]
    assert float((legal.exp() - 1 / 14).detach().abs().max()) < 0.02
    assert bool(torch.isneginf(log_probs[observer.cases.initial]).all())
    (legal.square().sum() + values.square().sum()).backward()
    assert [name for name, value in agent.named_parameters() if value.grad is None] == []


def test_scales_are_set_once_and_travel_with_the_weights(make_cases, make_observer):
    examples = torch.randn(50, 3, 16) * torch.tensor([1.0, 5.0, 0.0])[:, None] + 2
    scale = FeatureScale(3)
    torch.testing.assert_close(scale(examples), examples)
    scale.fit(examples)
    found = scale(examples).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(dim=1, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    observer = make_observer(make_cases())
    agent, twin = column_agent(observer), column_agent(observer)
    seen = observer.seen(observation_of(torch.arange(4), observer.cases.initial, 3, 0), "features")
    agent.fit_scales(seen)
    load_into(twin, agent.state_dict())
    torch.testing.assert_close(twin.logits(seen), agent.logits(seen))


# -- before the first update -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["faithful", "columns", "stored"])
def test_the_ratio_is_one_in_the_first_minibatch(faithful, make_cases, make_observer, kind):
    observer = make_observer(make_cases())
    agent = faithful if kind == "faithful" else column_agent(observer, policy_gain=1.0)
    agent.train()
    policy = Sighted(agent, observer)
    observe = ["columns"] if kind == "stored" else []
    env = KSpaceEnv(observer, delta_reward(), num_envs=3, budgets=range(2, 5), observe=observe)
    generator = torch.Generator().manual_seed(0)
    buffer = RolloutBuffer(5)
    last = Collector(env, seed=0).collect(policy, buffer, generator=generator)
    batch = buffer.compute(last, gamma=1.0, lam=0.95)
    order = torch.randperm(15, generator=generator)
    for part in (batch.select(order[:4]), batch.select(order[4:])):
        log_probs, entropy, values = policy.evaluate_actions(part.observations, part.actions, part.masks)
        assert float(((log_probs - part.log_probs).exp() - 1).abs().max()) <= 1e-5
        torch.testing.assert_close(values, part.values, atol=1e-4, rtol=1e-4)
        assert bool(torch.isfinite(entropy).all())
        assert bool((entropy > 0).all())
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    stats = ppo_update(policy, optimizer, batch, PPOConfig(epochs=1, minibatch=15), generator=generator)
    assert abs(stats.approx_kl) < 1e-9
    assert stats.clip_fraction == 0.0


def test_one_legal_line_leaves_no_entropy(make_cases, make_observer):
    observer = make_observer(make_cases())
    policy = Sighted(column_agent(observer, policy_gain=5.0), observer)
    legal = torch.zeros(4, 16, dtype=torch.bool)
    legal[:, 3] = True
    observation = observation_of(torch.arange(4), ~legal, 1, 13)
    lines = torch.full((4,), 3)
    log_probs, entropy, _ = policy.evaluate_actions(observation, lines, legal)
    assert log_probs.tolist() == [0.0] * 4
    assert entropy.tolist() == [0.0] * 4
    (log_probs.sum() + entropy.sum()).backward()
    gradients = [value.grad for value in policy.agent.parameters() if value.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert policy.greedy(observation, legal).tolist() == [3] * 4


def test_an_environment_with_budgets_up_to_its_last_line_can_be_played(make_cases, make_observer):
    observer = make_observer(make_cases(indices=(4, 9)))
    policy = Sighted(column_agent(observer), observer)
    env = KSpaceEnv(observer, delta_reward(), num_envs=2, budgets=[4])
    buffer = RolloutBuffer(8)
    Collector(env, seed=0).collect(policy, buffer, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(buffer["log_probs"]).all())
    assert buffer["log_probs"][3].tolist() == buffer["log_probs"][7].tolist() == [0.0, 0.0]


# -- what is seen ----------------------------------------------------------------------------------------


def test_nothing_of_what_was_not_acquired_is_seen(faithful, make_cases, make_observer):
    cases = make_cases()
    mask = cases.initial.clone()
    mask[:, [3, 12]] = True
    generator = torch.Generator().manual_seed(0)
    other = torch.complex(*torch.randn(2, *cases.kspace.shape, generator=generator))
    changed = dataclasses.replace(
        cases,
        kspace=torch.where(mask[:, None], cases.kspace, other),
        target=torch.rand(cases.target.shape),
        labels=torch.zeros_like(cases.labels),
    )
    observer = make_observer(cases)
    observation = observation_of(torch.arange(4), mask, 3, 2)
    for agent in (faithful, column_agent(observer, policy_gain=1.0)):
        with torch.no_grad():
            found = [
                Sighted(agent, one).distribution(observation, ~mask).probs
                for one in (observer, observer.on(changed))
            ]
        torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
        slope = torch.linspace(0.2, 2, 16)[:, None]
        moved = dataclasses.replace(cases, kspace=cases.kspace * slope)
        with torch.no_grad():
            probs = Sighted(agent, observer.on(moved)).distribution(observation, ~mask).probs
        assert float((probs - found[0]).abs().max()) > 1e-5


def test_a_blind_agent_sees_lines_and_counters_only(make_cases, make_observer):
    cases = make_cases()
    observer = make_observer(cases, groups=BLIND)
    assert observer.features.names == ["acquired", "mirror", "place", "distance", "remaining", "taken"]
    agent = column_agent(observer, policy_gain=1.0)
    assert agent.needs == "lines"
    policy = Sighted(agent, observer)
    with torch.no_grad():
        probs = policy.distribution(observation_of(torch.arange(4), cases.initial, 3, 2), None).probs
        later = policy.distribution(observation_of(torch.arange(4), cases.initial, 2, 3), None).probs
    torch.testing.assert_close(probs, probs[:1].expand(4, -1))
    assert not torch.allclose(probs, later)
    with pytest.raises(ConfigError, match="the agent needs lines"):
        Sighted(agent, make_observer(cases)).value(observation_of(torch.arange(4), cases.initial, 3, 2))
    sighted = column_agent(make_observer(cases))
    with pytest.raises(ConfigError, match="the agent needs features"):
        Sighted(sighted, observer).value(observation_of(torch.arange(4), cases.initial, 3, 2))


def test_mirrored_columns_of_a_real_image_have_equal_energies(make_cases, make_observer):
    cases = make_cases(phase=0.0)
    observer = make_observer(cases)
    everything = torch.ones(4, 16, dtype=torch.bool)
    found = observer.seen(observation_of(torch.arange(4), everything, 1, 14), "features")["columns"]
    names = observer.features.names
    energy, mirror = (found[:, names.index(name)] for name in ("energy", "mirror_energy"))
    torch.testing.assert_close(energy, mirror, atol=1e-3, rtol=1e-3)
    acquired = observer.seen(observation_of(torch.arange(4), cases.initial, 1, 0), "features")["columns"]
    assert torch.equal(acquired[:, 0] > 0, cases.initial)
    columns = torch.arange(16)
    opposite = (16 - columns) % 16
    assert torch.equal(acquired[:, 1], acquired[:, 0][:, opposite])
    assert bool((acquired[:, names.index("energy")][~cases.initial] == 0).all())


def test_the_predicted_drop_of_entropy_is_its_derivative(make_cases, make_observer):
    cases = make_cases()
    network = make_observer(cases).imaging.segmenter.double()

    class Oracle(nn.Module):
        """Predicts the true magnitude of the case; the rest is the network's."""

        out_channels, reconstructs, bottleneck = 4, True, 0

        def both(self, image):
            logits, _, deep = network(image.double()), None, torch.zeros(len(image), 0, 1, 1)
            return logits.float(), truth[:, None], deep

        def forward(self, image):
            return self.both(image)[0]

    index, mask = torch.arange(4), cases.initial
    observer = make_observer(cases, segmenter=Oracle())
    image = observer.imaging.reconstruct(cases, index, mask)
    truth = cases.target
    seen = observer.seen(observation_of(index, mask, 3, 0), "features")["columns"]
    drop = torch.sinh(seen[:, observer.features.names.index("entropy_drop")])
    phase = image / (image.abs() + 1e-3)
    expected = fftc(truth * phase, (-1,))
    small = 1e-3
    for column in (2, 11):
        line = torch.zeros_like(expected)
        line[..., column] = expected[..., column]
        change = torch.fft.fftshift(
            torch.fft.ifft(torch.fft.ifftshift(line, dim=-1), dim=-1, norm="ortho"), dim=-1
        )
        entropies = []
        for sign in (small, -small):
            moved = (image.to(torch.complex128) + sign * change).abs()
            probs = torch.softmax(network(moved[:, None]), dim=1)
            entropies.append(-(probs * probs.log()).sum(dim=(1, 2, 3)))
        derivative = (entropies[0] - entropies[1]) / (2 * small)
        torch.testing.assert_close(drop[:, column].double(), -derivative, atol=5e-3, rtol=5e-2)
    assert bool((seen[:, observer.features.names.index("entropy_drop")][mask] == 0).all())


def test_pooled_features_are_areas_centroids_and_entropy(make_cases, make_observer):
    class Certain(nn.Module):
        out_channels = 2

        def forward(self, image):
            logits = torch.zeros(len(image), 2, 16, 16) + 0 * image
            sure = torch.full((2, 16, 16), 20.0)
            sure[1] = 0.0
            sure[1, :4, 12:] = 40.0
            return logits + sure

    observer = make_observer(make_cases(), segmenter=Certain())
    observation = observation_of(torch.arange(4), observer.cases.initial, 3, 0)
    found = dict(
        zip(observer.features.pooled_names, observer.seen(observation, "features")["pooled"][0], strict=True)
    )
    line = torch.linspace(-1, 1, 16)
    assert float(found["area1"]) == pytest.approx(16 / 256, abs=1e-4)
    assert float(found["row1"]) == pytest.approx(float(line[:4].mean()), abs=0.01)
    assert float(found["column1"]) == pytest.approx(float(line[12:].mean()), abs=0.01)
    assert float(found["entropy"]) == pytest.approx(0.0, abs=1e-4)


def test_features_of_a_stack_do_not_depend_on_empty_slices(make_cases, make_observer, volumes):
    slices = make_cases(5)
    short = volumes(slices, {"a": [0, 1]})
    filled = volumes(slices, {"a": [0, 1], "b": [2, 3, 4]})
    found = []
    for cases in (short, filled):
        observer = make_observer(cases)
        observation = observation_of(torch.tensor([0]), cases.initial[:1], 3, 0)
        found.append(observer.seen(observation, "features"))
    for name in ("columns", "pooled"):
        names = observer.features.names if name == "columns" else observer.features.pooled_names
        own = [place for place, item in enumerate(names) if item not in ("energy", "mirror_energy")]
        torch.testing.assert_close(found[0][name][:, own], found[1][name][:, own], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-4)


def test_what_the_environment_saw_is_not_computed_twice(make_cases, make_observer):
    observer = make_observer(make_cases())
    calls = []
    both = observer.imaging.segmenter.both
    observer.imaging.segmenter.both = lambda image: (calls.append(len(image)), both(image))[1]
    policy = Sighted(column_agent(observer), observer)
    env = KSpaceEnv(observer, delta_reward(), num_envs=3, budgets=[5])
    observation = env.reset(seed=0)
    assert calls == [3]
    lines, _, _ = policy.act(observation, env.action_masks(), torch.Generator().manual_seed(0))
    observation = env.step(lines)[0]
    policy.value(observation)
    policy.act(observation, env.action_masks(), torch.Generator().manual_seed(0))
    assert calls == [3, 3]
    part = {name: value[:2] for name, value in observation.items()}
    torch.testing.assert_close(policy.value(part), policy.value(observation)[:2], atol=1e-5, rtol=1e-5)
    assert calls == [3, 3, 2]


def test_features_without_a_network_have_no_part_of_it(make_cases, volumes):
    cases = make_cases()
    features = ColumnFeatures(cases)
    assert features.names[6:] == ["energy", "mirror_energy", "magnitude"]
    assert features.pooled_names == []
    observer = CaseObserver(cases, Imaging(), features)
    seen = observer.seen(observation_of(torch.arange(4), cases.initial, 3, 0), "features")
    assert seen["columns"].shape == (4, 9, 16)
    assert seen["pooled"].shape == (4, 0)
    agent = column_agent(observer)
    assert agent.values(seen).shape == (4,)
    points = volumes(cases, {"a": [0, 1, 2, 3]}, geometry="volume3d", points=True)
    with pytest.raises(ConfigError, match="points"):
        ColumnFeatures(points)
    with pytest.raises(ConfigError, match="unknown: colour"):
        ColumnFeatures(cases, groups=("lines", "colour"))


def test_spectra_along_columns_are_those_of_the_two_dimensional_transform(make_cases):
    cases = make_cases()
    observer = CaseObserver(cases, Imaging(), ColumnFeatures(cases))
    everything = torch.ones(4, 16, dtype=torch.bool)
    seen = observer.seen(observation_of(torch.arange(4), everything, 1, 14), "features")
    power = fft2c(cases.target).abs().square().sum(dim=1)
    magnitude = seen["columns"][:, observer.features.names.index("magnitude")]
    torch.testing.assert_close(magnitude, torch.log1p(power / 1e-4) / 4, atol=1e-3, rtol=1e-3)


def test_ppo_learns_which_lines_matter(make_cases, make_observer):
    """Energy in the image lies in the middle: after some updates the policy prefers the middle columns."""
    torch.manual_seed(0)
    cases = make_cases(8)
    observer = make_observer(cases, segmenter=None)
    agent = column_agent(observer)
    policy = Sighted(agent, observer)
    reward = Reward(Quality(image_weight=1.0, label_weight=0.0, of_image="nmse"))
    env = KSpaceEnv(observer, reward, num_envs=32, budgets=[2], observe=["columns"])
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-3)
    collector, buffer = Collector(env, seed=0), RolloutBuffer(4)
    generator = torch.Generator().manual_seed(0)
    returns = []
    for _ in range(18):
        last = collector.collect(policy, buffer, generator=generator)
        batch = buffer.compute(last, gamma=1.0, lam=0.95)
        ppo_update(policy, optimizer, batch, PPOConfig(epochs=3, minibatch=64), generator=generator)
        returns.append(sum(item.reward for item in collector.episodes) / len(collector.episodes))
    observation = observation_of(torch.arange(8), cases.initial, 2, 0)
    chosen = policy.greedy(observation, ~cases.initial)
    assert bool(((chosen - 8).abs() <= 3).all())
    assert sum(returns[-5:]) > 1.5 * sum(returns[:5])
