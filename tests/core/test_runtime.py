"""The runtime in one process: loop, resume, precision, accumulation, agreement, conditions."""

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medrl.core.errors import CheckpointError, ConfigError, DataError, RuntimeFault
from medrl.core.runtime import ResumableLoader, detect_ranks
from medrl.core.runtime.ranks import first_host
from medrl.core.runtime.session import choose_device, git_commit

sys.path.insert(0, str(Path(__file__).parent / "ranks"))
import toy_run as toy


def records(folder):
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2}, {"workers": 1}]
)
def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path, options):
    toy.train(tmp_path / "a", 6, **options)
    toy.train(tmp_path / "b", 3, **options)
    toy.train(tmp_path / "b", 6, **options)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")


def test_a_run_killed_between_checkpoints_resumes_bit_for_bit(tmp_path):
    class Killed(BaseException):
        pass

    def kill(_rt, step):
        if step == 6:
            raise Killed

    toy.train(tmp_path / "a", 8)
    with pytest.raises(Killed):
        toy.train(tmp_path / "b", 8, before=kill)
    assert [record["step"] for record in records(tmp_path / "b")] == [1, 2, 3, 4, 5]
    toy.train(tmp_path / "b", 8)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b"), (
        "records after the resumed step are written once"
    )


def test_the_state_comparison_can_fail(tmp_path):
    toy.train(tmp_path / "a", 3)
    toy.train(tmp_path / "b", 3, seed=2)
    a, b = toy.state_of(tmp_path / "a"), toy.state_of(tmp_path / "b")
    assert all(a[key] != b[key] for key in ("states", "ranks"))


def test_augmentation_and_order_do_not_depend_on_the_number_of_workers(tmp_path):
    toy.train(tmp_path / "a", 5, workers=0)
    toy.train(tmp_path / "b", 5, workers=2)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")


def test_early_end_of_the_loop_saves_the_last_step(tmp_path):
    with toy.make_job(tmp_path / "run", 9, checkpoint_every=100).runtime() as rt:
        net = rt.prepare(nn.Linear(3, 1))
        rt.checkpoint.register(net=net)
        for step in rt.steps(rt.checkpoint.resume(), 9):
            if step == 4:
                break
    assert toy.state_of(tmp_path / "run")["step"] == 3


def test_extending_a_run_is_allowed_and_a_finished_run_does_nothing_more(tmp_path):
    toy.train(tmp_path / "run", 3)
    before = toy.state_of(tmp_path / "run")
    toy.train(tmp_path / "run", 3)
    assert toy.state_of(tmp_path / "run") == before
    toy.train(tmp_path / "run", 4)
    assert toy.state_of(tmp_path / "run")["step"] == 4


def test_resume_must_needs_a_run_and_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no run to go on with"):
        toy.train(tmp_path / "run", 3, resume="must")
    with toy.make_job(tmp_path / "run", 3).runtime():
        pass
    with pytest.raises(CheckpointError, match="no checkpoint"):
        toy.train(tmp_path / "run", 3, resume="must")
    toy.train(tmp_path / "run", 3)
    toy.train(tmp_path / "run", 4, resume="must")


def test_resume_never_refuses_an_existing_run(tmp_path):
    toy.train(tmp_path / "run", 2, resume="never")
    with pytest.raises(ConfigError, match="already holds a run"):
        toy.train(tmp_path / "run", 3, resume="never")


def test_a_loop_that_ignores_its_checkpoints_is_an_error_and_not_a_restart(tmp_path):
    toy.train(tmp_path / "run", 2)
    with (
        toy.make_job(tmp_path / "run", 4).runtime() as rt,
        pytest.raises(RuntimeFault, match="did not look at them"),
    ):
        next(iter(rt.steps(0, 4)))


# -- the loop -----------------------------------------------------------------------------------------


def test_steps_are_numbered_from_one_and_progress_is_reported(tmp_path):
    seen = []
    progress = {"progress": lambda step, total, metrics: seen.append((step, total, sorted(metrics)))}
    toy.train(tmp_path / "run", 3, extra=progress)
    names = ["applied", "grad_norm", "loss", "rank"]
    assert seen == [(1, 3, names), (2, 3, names), (3, 3, names)]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]


def test_a_fast_development_run_takes_two_steps(tmp_path):
    from dataclasses import replace

    with replace(toy.make_job(tmp_path / "run", 50), fast_dev_run=True).runtime() as rt:
        toy.fit(rt)
    assert toy.state_of(tmp_path / "run")["step"] == 2


