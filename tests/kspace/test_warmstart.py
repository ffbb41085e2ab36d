"""Warm start: states with exact gains, and imitation of them."""

from __future__ import annotations

import copy

import pytest
import torch

from medrl.core.errors import ConfigError, DataError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.core.rl.ppo import plain_step
from medrl.plugins.kspace.agent import ColumnAgent, FaithfulAgent, Sighted
from medrl.plugins.kspace.candidates import gains
from medrl.plugins.kspace.features import BLIND
from medrl.plugins.kspace.policies import AgentLines
from medrl.plugins.kspace.rewards import Quality
from medrl.plugins.kspace.warmstart import (
    StateCollector,
    States,
    fit_scales,
    imitate_epoch,
    imitation_loss,
    imitation_score,
    standardised,
)

NMSE = Quality(image_weight=1.0, label_weight=0.0, of_image="nmse")


def an_agent(observer, **settings):
    features = observer.features
    torch.manual_seed(0)
    return ColumnAgent(
        actions=observer.cases.actions,
        features=len(features.names),
        pooled=len(features.pooled_names),
        width=8,
        blind=features.blind,
        **settings,
    )


def test_states_on_the_way_carry_the_gains_of_all_lines(make_cases, make_observer):
    observer = make_observer(make_cases())
    quality = Quality()
    collector = StateCollector(observer, quality, batch=5, budgets=[3, 4], seed=1)
    for step in range(3):
        states = collector.collect(oracle=1.0)
        assert states.taken.tolist() == [step] * 5
        assert set((states.remaining + states.taken).tolist()) <= {3, 4}
        exact = gains(observer, quality, states.case, states.mask)
        torch.testing.assert_close(states.gains[states.legal], exact[states.legal], atol=1e-6, rtol=0)
        assert states.gains[~states.legal].abs().sum() == 0
        assert torch.equal(states.legal, ~states.mask)
        best = exact.argmax(dim=1)
        if int(collector.taken.max()) == step + 1:
            assert bool(collector.mask.gather(1, best[:, None]).all())
    seen = observer.features_of(states.observation())
    assert torch.equal(seen["columns"], states.seen["columns"])


def test_random_and_oracle_lines_are_mixed_by_their_share(make_cases, make_observer):
    observer = make_observer(make_cases(), segmenter=None)
    collector = StateCollector(observer, NMSE, batch=400, budgets=[2], seed=0)
    states = collector.collect(oracle=0.25)
    best = states.gains.masked_fill(~states.legal, -torch.inf).argmax(dim=1)
    by_oracle = collector.mask.gather(1, best[:, None]).float().mean()
    assert float(by_oracle) == pytest.approx(0.25 + 0.75 / 14, abs=0.07)


def test_long_acquisitions_begin_anywhere_and_go_on_for_a_span(make_cases, make_observer):
    observer = make_observer(make_cases(), segmenter=None)
    collector = StateCollector(observer, NMSE, batch=60, budgets=[12], span=4, seed=0)
    starts = collector.collect().taken
    assert set(starts.tolist()) == set(range(9))
    for _ in range(3):
        states = collector.collect()
        assert torch.equal((states.mask & ~observer.cases.initial[states.case]).sum(dim=1), states.taken)
    assert torch.equal(states.taken, starts + 3)
    fresh = collector.collect()
    assert not torch.equal(fresh.taken, starts + 4)
    whole = StateCollector(observer, NMSE, batch=3, budgets=[12], span=0, seed=0)
    assert [whole.collect().taken.tolist() for _ in range(13)] == [[step % 12] * 3 for step in range(13)]


