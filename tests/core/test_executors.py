"""Executors: order, logs, exit codes, dependencies, and what happens when the one who started them goes."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.executors import LocalExecutor, Resources, Task, make_executor, parse_resources
from medrl.core.executors import cluster as cluster_module
from medrl.core.executors.local import visible_gpus
from medrl.core.executors.tasks import LEFT_OUT, check_tasks
from medrl.core.runlog.lock import process_alive


class Shell(Task):
    """A task whose command is a line of Python, so that no torch is loaded."""

    def command(self):
        return [sys.executable, "-c", self.arguments[0]]


def shell(name, line, **options):
    return Shell(name=name, arguments=(line,), **options)


def news():
    told = []
    return told, lambda what, task, end: told.append((what, task.name, None if end is None else end.code))


def test_tasks_are_done_in_order_and_each_has_its_log(tmp_path):
    told, tell = news()
    tasks = [shell("a", "print('one')"), shell("b", "import sys; sys.stderr.write('two'); sys.exit(3)")]
    ends = LocalExecutor(1).run(tasks, folder=tmp_path / "logs", tell=tell)
    assert [(name, end.code) for name, end in ends.items()] == [("a", 0), ("b", 3)]
    assert [ends[name].log.read_text().strip() for name in ("a", "b")] == ["one", "two"]
    assert told == [("started", "a", None), ("ended", "a", 0), ("started", "b", None), ("ended", "b", 3)]


def test_no_more_tasks_than_allowed_run_at_a_time(tmp_path):
    line = (
        "import os, time; from pathlib import Path;"
        f"mine = Path({str(tmp_path)!r}) / f'here_{{os.getpid()}}'; mine.touch(); time.sleep(0.3);"
        f"print(len(list(Path({str(tmp_path)!r}).glob('here_*')))); mine.unlink()"
    )
    tasks = [shell(f"t{number}", line) for number in range(4)]
    ends = LocalExecutor(2).run(tasks, folder=tmp_path / "logs")
    counts = [int(end.log.read_text()) for end in ends.values()]
    assert max(counts) == 2


def test_a_task_whose_forerunner_failed_is_not_begun_and_the_others_are(tmp_path):
    tasks = [
        shell("first", "raise SystemExit(4)"),
        shell("second", "print('never')", after=("first",)),
        shell("third", "print('never')", after=("second",)),
        shell("other", "print('done')"),
    ]
    ends = LocalExecutor(2).run(tasks, folder=tmp_path)
    assert {name: end.code for name, end in ends.items()} == {
        "first": 4,
        "second": LEFT_OUT,
        "third": LEFT_OUT,
        "other": 0,
    }
    assert "first" in ends["second"].why
    assert not (tmp_path / "second.log").exists()


def test_a_task_begins_only_when_its_forerunner_has_ended(tmp_path):
    tasks = [
        shell("first", f"import time; time.sleep(0.3); open({str(tmp_path / 'x')!r}, 'w').write('1')"),
        shell("second", f"print(open({str(tmp_path / 'x')!r}).read())", after=("first",)),
    ]
    ends = LocalExecutor(2).run(tasks, folder=tmp_path)
    assert ends["second"].log.read_text().strip() == "1"


def test_a_task_killed_by_a_signal_has_the_code_of_a_shell(tmp_path):
    ends = LocalExecutor().run(
        [shell("a", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], folder=tmp_path
    )
    assert ends["a"].code == 128 + signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_tasks_are_told_when_the_one_who_started_them_ends(tmp_path, how):
    if how == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells a process that its parent was killed")
    child = (
        f"import os, signal, time; from pathlib import Path; root = Path({str(tmp_path)!r});"
        "signal.signal(signal.SIGTERM, lambda *_: ((root / 'saved').touch(), os._exit(143)));"
        "(root / 'pid').write_text(str(os.getpid()));"
        "time.sleep(60)"
    )
    parent = (
        "import signal, sys; from pathlib import Path;"
        "from medrl.core.executors import LocalExecutor, Task;"
        "Task.command = lambda self: [sys.executable, '-c', self.arguments[0]];"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"LocalExecutor().run([Task(name='a', arguments=({child!r},))], folder=Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(how)
    process.wait(60)
    while process_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process_alive(pid)
    assert (tmp_path / "saved").exists()


def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeFault, match="file"):
        LocalExecutor().run([shell("a", "pass")], folder=tmp_path / "file" / "logs")


@pytest.mark.parametrize(
    ("tasks", "what"),
    [
        ([Task(name="a", arguments=()), Task(name="a", arguments=())], "two tasks"),
        ([Task(name="a", arguments=(), after=("b",)), Task(name="b", arguments=())], "not before it"),
        ([Task(name="../a", arguments=())], "no file name"),
    ],
)
def test_tasks_that_contradict_each_other_are_refused(tasks, what):
    with pytest.raises(ConfigError, match=what):
        check_tasks(tasks)


def test_each_place_has_a_gpu_of_its_own_where_there_are_several(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert visible_gpus() == ["4", "7"]
    line = "import os, time; time.sleep(0.3); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    ends = LocalExecutor(2).run([shell("a", line), shell("b", line)], folder=tmp_path)
    assert sorted(end.log.read_text().strip() for end in ends.values()) == ["4", "7"]


def test_resources_are_read_and_the_rest_are_options_of_sbatch():
    found = parse_resources(["minutes=90", "gpus=2", "memory_gb=7.5", "partition=gpu", "constraint=a100"])
    assert found == Resources(
        minutes=90, gpus=2, memory_gb=7.5, partition="gpu", options={"constraint": "a100"}
    )


@pytest.mark.parametrize("text", ["minutes", "minutes=", "minutes=soon", "memory_gb=-1", "=3"])
def test_a_resource_that_is_none_is_named(text):
    with pytest.raises(ConfigError, match="--resource"):
        parse_resources([text])


def test_an_unknown_executor_is_refused():
    with pytest.raises(ConfigError, match="cloud"):
        make_executor("cloud")


# -- submitit ----------------------------------------------------------------------------------------


@pytest.fixture
def submitit_here():
    pytest.importorskip("submitit")
    return make_executor("submitit", jobs=2, resources=Resources(cpus=1, memory_gb=1, minutes=5))


def version(name, **options):
    return Task(name=name, arguments=("--version",), **options)


def test_submitit_does_tasks_in_order_and_gives_their_codes(tmp_path, submitit_here):
    tasks = [version("good"), Task(name="bad", arguments=("nonsense",)), version("late", after=("bad",))]
    ends = submitit_here.run(tasks, folder=tmp_path / "logs")
    assert {name: end.code for name, end in ends.items()} == {"good": 0, "bad": 2, "late": LEFT_OUT}
    assert "medrl" in ends["good"].log.read_text()
    assert "no command" in ends["bad"].log.read_text() or "nonsense" in ends["bad"].log.read_text()


def test_without_slurm_the_message_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no Slurm machine") as error:
        make_executor("slurm").run([version("a")], folder=tmp_path / "logs")
    assert "--executor local" in error.value.do


def test_a_full_folder_is_not_taken_for_a_refusal_of_the_queue(tmp_path, monkeypatch, submitit_here):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("submitit.core.utils.cloudpickle_dump", lambda data, path: full(path, data))
    with pytest.raises(RuntimeFault, match="logs cannot be written: No space left"):
        submitit_here.run([version("a")], folder=tmp_path / "logs")


def write_tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def test_a_queue_that_does_not_answer_is_not_taken_for_a_refusal(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    write_tool(tmp_path, "srun", "")
    for name in ("sbatch", "squeue"):
        write_tool(tmp_path, name, "raise SystemExit('no controller is there')")
    with pytest.raises(RuntimeFault, match="Slurm does not answer: .*no controller is there"):
        make_executor("slurm").run([version("a")], folder=tmp_path / "logs")


def test_the_state_of_jobs_is_read_from_the_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines = "11|RUNNING|None\\n12_0|PENDING|Dependency\\n13|PENDING|DependencyNeverSatisfied\\n14|FAILED|x"
    write_tool(tmp_path, "squeue", f"print('{lines}')")
    assert cluster_module.queue_states() == {
        "11": "RUNNING",
        "12_0": "PENDING",
        "13": "CANCELLED",
        "14": "FAILED",
    }
    write_tool(tmp_path, "squeue", "raise SystemExit(1)")
    assert cluster_module.queue_states() is None


def test_a_job_that_is_told_to_go_lets_its_process_save_first(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    import threading

    line = (
        "import os, signal, time; from pathlib import Path;"
        f"root = Path({str(tmp_path)!r});"
        "signal.signal(signal.SIGTERM, lambda *_: ((root / 'saved').touch(), os._exit(143)));"
        "(root / 'ready').touch(); time.sleep(60)"
    )
    work = cluster_module.CommandJob(shell("a", line), tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path)

    class Leave(Exception):
        pass

    def signalled(*_):
        assert work.checkpoint().function.task is work.task
        raise Leave

    before = signal.signal(signal.SIGUSR2, signalled)

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=send, daemon=True).start()
    try:
        with pytest.raises(Leave):
            work()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").exists()
    assert not cluster_module.code_file(tmp_path, work.task).exists(), "the job is not over"
