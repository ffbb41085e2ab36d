"""Every weighting: a run that fell and went on equals one that did not, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import RuntimeFault
from medrl.plugins.graft import data, train

AGENT = {"interval": 2, "policy": "state", "terminal": True, "gamma": 0.9}
MODES = {
    "fixed": {"weighting": {"mode": "fixed", "fixed": [3, 1]}},
    "align": {"weighting": {"mode": "align", "align_every": 2}, "distill": {"logit_weight": 1}},
    "balanced": {
        "weighting": {"mode": "uniform"},
        "loss": {"balance": True, "balance_warmup": 1},
        "distill": {"logit_weight": 1},
    },
    "align-crossfit": {
        "weighting": {"mode": "align", "prior": "quality", "align_every": 2},
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
        "optim": {"name": "sgd"},
    },
    "meta": {"weighting": {"mode": "meta"}, "distill": {"logit_weight": 1}},
    "legacy-episode": {"weighting": {"mode": "legacy"}, "agent": {"interval": 4, "warmup": 3}},
    "legacy-step": {
        "weighting": {"mode": "legacy"},
        "agent": {"update": "step", "step_every": 2, "dynamic": True},
    },
    "reinforce-crossfit": {
        "weighting": {"mode": "reinforce", "prior": "quality"},
        "agent": AGENT,
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
    },
    "reinforce-horizon": {
        "weighting": {"mode": "reinforce", "prior": "quality"},
        "agent": {**AGENT, "horizon": 2, "interval": 1},
        "distill": {"logit_weight": 1},
    },
    "reinforce-random": {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"interval": 2, "random_reward": True},
    },
}


def differences(a, b, where=""):
    """Return where two nested states differ, tensors compared by their bytes."""
    if isinstance(a, torch.Tensor):
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        return [] if a.shape == b.shape and a.dtype == b.dtype and raw[0].equal(raw[1]) else [where]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [
            f for k, (x, y) in enumerate(zip(a, b, strict=True)) for f in differences(x, y, f"{where}[{k}]")
        ]
    return [] if a == b else [f"{where}: {a} {b}"]


def fit(job):
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))


@pytest.mark.parametrize("name", MODES)
def test_a_run_that_falls_in_the_fifth_step_goes_on_as_if_it_had_not(
    make_job, tmp_path, features, monkeypatch, name
):
    base = {
        "teachers": {"features": [str(features)]},
        "split": {"reward": 0.4},
        "train": {"max_steps": 6, "checkpoint_every": 3, "validate_every": 4},
    }
    values = {**base, **MODES[name]}
    fit(make_job(tmp_path / "straight", values))

    original = train.set_rate

    def fall(optimizer, cfg, step):
        if step == 5:
            raise RuntimeFault("the machine goes away")
        return original(optimizer, cfg, step)

    job = make_job(tmp_path / "fell", values)
    with monkeypatch.context() as patch:
        patch.setattr(train, "set_rate", fall)
        with pytest.raises(RuntimeFault, match="goes away"):
            fit(job)
    # Leaving saves the state after step 4; the run is to go on from that of step 3.
    for path in (tmp_path / "fell" / "checkpoints").glob("*.pt"):
        if path.name != "step_000003.pt":
            path.unlink()
    done = []
    monkeypatch.setattr(train, "set_rate", lambda *given: done.append(given[2]) or original(*given))
    fit(make_job(tmp_path / "fell", values))
    assert done == [4, 5, 6]

    straight, fell = (
        load_checkpoint(find_checkpoint(tmp_path / run, "last")) for run in ("straight", "fell")
    )
    assert straight.meta["step"] == fell.meta["step"] == 6
    assert differences(straight.states, fell.states) == []
    assert differences(straight.ranks, fell.ranks) == []
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "fell")
    ]
    assert rows[0] == rows[1]