def test_the_policy_leads_to_its_own_states(make_cases, make_observer):
    observer = make_observer(make_cases())
    agent = an_agent(observer, policy_gain=30.0)
    policy = Sighted(agent, observer)
    collector = StateCollector(observer, NMSE, batch=20, budgets=[6], span=2, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        agent.policy.weight.zero_()
        agent.actor.embedding.zero_()
        agent.actor.embedding[0] = torch.linspace(-1, 1, 16)
    chosen = AgentLines(agent).order(observer, torch.arange(4), 6, torch.Generator())
    assert chosen.shape == (4, 6)

    class Highest:
        """Takes the highest line that is left."""

        def distribution(self, observation, legal):
            return MaskedCategorical(torch.arange(16.0).expand(legal.shape) * 100, legal)

    for _ in range(5):
        states = collector.collect(Highest(), oracle=0.0)
        lines = states.mask & ~observer.cases.initial[states.case]
        for row, taken in zip(lines, states.taken.tolist(), strict=True):
            assert row.nonzero().flatten().tolist() == list(range(16 - taken, 16))
    assert isinstance(policy, Sighted)


def test_cases_are_drawn_from_those_allowed_by_their_weights(make_cases, make_observer):
    observer = make_observer(make_cases(), segmenter=None)
    collector = StateCollector(
        observer,
        NMSE,
        batch=600,
        budgets=[1],
        cases=torch.tensor([0, 2]),
        weights=torch.tensor([1.0, 5.0, 3.0, 1.0]),
        seed=0,
    )
    share = torch.bincount(collector.collect().case, minlength=4) / 600
    torch.testing.assert_close(share, torch.tensor([0.25, 0.0, 0.75, 0.0]), atol=0.05, rtol=0)
    with pytest.raises(ConfigError, match="no case"):
        StateCollector(observer, NMSE, batch=1, budgets=[1], weights=torch.zeros(4))
    for wrong in ({"batch": 0}, {"budgets": []}, {"budgets": [15]}, {"span": -1}):
        with pytest.raises(ConfigError, match="warm start"):
            StateCollector(observer, NMSE, **{"batch": 1, "budgets": [1], **wrong})


def test_collection_goes_on_where_it_stopped(make_cases, make_observer):
    observer = make_observer(make_cases())
    policy = Sighted(an_agent(observer, policy_gain=1.0), observer)
    first = StateCollector(observer, NMSE, batch=6, budgets=range(2, 9), span=3, seed=5)
    for _ in range(4):
        first.collect()
    state = copy.deepcopy(first.state_dict())
    expected = [first.collect(policy) for _ in range(5)]
    other = StateCollector(observer, NMSE, batch=6, budgets=range(2, 9), span=3, seed=99)
    other.load_state_dict(state)
    for states in expected:
        again = other.collect(policy)
        for name in ("case", "mask", "remaining", "taken", "gains"):
            assert torch.equal(getattr(again, name), getattr(states, name)), name


def test_states_are_joined_selected_and_stored(make_cases, make_observer):
    observer = make_observer(make_cases())
    collector = StateCollector(observer, NMSE, batch=4, budgets=[5], seed=0)
    whole = States.joined([collector.collect() for _ in range(3)])
    assert len(whole) == 12
    some = whole.select(torch.tensor([11, 0]))
    assert torch.equal(some.gains, whole.gains[[11, 0]])
    assert torch.equal(some.seen["columns"], whole.seen["columns"][[11, 0]])
    back = States.from_state_dict(whole.state_dict())
    assert torch.equal(back.observation()["mask"], whole.observation()["mask"])
    parts = list(whole.minibatches(5, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [5, 5, 2]
    together = torch.cat([part.gains for part in parts])
    assert torch.equal(together.sort(dim=0).values, whole.gains.sort(dim=0).values)
    with pytest.raises(DataError, match="there is none"):
        States.joined([])


def test_gains_are_centred_in_each_state_and_have_one_scale():
    legal = torch.tensor([[True, True, True, False], [True, True, False, False]])
    states = States(
        case=torch.tensor([0, 1]),
        mask=~legal,
        legal=legal,
        remaining=torch.tensor([1, 1]),
        taken=torch.tensor([0, 0]),
        gains=torch.tensor([[1.0, 2.0, 3.0, 0.0], [5.0, 7.0, 0.0, 0.0]]),
    )
    found = standardised(states).gains
    scale = (4 / 5) ** 0.5
    expected = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]) / scale
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[legal].square().mean(), torch.tensor(1.0))


def test_the_loss_is_minus_the_expected_gain_and_some_entropy():
    legal = torch.tensor([[True, True, False]])
    policy = MaskedCategorical(torch.tensor([[0.0, 0.0, 9.0]]), legal)
    loss = imitation_loss(policy, torch.tensor([[1.0, 3.0, 0.0]]), entropy=0.5)
    assert float(loss) == pytest.approx(-(2.0 + 0.5 * 0.693147), abs=1e-5)


def test_imitation_learns_lines_that_gain_and_a_blind_twin_learns_less(make_cases, make_observer):
    """Cases whose k-space centre is displaced: only an agent that sees can know to which side."""
    cases = make_cases(12, size=16, initial=4, seed=1)
    displaced = [torch.roll(row, int(3 * (-1) ** number), 1) for number, row in enumerate(cases.kspace)]
    cases = cases.__class__(**{**cases.__dict__, "kspace": torch.stack(displaced)})
    scores = {}
    for groups in (("lines", "energy"), BLIND):
        observer = make_observer(cases, segmenter=None, groups=groups)
        policy = Sighted(an_agent(observer), observer)
        collector = StateCollector(observer, NMSE, batch=24, budgets=[2], seed=0)
        states = States.joined([collector.collect() for _ in range(4)])
        fit_scales(policy, states)
        optimizer = torch.optim.AdamW(policy.agent.parameters(), lr=1e-2, weight_decay=0.03)
        step, generator = plain_step(optimizer, 1.0), torch.Generator().manual_seed(0)
        before = imitation_score(policy, states)
        losses = [
            imitate_epoch(
                policy, standardised(states), batch=32, entropy=0.03, generator=generator, step=step
            )
            for _ in range(20)
        ]
        after = imitation_score(policy, states)
        assert losses[-1] < losses[0]
        assert after["gain"] > before["gain"]
        assert after["entropy"] < before["entropy"]
        assert after["best"] == pytest.approx(before["best"])
        assert after["gain"] <= after["best"] + 1e-6
        scores[groups] = after["gain"] / after["best"]
    assert scores["lines", "energy"] > 0.85
    assert scores["lines", "energy"] > scores[BLIND] + 0.1


def test_an_agent_that_reads_images_imitates_as_well(make_cases, make_observer):
    observer = make_observer(make_cases(), segmenter=None, groups=None)
    torch.manual_seed(0)
    agent = FaithfulAgent(actions=16, image_shape=(16, 16))
    policy = Sighted(agent, observer)
    collector = StateCollector(observer, NMSE, batch=8, budgets=[2], seed=0)
    states = collector.collect()
    assert states.seen == {}
    fit_scales(policy, states)
    step = plain_step(torch.optim.SGD(agent.parameters(), lr=1e-3), 1.0)
    arguments = {"batch": 8, "entropy": 0.0, "generator": torch.Generator().manual_seed(0), "step": step}
    losses = [imitate_epoch(policy, standardised(states), **arguments) for _ in range(3)]
    assert losses[2] < losses[0]
