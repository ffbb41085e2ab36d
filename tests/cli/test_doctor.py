import json
import resource
from itertools import pairwise

import pytest

from medrl.cli import doctor as module
from medrl.cli.doctor import satisfies


def findings(answer):
    return json.loads(answer.out)["findings"]


def test_every_area_is_examined_and_a_broken_plugin_is_a_problem_with_a_fix(medrl):
    answer = medrl("doctor", "--json")
    found = findings(answer)
    assert {item["area"] for item in found} >= {"python", "packages", "cpu", "gpu", "ranks", "plugin"}
    problems = [item for item in found if item["state"] == "problem"]
    assert [item["what"].split()[0] for item in problems] == ["wreck"]
    assert problems[0]["do"]
    assert answer.code == 1


def test_each_problem_has_one_fix_command(medrl):
    answer = medrl("doctor")
    lines = answer.err.splitlines()
    for line, below in pairwise(lines):
        if line.startswith("problem"):
            assert below.startswith("         do: ")


def test_it_names_distribution_and_file_of_each_plugin(medrl):
    text = medrl("doctor").err
    assert "toy of medrl-toy 1.2 (third-party)" in text
    assert "medrl_toy/plugin.py" in text


def test_without_problems_the_exit_code_is_0_and_notes_count_with_strict_only(medrl, monkeypatch):
    note = module.Finding("x", "limited", module.NOTE, "fix it")
    monkeypatch.setattr(module, "examinations", lambda _ctx: [("x", lambda: iter([note]))])
    assert medrl("doctor").code == 0
    assert "do: fix it" in medrl("doctor").err
    assert medrl("doctor", "--strict").code == 1


def test_an_examination_that_fails_is_a_problem_and_the_others_go_on(medrl, monkeypatch):
    def bad():
        raise OSError("no")
        yield

    good = module.Finding("y", "fine")
    monkeypatch.setattr(module, "examinations", lambda _ctx: [("x", bad), ("y", lambda: iter([good]))])
    answer = medrl("doctor", "--json")
    assert [item["state"] for item in findings(answer)] == ["problem", "ok"]
    assert answer.code == 1


def test_few_open_files_and_little_shared_memory_are_notes_with_a_command(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 1_000_000))
    (limit,) = module.open_files()
    assert (limit.state, limit.do) == ("note", "ulimit -n 65536")
    monkeypatch.setattr(module, "SHARED_MEMORY", 10**18)
    (memory,) = module.shared_memory()
    assert (memory.state, "--shm-size" in memory.do) == ("note", True)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("1.2.1", ">=1.2,<2", True),
        ("2.0", ">=1.2,<2", False),
        ("2", "<2", False),
        ("1.0", "", True),
        ("3.0.1", "!=3.0.1", False),
        ("1.4.9", "~=1.4", True),
        ("2.0", "~=1.4", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, fits):
    assert satisfies(version, wanted) is fits


# -- what scaling needs ------------------------------------------------------------------------------


def of(area, found):
    return [item for item in found if item.area == area]


def tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine on which no other program is found, outside any job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_it_tells_that_slurm_is_absent(bare):
    (finding,) = module.slurm()
    assert (finding.state, finding.what) == (module.GOOD, "not here: --executor local")


def test_it_tells_whether_slurm_answers(bare, monkeypatch):
    for name in ("sbatch", "srun"):
        tool(bare, name, "exit 0")
    tool(bare, "squeue", 'if [ "$1" = --version ]; then echo slurm 22.05.8; else echo a; echo b; fi')
    monkeypatch.setattr(module, "_installed", lambda name: name != "submitit")
    answer, submitit = module.slurm()
    assert answer.what == "slurm 22.05.8 answers; 2 jobs of yours in the queue"
    assert submitit.do == "pip install 'medrl[slurm]'"
    tool(bare, "squeue", 'if [ "$1" = --version ]; then echo slurm 22.05.8; else echo no >&2; exit 1; fi')
    (silent,) = module.slurm()
    assert (silent.state, silent.do) == (module.NOTE, "scontrol ping")
    assert "does not answer: no" in silent.what


def test_it_tells_the_job_and_how_often_it_was_started_again(bare, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert next(iter(module.slurm())).what == "inside job 17, started again 2 times, on n[1-2]"


def test_it_tells_the_rank_that_a_launcher_gave(bare, monkeypatch):
    assert next(iter(module.launcher())).what.startswith("one process")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert next(iter(module.launcher())).what == "rank 1 of 4, local rank 1, started by torchrun"
    monkeypatch.setenv("RANK", "9")
    assert next(iter(module.launcher())).state == module.BAD


def test_it_tells_the_free_memory(monkeypatch):
    (finding,) = module.memory()
    assert "free" in finding.what
    monkeypatch.setattr(module, "FREE_MEMORY", 2**60)
    (little,) = module.memory()
    assert (little.state, "--max-memory" in little.do) == (module.NOTE, True)
