"""``--requeue``: what a run does when Slurm is about to end its job."""

import sys

import pytest


@pytest.fixture
def job(toy, monkeypatch, tmp_path):
    """A Slurm job of one process, whose scontrol writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "scontrol"
    write = f"open({str(tmp_path / 'called')!r}, 'a').write(' '.join(sys.argv[1:]))"
    tool.write_text(f"#!{sys.executable}\nimport sys; {write}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "called"


def test_a_run_that_a_signal_stopped_is_queued_again_and_goes_on(medrl, toy, job, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "signal")
    answer = medrl("train", "toy", "-o", "r", "--requeue")
    assert answer.code == 143
    assert job.read_text() == "requeue 41"
    assert "job 41 is queued again" in answer.err
    monkeypatch.delenv("MEDRL_TOY_FAIL")
    assert medrl("train", "toy", "-o", "r", "--requeue").code == 0
    assert job.read_text() == "requeue 41", "a run that ended well is not queued again"
    assert '"resumed": true' in (toy / "r" / "manifest.json").read_text()


def test_a_task_of_a_job_array_is_queued_again_alone(medrl, job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("MEDRL_TOY_FAIL", "signal")
    assert medrl("train", "toy", "-o", "r", "--requeue").code == 143
    assert job.read_text() == "requeue 40_3"


@pytest.mark.parametrize(("kind", "code"), [("DataError", 3), ("RuntimeFault", 1)])
def test_a_run_that_failed_is_not_queued_again(medrl, job, monkeypatch, kind, code):
    monkeypatch.setenv("MEDRL_TOY_FAIL", kind)
    assert medrl("train", "toy", "-o", "r", "--requeue").code == code
    assert not job.exists()


def test_without_the_option_nothing_is_queued_again(medrl, job, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "signal")
    assert medrl("train", "toy", "-o", "r").code == 143
    assert not job.exists()


def test_other_ranks_than_the_first_leave_it_to_that_one(medrl, job, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEDRL_TOY_FAIL", "signal")
    assert medrl("train", "toy", "-o", "r", "--requeue").code == 143
    assert not job.exists()


def test_outside_a_job_it_is_refused(medrl, toy, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    answer = medrl("train", "toy", "-o", "r", "--requeue")
    assert (answer.code, "this is no Slurm job" in answer.err) == (2, True)
    assert not (toy / "r").exists()
