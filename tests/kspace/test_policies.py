"""Baseline policies, exact gains of every line, and fixed masks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent import ColumnAgent
from medrl.plugins.kspace.candidates import (
    exchanged,
    gains,
    population_greedy,
    quality_of,
    quality_with_each,
)
from medrl.plugins.kspace.coils import expand
from medrl.plugins.kspace.fourier import fft2c, ifft2c
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.masks import apply_order
from medrl.plugins.kspace.models import ReconUNet
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.policies import (
    AgentLines,
    EquispacedLines,
    ExchangedLines,
    FixedLines,
    GreedyLines,
    LowToHighLines,
    RandomLines,
    VariableDensityLines,
)
from medrl.plugins.kspace.rewards import Quality

NMSE = Quality(image_weight=1.0, label_weight=0.0, of_image="nmse")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def an_agent(observer, **settings):
    features = observer.features
    torch.manual_seed(0)
    return ColumnAgent(
        actions=observer.cases.actions,
        features=len(features.names),
        pooled=len(features.pooled_names),
        width=8,
        **settings,
    )


def every_policy(observer):
    return [
        RandomLines(),
        EquispacedLines(),
        LowToHighLines(),
        VariableDensityLines(),
        FixedLines(torch.randperm(16, generator=generator(3))),
        GreedyLines(Quality()),
        AgentLines(an_agent(observer)),
        AgentLines(an_agent(observer), sample=True, at_once=3),
    ]


@pytest.mark.parametrize("budget", [1, 5, 8])
def test_every_policy_gives_distinct_possible_lines(make_cases, make_observer, budget):
    padding = torch.zeros(4, 16, dtype=torch.bool)
    padding[1, :2] = True
    padding[2, -4:] = True
    cases = make_cases(padding=padding)
    observer = make_observer(cases)
    case = torch.tensor([2, 0, 1, 3, 2])
    for policy in every_policy(observer):
        order = policy.order(observer, case, budget, generator())
        assert order.shape == (5, budget), policy
        initial = cases.initial[case]
        mask = apply_order(initial, order, budget)
        assert torch.equal(mask.sum(dim=1), initial.sum(dim=1) + budget), policy
        assert not bool((mask & padding[case]).any()), policy


def test_policies_refuse_more_lines_than_there_are(make_cases, make_observer, volumes):
    observer = make_observer(make_cases())
    for policy in every_policy(observer):
        for budget in (0, 15):
            with pytest.raises(ConfigError, match="1 to 14 are possible"):
                policy.order(observer, torch.tensor([0]), budget, generator())
    with pytest.raises(ConfigError, match="too few"):
        FixedLines([0, 1, 2]).order(observer, torch.tensor([0]), 4, generator())
    points = volumes(make_cases(), {"a": [0, 1, 2, 3]}, geometry="volume3d", points=True)
    for policy in (LowToHighLines(), VariableDensityLines()):
        with pytest.raises(ConfigError, match="points"):
            policy.order(CaseObserver(points), torch.tensor([0]), 2, generator())
    assert RandomLines().order(CaseObserver(points), torch.tensor([0]), 9, generator()).unique().numel() == 9


def test_low_to_high_goes_outwards_right_and_left_in_turn(make_cases, make_observer):
    cases = make_cases(size=64, initial=4)
    order = LowToHighLines().order(make_observer(cases, segmenter=None), torch.tensor([0]), 6, generator())
    assert order.tolist() == [[34, 29, 35, 28, 36, 27]]


def test_fixed_lines_skip_what_a_case_has_already(make_cases, make_observer):
    observer = make_observer(make_cases(), segmenter=None)
    assert observer.cases.initial[0].nonzero().flatten().tolist() == [7, 8]
    order = FixedLines([7, 3, 8, 12, 1]).order(observer, torch.tensor([0, 1]), 2, generator())
    assert order.tolist() == [[3, 12], [3, 12]]


def test_gains_of_all_lines_equal_acquiring_each(make_cases, make_observer):
    cases = make_cases()
    observer = make_observer(cases)
    case = torch.tensor([3, 0, 2])
    mask = cases.initial[case].clone()
    mask[0, [1, 5]] = True
    quality = Quality(image_weight=0.4, label_weight=0.6)
    now, after = quality_with_each(observer, quality, case, mask, at_once=5)
    torch.testing.assert_close(now, quality_of(observer, quality, case, mask), atol=1e-5, rtol=0)
    assert torch.equal(torch.isneginf(after), mask)
    found = gains(observer, quality, case, mask)
    for line in range(16):
        more = mask.clone()
        more[:, line] = True
        expected = quality_of(observer, quality, case, more)
        legal = ~mask[:, line]
        torch.testing.assert_close(after[legal, line], expected[legal], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[legal, line], (expected - now)[legal], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["stack", "points", "coils", "network"])
def test_gains_are_exact_in_every_geometry(make_cases, make_observer, kind, volumes):
    slices = make_cases(4, size=8)
    imaging = Imaging()
    cases = slices
    if kind == "stack":
        cases = volumes(slices, {"a": [0, 1, 2], "b": [3]})
    elif kind == "points":
        cases = volumes(slices, {"a": [0, 1], "b": [2, 3]}, geometry="volume3d", points=True)
    elif kind == "coils":
        maps = torch.full((4, 2, 8, 8), 0.5**0.5, dtype=torch.complex64)
        kspace = fft2c(expand(ifft2c(slices.kspace), maps))
        cases = dataclasses.replace(slices, kspace=kspace, coils=True, sensitivities=maps)
    else:
        torch.manual_seed(0)
        imaging = Imaging(reconstruction=ReconUNet(base=2, levels=1))
    observer = CaseObserver(cases, imaging)
    case = torch.arange(2)
    _, after = quality_with_each(observer, NMSE, case, cases.initial[:2], at_once=3)
    for line in (0, cases.actions - 1):
        more = cases.initial[:2].clone()
        more[:, line] = True
        torch.testing.assert_close(after[:, line], quality_of(observer, NMSE, case, more), atol=1e-5, rtol=0)


def test_the_order_of_energies_is_the_optimum_of_the_complex_error(make_cases):
    """Lacking energy is the complex NMSE, so that a greedy search on it must sort columns by energy."""
    cases = make_cases(1, size=12)
    energy = cases.line_energy[0].clone()
    lacking = (
        1
        - torch.tensor([float(energy[list(some)].sum()) for some in itertools.combinations(range(12), 3)])
        / energy.sum()
    )
    best = list(itertools.combinations(range(12), 3))[int(lacking.argmin())]
    assert set(best) == set(energy.argsort(descending=True)[:3].tolist())
    image = ifft2c(cases.kspace)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, list(best)] = True
    found = ifft2c(cases.measured(torch.tensor([0]), mask))
    nmse = (found - image).abs().square().sum() / image.abs().square().sum()
    assert float(nmse) == pytest.approx(float(lacking.min()), abs=1e-5)


def test_the_oracle_takes_the_best_line_at_every_step(make_cases, make_observer):
    observer = make_observer(make_cases())
    quality = Quality()
    case = torch.arange(4)
    order = GreedyLines(quality, at_once=20).order(observer, case, 3, generator())
    mask = observer.cases.initial.clone()
    for step in range(3):
        best = gains(observer, quality, case, mask).argmax(dim=1)
        assert torch.equal(order[:, step], best)
        mask.scatter_(1, best[:, None], value=True)


def test_the_population_mask_takes_the_line_that_is_best_on_average(make_cases, make_observer):
    observer = make_observer(make_cases(6, seed=4), segmenter=None)
    case = torch.arange(6)
    order = population_greedy(observer, NMSE, case, 4)
    mask = observer.cases.initial.clone()
    for line in order.tolist():
        _, after = quality_with_each(observer, NMSE, case, mask)
        assert line == int(after.mean(dim=0).argmax())
        mask[:, line] = True
    assert len(set(order.tolist())) == 4


def test_the_population_mask_avoids_padding_of_any_case(make_cases, make_observer):
    padding = torch.zeros(4, 16, dtype=torch.bool)
    padding[2, 9:] = True
    observer = make_observer(make_cases(padding=padding), segmenter=None)
    order = population_greedy(observer, NMSE, torch.arange(4), 6)
    assert int(order.max()) < 9
    with pytest.raises(ConfigError, match="no line is left"):
        population_greedy(observer, NMSE, torch.arange(4), 8)


def test_exchange_never_loses_and_undoes_a_bad_line(make_cases, make_observer):
    observer = make_observer(make_cases(5), segmenter=None)
    case = torch.arange(5)

    def value(lines):
        mask = observer.cases.initial[case].clone()
        mask[:, lines] = True
        return float(quality_of(observer, NMSE, case, mask).mean())

    greedy = population_greedy(observer, NMSE, case, 3)
    spoilt = torch.tensor([0, *greedy.tolist()[1:]])
    better = exchanged(observer, NMSE, case, spoilt)
    assert value(better.tolist()) > value(spoilt.tolist())
    assert value(better.tolist()) >= value(greedy.tolist()) - 1e-7
    assert 0 not in better.tolist()
    assert len(set(better.tolist())) == 3
    again = exchanged(observer, NMSE, case, better)
    assert torch.equal(again, better)
    pairs = list(itertools.combinations([line for line in range(16) if line not in (7, 8)], 2))
    best = max(value(list(pair)) for pair in pairs)
    found = exchanged(observer, NMSE, case, torch.tensor([0, 15]))
    assert value(found.tolist()) <= best + 1e-7


def test_lines_are_exchanged_for_the_budget_that_is_asked_for_and_only_once(make_cases, make_observer):
    asked = []

    def improve(lines):
        asked.append(lines.tolist())
        return lines + 1

    observer, case = make_observer(make_cases(2), segmenter=None), torch.arange(2)
    policy = ExchangedLines(torch.tensor([3, 5, 9]), improve)
    assert policy.order(observer, case, 2, generator()).tolist() == [[4, 6]] * 2
    assert policy.order(observer, case, 2, generator()).tolist() == [[4, 6]] * 2
    assert policy.order(observer, case, 3, generator()).tolist() == [[4, 6, 10]] * 2
    assert asked == [[3, 5], [3, 5, 9]]
    with pytest.raises(ConfigError, match="too few"):
        policy.order(observer, case, 4, generator())


def test_policies_are_ranked_as_they_must_be_on_the_same_metric(make_cases, make_observer):
    observer = make_observer(make_cases(8, size=24, initial=2), segmenter=None)
    case = torch.arange(8)

    def score(policy):
        order = policy.order(observer, case, 5, generator())
        mask = apply_order(observer.cases.initial, order, 5)
        return float(quality_of(observer, NMSE, case, mask).mean())

    oracle, fixed, low, chance = (
        score(policy)
        for policy in (
            GreedyLines(NMSE),
            FixedLines(population_greedy(observer, NMSE, case, 5)),
            LowToHighLines(),
            RandomLines(),
        )
    )
    assert oracle >= fixed >= low - 1e-6 > chance


def test_an_agent_chooses_what_it_would_in_the_environment(make_cases, make_observer):
    from medrl.plugins.kspace.agent import Sighted
    from medrl.plugins.kspace.env import KSpaceEnv
    from medrl.plugins.kspace.rewards import Reward

    observer = make_observer(make_cases())
    agent = an_agent(observer, policy_gain=3.0).train()
    case = torch.tensor([1, 3])
    order = AgentLines(agent).order(observer, case, 4, generator())
    assert agent.training
    env = KSpaceEnv(observer, Reward(NMSE), num_envs=2, budgets=[4])
    observation = env.start(case, torch.tensor([4, 4]))
    policy = Sighted(agent, observer)
    for step in range(4):
        lines = policy.greedy(observation, env.action_masks())
        assert torch.equal(lines, order[:, step])
        observation = env.step(lines)[0]
    drawn = {
        tuple(AgentLines(agent, sample=True).order(observer, case, 4, generator(seed))[0].tolist())
        for seed in (0, 0, 1, 2)
    }
    assert 1 < len(drawn) < 4