def test_the_manifest_says_what_ran(tmp_path):
    import json

    toy.train(tmp_path / "run", 2)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert (manifest["method"], manifest["step"], manifest["seed"], manifest["world_size"]) == (
        "toy",
        2,
        1,
        1,
    )
    assert str(torch.__version__).startswith(manifest["versions"]["torch"].partition("+")[0])
    assert (tmp_path / "run" / "command.txt").read_text() == "medrl train toy\n"


def test_observers_are_told_of_start_metrics_checkpoints_and_end(tmp_path):
    manager = toy.Manager()
    toy.train(tmp_path / "run", 2, manager=manager)
    hooks = [hook for hook, _ in manager.told]
    assert hooks == [
        "medrl_run_started",
        "medrl_metrics_logged",
        "medrl_metrics_logged",
        "medrl_checkpoint_saved",
        "medrl_run_finished",
    ]
    facts = dict(manager.told)
    assert facts["medrl_run_finished"]["outcome"] == "finished"
    assert facts["medrl_checkpoint_saved"]["path"].name == "step_000002.pt"
    assert facts["medrl_metrics_logged"]["metrics"]["loss"] == records(tmp_path / "run")[-1]["loss"]


def test_logged_tensors_are_plain_numbers_and_lists(tmp_path):
    weight = torch.tensor([0.25, 0.75], requires_grad=True)
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        rt.log(1, loss=weight.sum() * 2, weights=weight, mode="reinforce", bad=float("nan"), on=True)
    assert records(tmp_path / "run") == [
        {"step": 1, "loss": 2.0, "weights": [0.25, 0.75], "mode": "reinforce", "bad": None, "on": 1.0}
    ]


def test_the_best_metric_survives_a_resume_and_nan_is_never_best(tmp_path):
    def run(steps, values):
        with toy.make_job(tmp_path / "run", steps).runtime() as rt:
            net = rt.prepare(nn.Linear(2, 1))
            rt.checkpoint.register(net=net)
            return [
                rt.best(step, values[step - 1], name="dice")
                for step in rt.steps(rt.checkpoint.resume(), steps)
            ]

    assert run(3, [float("nan"), 0.5, 0.4]) == [False, True, False]
    assert run(5, [0, 0, 0, 0.45, 0.6]) == [False, True]
    from medrl.core.checkpoint import load_checkpoint
    from medrl.core.runlog import RunFolder

    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt").meta["metric"] == 0.6
    assert RunFolder.open(tmp_path / "run", lock=False).manifest["best"] == {
        "name": "dice",
        "metric": 0.6,
        "step": 5,
    }


def test_a_smaller_metric_is_better_when_minimised(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        assert [rt.best(1, value, maximise=False) for value in (0.5, 0.6, 0.4)] == [True, False, True]


def test_a_failure_is_recorded_with_step_and_cases(tmp_path, caplog):
    manager = toy.Manager()

    def fail(rt, step):
        if step == 3:
            rt.backward(torch.ones(1, requires_grad=True).sum(), cases=["case_x"])
            raise DataError("case case_x", why="cannot be read", case="case_x")

    with caplog.at_level(logging.ERROR, "medrl"), pytest.raises(DataError):
        toy.train(tmp_path / "run", 5, before=fail, manager=manager)
    assert manager.told[-1][1]["outcome"] == "failed"
    assert "at step 3 (cases case_x): DataError: case case_x: cannot be read" in caplog.text
    assert "step 3" in (tmp_path / "run" / "log.txt").read_text()
    from medrl.core.runlog import RunFolder

    assert RunFolder.open(tmp_path / "run", lock=False).status == "failed"
    assert toy.state_of(tmp_path / "run")["step"] == 2


# -- computing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_follows_the_configured_precision(tmp_path, precision, dtype):
    with toy.make_job(tmp_path / "run", 1, precision=precision).runtime() as rt:
        net = rt.prepare(nn.Linear(3, 1))
        with rt.autocast():
            assert net(torch.zeros(1, 3)).dtype is dtype


def one_step(folder, batches, *, clip_norm=0.0, **options):
    with toy.make_job(folder, 1, **options).runtime() as rt:
        torch.manual_seed(0)
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        for _ in rt.steps(rt.checkpoint.resume(), 1):
            for index in rt.micro_batches():
                rt.backward(net(batches[index]).pow(2).mean())
            info = rt.step(optimizer, clip_norm=clip_norm)
    return net, info


def test_two_micro_batches_make_the_gradient_of_their_union(tmp_path):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    whole, _ = one_step(tmp_path / "a", [x])
    halves, _ = one_step(tmp_path / "b", [x[:2], x[2:]], accumulate=2)
    torch.testing.assert_close(whole.weight, halves.weight, rtol=1e-6, atol=1e-7)


def test_clipping_limits_the_step_and_reports_the_norm_before(tmp_path):
    x = 100 * torch.ones(4, 2)
    net, info = one_step(tmp_path / "a", [x], clip_norm=1.0)
    torch.manual_seed(0)
    start = nn.Linear(2, 1)
    moved = torch.cat([(net.weight - start.weight).flatten(), net.bias - start.bias]).norm()
    assert info.applied
    assert info.grad_norm > 1000
    assert moved.item() == pytest.approx(0.1, rel=1e-4)


def test_a_method_that_ignores_accumulation_is_told(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"train\.accumulate is 4"),
        toy.make_job(tmp_path / "run", 2, accumulate=4).runtime() as rt,
    ):
        for _ in rt.steps(rt.checkpoint.resume(), 2):
            pass


