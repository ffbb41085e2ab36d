"""Numbers that are not finite: never stepped, counted with their cases, and the end after three in a row."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medrl.core.errors import RuntimeFault
from medrl.core.rl.reinforce import standardise

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "ranks"))
import toy_run as toy


def events(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "event" in record]


def spoil(steps, value):
    return lambda _rt, step, loss: loss * value if step in steps else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_never_stepped_and_its_cases_are_counted(tmp_path, value):
    seen = {}

    def remember(rt, step):
        seen[step] = [parameter.detach().clone() for parameter in rt._prepared[0][0].parameters()]

    toy.train(tmp_path / "run", 4, before=remember, loss_of=spoil({2}, value))
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True)), "step 2 changes nothing"
    assert any(not torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True)), "step 3 goes on"
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"], event["reason"]) == (2, "skipped_step", "non-finite loss")
    assert len(event["cases"]) == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["skipped_steps"] == 1
    assert manifest["skipped_cases"] == dict.fromkeys(event["cases"], 1)


def test_three_in_a_row_end_the_run_naming_the_cases_and_keep_the_last_good_state(tmp_path):
    with pytest.raises(
        RuntimeFault, match="non-finite loss 3 times in a row, at step 5, cases case_"
    ) as caught:
        toy.train(tmp_path / "run", 9, loss_of=spoil({3, 4, 5, 6}, float("nan")))
    assert "the last checkpoint holds a good state" in caught.value.why
    state = toy.state_of(tmp_path / "run")
    assert state["step"] == 4
    assert [event["in_a_row"] for event in events(tmp_path / "run")] == [1, 2, 3]
    toy.train(tmp_path / "run", 9)
    assert toy.state_of(tmp_path / "run")["step"] == 9


def test_the_count_in_a_row_survives_a_resume(tmp_path):
    toy.train(tmp_path / "run", 2, loss_of=spoil({1, 2}, float("nan")))
    with pytest.raises(RuntimeFault, match="3 times in a row, at step 3"):
        toy.train(tmp_path / "run", 4, loss_of=spoil({3}, float("nan")))


def test_single_bad_steps_do_not_end_the_run(tmp_path):
    toy.train(tmp_path / "run", 9, loss_of=spoil({2, 3, 5, 6, 8}, float("nan")))
    assert len(events(tmp_path / "run")) == 5


def test_nan_voxels_leave_no_trace_in_running_statistics(tmp_path):
    with toy.make_job(tmp_path / "run", 3).runtime() as rt:
        net = rt.prepare(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        kept = None
        for step in rt.steps(rt.checkpoint.resume(), 3):
            image = torch.randn(4, 2)
            if step == 2:
                kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
                image[0, 0] = float("nan")
            rt.backward(net(image).pow(2).mean(), cases=["broken"])
            info = rt.step(optimizer)
            assert info.applied is (step != 2)
            if step == 2:
                assert all(torch.equal(buffer, kept[name]) for name, buffer in net.named_buffers())
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    assert [event["cases"] for event in events(tmp_path / "run")] == [["broken"]]


class Root(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def climb(folder, steps, *, check=lambda _net, _info: None, **options):
    """Train on a finite loss whose gradient is infinite."""
    with toy.make_job(folder, steps, **options).runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        for _ in rt.steps(rt.checkpoint.resume(), steps):
            rt.backward(Root.apply(net(torch.ones(1, 2))).sum(), cases=["steep"])
            check(net, rt.step(optimizer, clip_norm=1.0))


def test_a_gradient_that_is_not_finite_is_never_stepped(tmp_path):
    weights = []

    def check(net, info):
        weights.append(net.weight.detach().clone())
        assert (info.applied, info.reason) == (False, "non-finite gradient")
        assert net.weight.grad is None

    with pytest.raises(RuntimeFault, match="non-finite gradient 3 times"):
        climb(tmp_path / "run", 5, check=check)
    assert torch.equal(weights[0], weights[1])
    assert torch.isfinite(weights[1]).all()
    assert [event["cases"] for event in events(tmp_path / "run")] == [["steep"]] * 3


def test_a_bad_micro_batch_leaves_out_the_whole_step(tmp_path):
    calls = itertools.count(1)

    def spoil_second(_rt, _step, loss):
        return loss * float("nan") if next(calls) == 4 else loss

    toy.train(tmp_path / "run", 3, accumulate=2, loss_of=spoil_second)
    (event,) = events(tmp_path / "run")
    assert (event["step"], len(event["cases"])) == (2, 2)


def test_constant_rewards_give_zero_advantages_and_a_step_that_is_finite(tmp_path):
    advantages = standardise(torch.full((8,), 0.25))
    assert torch.equal(advantages, torch.zeros(8))
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        rt.backward((net(torch.ones(8, 2)).squeeze(1) * advantages).mean())
        info = rt.step(optimizer, clip_norm=1.0)
        assert (info.applied, info.grad_norm) == (True, 0.0)


def test_an_fp16_overflow_lowers_the_scale_is_not_stepped_and_does_not_count(tmp_path):
    with toy.make_job(tmp_path / "run", 6, precision="fp16").runtime() as rt:
        net = rt.prepare(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        outcomes = []
        for step in rt.steps(rt.checkpoint.resume(), 6):
            before = net.weight.detach().clone()
            with rt.autocast():
                loss = net(torch.full((4, 2), 20.0)).float().sum() * (8.0 if step < 6 else 1e-3)
            rt.backward(loss, cases=["bright"])
            info = rt.step(optimizer)
            outcomes.append(info.reason)
            assert info.applied or torch.equal(net.weight, before)
        scale = rt._stepper.scaler.get_scale()
    assert outcomes[:4] == ["fp16 overflow"] * 4, "four in a row are the scaler's business"
    assert outcomes[-1] == ""
    assert scale < 2**13
    found = events(tmp_path / "run")
    assert {event["event"] for event in found} == {"fp16_overflow"}
    assert [event["scale"] for event in found] == [2.0 ** (16 - index) for index in range(len(found))]


def test_fp16_gradients_that_overflow_at_every_scale_end_the_run(tmp_path):
    with pytest.raises(RuntimeFault, match="overflow at step .* whatever the loss scale"):
        climb(tmp_path / "run", 60, precision="fp16")
