"""A loop that was stopped or killed anywhere and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import signal

import pytest

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.plugins.rl4seg import loop

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.errors import Interrupted
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.core.stages import Pipeline
from medrl.plugins.rl4seg import loop, pair_stage

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
log, mark, write = Runtime.log, Pipeline._mark, pair_stage.write
rank, when = int(os.environ.get("RANK", "0")), [None, 0, None]
codes = []

def strike():
    number, when[2] = when[2], None
    if number is not None:
        os.kill(os.getpid(), number)

def counted_log(self, step, **metrics):
    log(self, step, **metrics)
    if self.run.dir.name.endswith("_" + str(when[0])) and step == when[1]:
        strike()

def between(self, name, record):
    mark(self, name, record)
    if record["state"] == "done" and when[0] == "after" and name.endswith(str(when[1])):
        strike()

def while_writing(job, data, folder, device, beat):
    if when[0] == "pairs":
        strike()
    return write(job, data, folder, device, beat)

Runtime.log, Pipeline._mark, pair_stage.write = counted_log, between, while_writing
for task in sys.argv[3:]:
    when[:] = [None, 0, None]
    if task != "go":
        how, place, step, who = task.split(":")
        when[:] = [place, int(step) if step.isdigit() else step, getattr(signal, how)]
        if int(who) != rank:
            when[2] = None
    try:
        loop.run(build_train_job(manager, "rl4seg", config, Path(sys.argv[2])))
        codes.append("finished")
    except Interrupted as error:
        codes.append(error.exit_code)
if rank == 0:
    print("CODES", json.dumps(codes))
"""


def runs(folder, script_folder, small, tools, *tasks, values=None, ranks=1):
    """Do the tasks one after the other on one run folder."""
    (script_folder / "config.json").write_text(json.dumps(small(values)))
    return tools.launch(script_folder, SCRIPT, script_folder / "config.json", folder, *tasks, ranks=ranks)


def codes_in(said):
    (line,) = [line for line in said.splitlines() if line.startswith("CODES")]
    return json.loads(line.removeprefix("CODES "))


def assert_same(one, two, tools):
    """Compare every stage and the result of two loops."""
    assert tools.differences(tools.states(one), tools.states(two)) == []
    for folder in sorted(one.glob("stages/*/checkpoints")):
        name = folder.parent.name
        a, b = (load_checkpoint(find_checkpoint(run / "stages" / name, "last")) for run in (one, two))
        assert a.meta["step"] == b.meta["step"]
        assert tools.differences(a.states, b.states, name) == []
        assert tools.differences(a.ranks, b.ranks, name) == []
        texts = [(run / "stages" / name / "metrics.jsonl").read_text() for run in (one, two)]
        assert texts[0] == texts[1], name
    first, second = (json.loads((run / "test.json").read_text()) for run in (one, two))
    assert first == second
    rows = [tools.records(run) for run in (one, two)]
    assert [row["stage"] for row in rows[0]] == [row["stage"] for row in rows[1]]


def test_sigterm_in_every_stage_saves_and_the_loop_goes_on_to_the_same_weights(
    tmp_path, small, tools, loop_run
):
    places = ["source:3", "style:1", "corrector:2", "pairs:0", "reward_1:3", "ppo_1:1", "ppo_1:3"]
    tasks = [f"SIGTERM:{place}:0" for place in places]
    codes, said = runs(tmp_path / "run", tmp_path, small, tools, *tasks, "go")
    assert codes == [0], said
    assert codes_in(said) == [143] * len(tasks) + ["finished"], said
    assert_same(loop_run, tmp_path / "run", tools)


@pytest.mark.parametrize("place", ["style:3", "after:05_reward_1", "ppo_1:3"])
def test_a_kill_in_a_stage_or_between_two_loses_nothing(tmp_path, small, tools, loop_run, make_job, place):
    codes, said = runs(tmp_path / "run", tmp_path, small, tools, f"SIGKILL:{place}:0")
    assert codes == [-signal.SIGKILL], said
    loop.run(make_job(tmp_path / "run", resume="must"))
    assert_same(loop_run, tmp_path / "run", tools)


ORIGINAL = {
    "ppo": {"baseline": "critic", "entropy": 0.05, "algorithm": "ppo", "select": "best"},
    "reward": {"nets": 2, "schedule": "plateau", "select": "best"},
    "loop": {"iterations": 2, "shrink_perturb": True},
}


def test_critic_guard_and_several_nets_resume_too(tmp_path, small, tools, make_job):
    straight = tmp_path / "straight"
    loop.run(make_job(straight, ORIGINAL))
    tasks = ["SIGTERM:reward_1:3:0", "SIGTERM:ppo_1:3:0", "SIGTERM:ppo_2:1:0", "go"]
    codes, said = runs(tmp_path / "stopped", tmp_path, small, tools, *tasks, values=ORIGINAL)
    assert codes == [0], said
    assert codes_in(said) == [143, 143, 143, "finished"]
    assert_same(straight, tmp_path / "stopped", tools)
    held = tools.states(tools.stage_of(straight, "ppo_2"))
    assert set(held) == {"actor", "critic", "actor_optimizer", "critic_optimizer", "guard", "watch"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, small, tools):
    """A straight loop in two ranks, and one of which one rank got SIGTERM in three stages."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for name, tasks in (
        ("straight", ["go"]),
        ("stopped", ["SIGTERM:style:2:1", "SIGTERM:pairs:0:0", "SIGTERM:ppo_1:3:1", "go"]),
    ):
        place = folder / f"{name}_script"
        place.mkdir()
        codes, said = runs(folder / name, place, small, tools, *tasks, ranks=2)
        assert codes == [0, 0], said
        assert codes_in(said) == [143] * (len(tasks) - 1) + ["finished"], said
    return folder


@pytest.mark.ddp
def test_two_ranks_resume_bit_for_bit_too(two_ranks, tools):
    assert_same(two_ranks / "straight", two_ranks / "stopped", tools)
    ppo = load_checkpoint(find_checkpoint(tools.stage_of(two_ranks / "straight", "ppo_1"), "last"))
    assert len(ppo.ranks) == 2


@pytest.mark.ddp
def test_two_ranks_do_every_stage(two_ranks, tools):
    stages = json.loads((two_ranks / "straight" / "stages.json").read_text())["stages"]
    assert len(stages) == 7
    assert {record["state"] for record in stages.values()} == {"done"}
    for kind in ("source", "style", "corrector", "reward_1", "ppo_1"):
        manifest = json.loads((tools.stage_of(two_ranks / "straight", kind) / "manifest.json").read_text())
        assert (manifest["status"], manifest["world_size"]) == ("finished", 2)