def test_deterministic_algorithms_are_set_for_the_run_only(tmp_path):
    with toy.make_job(tmp_path / "run", 1, deterministic=True).runtime():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_set(tmp_path):
    before = torch.get_num_threads()
    try:
        with toy.make_job(tmp_path / "run", 1, threads=2).runtime():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_signal_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with toy.make_job(tmp_path / "run", 1).runtime():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_device_that_does_not_exist_is_a_config_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees 0 CUDA"):
        choose_device("cuda:1")
    with pytest.raises(ConfigError, match="no Apple GPU"):
        choose_device("mps")


# -- conditions ---------------------------------------------------------------------------------------


def test_an_unregistered_trainable_module_is_an_error_before_the_first_step(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net, projection = rt.prepare(nn.Linear(2, 1), nn.Bilinear(2, 2, 1))
        rt.checkpoint.register(net=net)
        with pytest.raises(RuntimeFault, match="Bilinear is not registered"):
            next(iter(rt.steps(rt.checkpoint.resume(), 1)))
        projection.requires_grad_(False)
        assert next(iter(rt.steps(0, 1))) == 1


def test_a_part_of_a_registered_module_counts_as_registered(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        rt.prepare(whole[0], whole[1])
        rt.checkpoint.register(whole=whole)
        assert next(iter(rt.steps(rt.checkpoint.resume(), 1))) == 1


def step_with(rt, net, optimizer):
    rt.backward(net(torch.ones(1, 2)).sum())
    return rt.step(optimizer)


def test_an_unregistered_optimiser_is_an_error_at_its_first_step(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        rt.checkpoint.register(net=net)
        with pytest.raises(RuntimeFault, match="optimiser SGD is not registered"):
            step_with(rt, net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_parameter_that_appears_after_prepare_is_an_error_at_the_first_step(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net = rt.prepare(nn.Sequential(nn.Linear(2, 2)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        net.add_module("late", nn.Linear(2, 1))
        with pytest.raises(RuntimeFault, match=r"late\.weight of Sequential appeared after"):
            step_with(rt, net, optimizer)


def test_lazy_layers_are_refused(tmp_path):
    with (
        toy.make_job(tmp_path / "run", 1).runtime() as rt,
        pytest.raises(RuntimeFault, match="has no shape yet"),
    ):
        rt.prepare(nn.LazyLinear(3))


def test_an_optimiser_of_foreign_parameters_is_an_error(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(7))], lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        with pytest.raises(RuntimeFault, match=r"shape \(7,\) that belongs to no prepared module"):
            step_with(rt, net, optimizer)


def test_a_step_without_gradients_says_so(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        info = rt.step(optimizer)
        assert (info.applied, info.reason) == (False, "no gradient")


# -- agreeing, alone ----------------------------------------------------------------------------------


def test_reducing_and_gathering_alone_keeps_values_and_sorts_cases(tmp_path):
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        assert [rt.reduce(2.5, op) for op in ("mean", "sum", "max", "min", "any")] == [
            2.5,
            2.5,
            2.5,
            2.5,
            1.0,
        ]
        torch.testing.assert_close(rt.reduce(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
        assert list(rt.gather({"b": 2, "a": 1}).items()) == [("a", 1), ("b", 2)]
        with pytest.raises(RuntimeFault, match="cannot do 'median'"):
            rt.reduce(1.0, "median")


# -- where a process stands ---------------------------------------------------------------------------


def test_ranks_are_read_from_torchrun_and_srun():
    torchrun = detect_ranks({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (torchrun.rank, torchrun.world_size, torchrun.local_rank, torchrun.launcher) == (
        1,
        4,
        1,
        "torchrun",
    )
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert detect_ranks(slurm).launcher == "srun"
    assert (detect_ranks(slurm).rank, detect_ranks(slurm).world_size) == (3, 8)


def test_a_batch_script_without_srun_is_one_process():
    assert detect_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}).world_size == 1
    assert detect_ranks({}).world_size == 1


def test_the_only_task_of_srun_is_one_process_and_opens_no_group(tmp_path, monkeypatch):
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        assert rt.world_size == 1
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_contradictory_ranks_are_a_config_error(variables):
    with pytest.raises(ConfigError):
        detect_ranks(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-05,09],login1", "node03"),
        ("a1,a2", "a1"),
        ("solo", "solo"),
        ("gpu[7]", "gpu7"),
        ("r-[1,4]-x", "r-1"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_the_commit_is_read_without_git(tmp_path):
    assert git_commit(tmp_path) == ""
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    assert git_commit(tmp_path / "deep" / "er") == "abc123"
    (tmp_path / ".git" / "refs" / "heads" / "main").write_text("def456\n")
    assert git_commit(tmp_path) == "def456"


# -- loader -------------------------------------------------------------------------------------------


def loader(size=10, *, batch_size=2, rank=0, world_size=1, shuffle=True, **options):
    return ResumableLoader(
        toy.Cases(size),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=1,
        rank=rank,
        world_size=world_size,
        **options,
    )


def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order():
    batches = loader()
    first = [name for _ in range(5) for name in next(batches)["case"]]
    second = [name for _ in range(5) for name in next(batches)["case"]]
    assert sorted(first) == sorted(second) == [f"case_{index}" for index in range(10)]
    assert first != second


def test_a_sample_is_augmented_anew_in_every_epoch():
    batches = loader(2, shuffle=False)
    assert not torch.equal(next(batches)["x"], next(batches)["x"])


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size"), [(10, 2, 2), (9, 2, 2), (5, 2, 4), (7, 3, 2), (1, 4, 3)]
)
def test_shards_have_equal_lengths_and_cover_all_samples(size, batch_size, world_size):
    parts = [
        loader(size, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shapes = [[len(part.batch(number)) for number in range(len(part))] for part in parts]
    assert all(shape == shapes[0] for shape in shapes)
    seen = [index for part in parts for number in range(len(part)) for index, _ in part.batch(number)]
    assert set(seen) == set(range(size))
    assert len(seen) - size < world_size, "only the last incomplete batch is filled up"


def test_drop_last_leaves_out_the_incomplete_batch():
    assert (len(loader(9)), len(loader(9, drop_last=True))) == (5, 4)


def test_the_position_is_saved_and_restored():
    batches = loader()
    for _ in range(7):
        next(batches)
    state = batches.state_dict()
    expected = [next(batches) for _ in range(6)]
    other = loader()
    next(other)
    other.load_state_dict(state)
    assert other.position == (1, 2)
    for batch in expected:
        found = next(other)
        assert found["case"] == batch["case"]
        assert torch.equal(found["x"], batch["x"])


def test_a_position_carries_over_to_another_number_of_ranks():
    one = loader(16)
    for _ in range(12):
        next(one)
    two = loader(16, world_size=2)
    two.load_state_dict(one.state_dict())
    assert two.position == (1, 2)


def test_a_pass_for_validation_starts_at_the_beginning_and_moves_nothing():
    batches = loader(shuffle=False)
    next(batches)
    assert [batch["case"][0] for batch in batches.epoch()] == [f"case_{index}" for index in range(0, 10, 2)]
    assert batches.position == (0, 1)
    assert next(batches)["case"] == ["case_2", "case_3"]


def test_an_empty_dataset_is_an_error():
    with pytest.raises(RuntimeFault, match="gives no batch"):
        loader(0)
    with pytest.raises(RuntimeFault, match="gives no batch"):
        loader(3, batch_size=4, drop_last=True)


class Broken(toy.Cases):
    def __getitem__(self, index):
        if index == 3:
            raise DataError("case case_3", why="half of it is missing", do="copy it again", case="case_3")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_case_arrives_whole_and_is_never_replaced(workers):
    batches = ResumableLoader(Broken(), batch_size=2, shuffle=False, seed=1, workers=workers)
    assert next(batches)["case"] == ["case_0", "case_1"]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert (caught.value.case, caught.value.do) == ("case_3", "copy it again")
    batches.close()


class Suicidal(toy.Cases):
    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def read_all(folder, dataset):
    with toy.make_job(folder, 4, workers=1).runtime() as rt:
        batches = rt.loader(dataset, batch_size=1, shuffle=False)
        for _ in rt.steps(rt.checkpoint.resume(), 4):
            next(batches)


def test_a_killed_worker_is_an_error_with_advice(tmp_path):
    with pytest.raises(RuntimeFault, match="data-loading worker died") as caught:
        read_all(tmp_path / "run", Suicidal())
    assert "--workers 0" in caught.value.do
