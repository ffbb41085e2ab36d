"""Self-play from the warm start to the last update, on volumes with a bright ball."""

from __future__ import annotations

import json

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError, Interrupted
from medrl.core.jobs import build_train_job
from medrl.core.rl.gae import generalised_advantage
from medrl.core.rl.ppo import plain_step
from medrl.core.rl.rollout import RolloutBuffer
from medrl.plugins.spars import train
from medrl.plugins.spars.agent import CompactAgent, Sighted
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.lattice import Lattice, move
from medrl.plugins.spars.observer import Observer
from medrl.plugins.spars.opponents import Opponents
from medrl.plugins.spars.policies import Episodes, RandomWalk, SelfPlay, run
from medrl.plugins.spars.rewards import SignReward
from medrl.plugins.spars.warmstart import Teacher, imitation_loss, planned, walk_with

VALUES = {
    "score": {"window": [8, 8, 8], "stride": [4, 4, 4]},
    "agent": {"name": "spars.compact", "width": 16},
    "warm": {"steps": 4, "batch": 64},
    "ppo": {"updates": 4, "envs": 4, "steps": 8, "minibatch": 16},
    "env": {"horizon": 6, "tau": 0.9},
    "opponents": {"every": 8},
    "validation": {"volumes": 2, "episodes": 1},
    "train": {"checkpoint_every": 1, "device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def own_manager():
    """A plugin manager that knows spars, listed or not."""
    from medrl.core.discovery import PluginEntry
    from medrl.core.manager import PluginManager

    found = PluginManager.create(third_party=False)
    if found.knows("spars"):
        return found
    entry = PluginEntry(
        name="spars", distribution="medrl", version="", module="medrl.plugins.spars.plugin", origin="bundled"
    )
    return PluginManager([*found.entries(), entry], policy=found.policy)


@pytest.fixture
def job_of(own_manager):
    """A job of self-play alone."""

    def make(run, over=None):
        values = {name: {**block, **(over or {}).get(name, {})} for name, block in VALUES.items()}
        return build_train_job(own_manager, "spars", values, run)

    return make


@pytest.fixture
def fit(make_table, job_of):
    """Train on given tables; return the records."""

    def run(folder, over=None, **settings):
        job = job_of(folder, over)
        data = train.PlayData(train=make_table(**settings), val=make_table(2, **settings))
        with job.runtime() as rt:
            train.fit(rt, job.config, data)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def states(run):
    return load_checkpoint(find_checkpoint(run, "last")).states


def differences(a, b, where=""):
    """Where two nested states differ, tensors compared bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        same = list(a) == list(b)
        return [at for key in a for at in differences(a[key], b[key], f"{where}.{key}")] if same else [where]
    if isinstance(a, (list, tuple)):
        return [
            at for k, (x, y) in enumerate(zip(a, b, strict=True)) for at in differences(x, y, f"{where}[{k}]")
        ]
    return [] if a == b else [where]


def test_a_run_imitates_first_and_then_plays(tmp_path, fit):
    rows = fit(tmp_path / "run")
    phases = [row["phase"] for row in rows if "phase" in row]
    assert phases == ["warm"] * 4 + ["ppo"] * 4
    played = [row for row in rows if row.get("phase") == "ppo"]
    assert all(row["updates"] == 4 for row in played)
    assert all(row["win_rate"] + row["draw_rate"] + row["loss_rate"] == pytest.approx(1.0) for row in played)
    assert [f"win_vs_{8 * k}" in row for k, row in enumerate(played)] == [True] * 4
    watched = [row for row in rows if "val_score" in row]
    assert all(0 <= row["val_score"] <= row["val_best"] <= 1 for row in watched)
    assert all(0 <= row["val_covered"] <= 1 for row in watched)
    found = states(tmp_path / "run")
    assert {"agent", "optimizer", "warm_optimizer", "env", "opponents"} <= set(found)
    meta = load_checkpoint(find_checkpoint(tmp_path / "run", "last")).meta
    assert meta["opponent"] == {"kind": "frozen", "pool": 1, "every": 8}
    assert len(meta["table"]) == 64


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, fit, stop, monkeypatch):
    over = {"opponents": {"every": 8, "kind": "pool", "pool": 2, "latest": 0.5}}
    fit(tmp_path / "whole", over)
    original = train.imitate, train.improve

    def stopping(place):
        def step(rt, *args):
            facts = original[place](rt, *args)
            if rt.ranks.step == stop:
                rt._stop.number = 15
            return facts

        return step

    with monkeypatch.context() as patch:
        patch.setattr(train, "imitate", stopping(0))
        patch.setattr(train, "improve", stopping(1))
        with pytest.raises(Interrupted):
            fit(tmp_path / "parts", over)
    assert states(tmp_path / "parts")["opponents"]["steps"] == 8 * max(0, stop - 4)
    fit(tmp_path / "parts", over)
    assert differences(states(tmp_path / "whole"), states(tmp_path / "parts")) == []


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(tmp_path, fit):
    for name in ("a", "b"):
        fit(tmp_path / name)
    fit(tmp_path / "c", {"train": {"seed": 5}})
    first, second, other = (states(tmp_path / name)["agent"] for name in "abc")
    assert differences(first, second) == []
    assert differences(first, other) != []


@pytest.mark.parametrize(
    "over",
    [
        {
            "opponents": {"kind": "live"},
            "warm": {"kind": "none"},
            "env": {"original_painting": True, "tie": "win"},
        },
        {"opponents": {"kind": "live", "dummy_first": True}, "env": {"reward": "shaped"}},
        {"warm": {"kind": "multiscale"}, "env": {"reward": "multiscale", "bounds": "noop"}},
        {
            "warm": {"kind": "greedy"},
            "env": {"reward": "difference", "start": "centre"},
            "ppo": {"decay": "linear"},
        },
        {"warm": {"kind": "none"}, "ppo": {"value_first": 2}},
    ],
)
def test_every_switch_trains(tmp_path, fit, over):
    rows = fit(tmp_path / "run", over)
    played = [row for row in rows if row.get("phase") == "ppo"]
    assert len(played) == 4
    if over.get("opponents", {}).get("kind") == "live":
        assert all("win_vs_live" in row or "win_vs_dummy" in row for row in played)
    if "decay" in over.get("ppo", {}):
        assert [row["lr"] for row in played] == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4])
    if "value_first" in over.get("ppo", {}):
        assert [row["policy_loss"] == 0.0 for row in played] == [True, True, False, False]


def test_scores_that_are_made_one_by_one_train_without_a_plan(tmp_path, fit, fakes):
    with pytest.raises(ConfigError, match="one by one"):
        fit(tmp_path / "no", scorer=fakes.LazyScorer())
    over = {"warm": {"kind": "greedy"}, "env": {"reward": "shaped"}}
    rows = fit(tmp_path / "run", over, scorer=fakes.LazyScorer())
    assert len([row for row in rows if row.get("phase") == "ppo"]) == 4


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_other_networks_train_too(tmp_path, fit, name):
    agent = {"conv": {"name": "spars.cnn", "view_size": [8, 8, 6], "width": 8}, "mlp": {"name": "spars.mlp"}}
    fit(tmp_path / "run", {"agent": {"width": 8, **agent[name]}, "warm": {"steps": 1}, "ppo": {"updates": 1}})
    assert "agent" in states(tmp_path / "run")


def test_32_steps_of_one_game_make_four_updates(tmp_path, fit):
    ppo = {"envs": 1, "steps": 32, "minibatch": 8, "epochs": 1, "updates": 1, "entropy": 0.0}
    rows = fit(tmp_path / "run", {"ppo": ppo, "warm": {"kind": "none"}, "opponents": {"every": 32}})
    (row,) = [row for row in rows if row.get("phase") == "ppo"]
    assert row["updates"] == 4


def test_advantages_of_three_steps_are_those_of_the_specification():
    rewards = torch.tensor([[1.0], [1.0], [-1.0]])
    zeros = torch.zeros(3, 1)
    found, _ = generalised_advantage(rewards, zeros, zeros, torch.zeros(1), gamma=0.99, lam=0.95)
    assert found.flatten().tolist() == pytest.approx([1.05596, 0.0595, -1.0], abs=1e-5)


def test_truncated_episodes_have_the_value_of_what_they_left_and_terminated_ones_none(make_table):

    table = make_table()
    observer, agent = Observer.of(table), CompactAgent(8)
    torch.nn.init.constant_(agent.value.bias, 3.0)
    for tau, horizon in ((None, 2), (-1.0, 9)):
        env = HuntEnv(table, SignReward(), num_envs=3, tau=tau, horizon=horizon)
        env.reset()
        buffer = RolloutBuffer(2)
        train.play(env, Sighted(agent, observer), Opponents(agent, observer), buffer)
        assert bool(buffer["terminated"].any()) == (tau is not None)
        assert bool(buffer["truncated"][1].all()) == (tau is None)
        assert bool((buffer["final_values"][1] > 1.0).all()) == (tau is None)


def test_live_opponents_move_in_the_learners_own_forward(make_table, monkeypatch):

    table = make_table()
    observer, agent = Observer.of(table), CompactAgent(8)
    sizes = []
    original = CompactAgent.logits_and_values

    def counting(self, seen):
        sizes.append(len(seen["state"]))
        return original(self, seen)

    monkeypatch.setattr(CompactAgent, "logits_and_values", counting)
    courses = []
    for live in (True, False):
        opponents = Opponents(agent, observer, kind="live")
        if not live:
            monkeypatch.setattr(Opponents, "live", property(lambda self: False))
        env = HuntEnv(table, SignReward(), num_envs=3, tau=None, seed=2)
        env.reset()
        sizes.clear()
        buffer = RolloutBuffer(4)
        train.play(env, Sighted(agent, observer), opponents, buffer)
        assert sizes == ([6] * 4 + [3] if live else [3, 3] * 4 + [3])
        courses.append(env.node)
    assert torch.equal(*courses)


# -- warm start ----------------------------------------------------------------------------------------


def test_a_plan_leads_to_the_highest_score_from_everywhere(make_table):
    table = make_table()
    teacher = Teacher(table, "planned", gamma=0.9)
    lattice, full = table.lattices[0], table.full(0)
    far = planned(full, lattice, 0.9)
    goal = int(full.argmax())
    case = torch.zeros(lattice.size, dtype=torch.int64)
    node = lattice.nodes()
    for _ in range(sum(lattice.counts)):
        targets, knows = teacher.targets(case, node)
        assert bool(knows.all())
        node = move(node, targets.argmax(dim=1), torch.tensor(lattice.counts))
    reached = full.flatten()[lattice.flat(node)]
    best = float(full.flatten()[goal])
    assert float(reached.min()) > 0.4 * best
    assert far.shape == full.shape


def test_the_value_of_a_plan_solves_its_equation():
    scores = torch.rand(4, 3, 1, generator=torch.Generator().manual_seed(0))
    lattice = Lattice.of((7, 6, 4), (4, 4, 4), 1)
    assert lattice.counts == (4, 3, 1)
    value = planned(scores, lattice, 0.8)
    for x in range(4):
        for y in range(3):
            near = [(x + dx, y + dy) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
            best = max(float(value[a, b, 0]) for a, b in near if 0 <= a < 4 and 0 <= b < 3)
            assert float(value[x, y, 0]) == pytest.approx(float(scores[x, y, 0]) + 0.8 * best, abs=1e-5)
    with pytest.raises(ConfigError, match="gamma"):
        planned(scores, lattice, 1.0)


def test_a_teacher_without_an_opinion_teaches_nothing(make_table):
    table = make_table(volumes=[torch.zeros(24, 24, 16)])
    for kind in ("planned", "multiscale", "greedy"):
        targets, knows = Teacher(table, kind).targets(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3).long()
        )
        assert not knows.any()
        assert targets[0, [0, 2, 4]].tolist() == pytest.approx([1 / 3] * 3)
        logits = torch.randn(1, 6, requires_grad=True)
        legal = torch.tensor([[True, False] * 3])
        imitation_loss(logits, legal, targets, knows, 0.0).backward()
        assert not logits.grad.any()
    with pytest.raises(ConfigError, match="unknown"):
        Teacher(table, "oracle")


def test_the_greedy_teacher_names_the_best_neighbour(make_table):
    table = make_table()
    node = torch.tensor([[2, 2, 1]])
    targets, _ = Teacher(table, "greedy").targets(torch.zeros(1, dtype=torch.int64), node)
    full = table.full(0)
    values = [full[2, 2, 2], full[2, 2, 0], full[2, 3, 1], full[2, 1, 1], full[3, 2, 1], full[1, 2, 1]]
    assert int(targets.argmax()) == int(torch.stack(values).argmax())


def test_collected_states_are_those_of_both_windows_with_their_trails(make_table):
    table = make_table()
    env = HuntEnv(table, SignReward(), num_envs=4, tau=None, horizon=4)
    env.reset()
    seen, legal = walk_with(env, Teacher(table, "greedy"), torch.Generator().manual_seed(0), 40)
    assert len(legal) == len(seen["case"]) == 40
    assert torch.equal(legal, table.lattices.legal(seen["case"].flatten(), seen["node"][:, 0]))
    assert len(seen["time"].unique()) == 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_policy_that_never_sees_a_score_finds_balls_in_new_volumes(fakes, make_table, seed):
    """Final windows on the ball: at least 0.8, and 0.4 more often than a random walk."""
    shape = (32, 32, 24)
    learned = make_table(volumes=fakes.blobs(12, shape=shape, seed=10 + seed))
    unseen = make_table(volumes=fakes.blobs(8, shape=shape, seed=20 + seed))
    torch.manual_seed(seed)
    agent, observer = CompactAgent(64), Observer.of(learned)
    agent.fit_scales(observer)
    policy, teacher = Sighted(agent, observer), Teacher(learned)
    env = HuntEnv(learned, SignReward(), num_envs=32, tau=None, seed=seed)
    env.reset()
    step = plain_step(torch.optim.Adam(agent.parameters(), lr=3e-3), 0.5)
    for number in range(60):
        generator = torch.Generator().manual_seed(number)
        seen, legal = walk_with(env, teacher, generator, 256)
        targets, knows = teacher.targets(seen["case"].flatten(), seen["node"][:, 0])
        step(imitation_loss(policy.logits_and_values(seen)[0], legal, targets, knows, 0.01))

    def hits(by):
        plan, found = Episodes(episodes=4, steps=24), []
        for index in range(len(unseen)):
            visits = run(by, unseen, index, plan, torch.Generator().manual_seed(index))
            case = torch.full((len(visits.final),), index)
            found.append((unseen.scores(case, visits.final) > 0.15).float().mean())
        return float(torch.stack(found).mean())

    trained, chance = hits(SelfPlay(agent, Observer.of(unseen), greedy=True)), hits(RandomWalk())
    assert trained >= 0.8
    assert trained >= chance + 0.4


def test_ranks_share_the_volumes():
    assert sorted(train.share(7, 0, 3) + train.share(7, 1, 3) + train.share(7, 2, 3)) == list(range(7))
    assert train.share(2, 2, 3) == [0, 1]
