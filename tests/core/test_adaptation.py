"""What methods that adapt in stages share: steps, outputs, labels of two domains, several rewards at once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medrl.core.adaptation.actors import CategoricalActor
from medrl.core.adaptation.correcting import warn_if_harmful
from medrl.core.adaptation.fitting import Lesson, descend
from medrl.core.adaptation.labels import join_labels, values_by_name
from medrl.core.adaptation.players import Players, improve, set_rates
from medrl.core.adaptation.pseudo_labels import open_pseudo_labels, write
from medrl.core.adaptation.sets import ImageSet, subset
from medrl.core.adaptation.stages import Course, Stage, all_there, numbered, outputs_of, steps_for
from medrl.core.errors import CheckpointError, DataError
from medrl.core.rl.pixelwise import PixelwisePPOConfig, rollout


def test_stages_are_numbered_and_name_their_folders():
    one, two = numbered([("source", 0), ("ppo", 2)])
    assert (one.name, two.name) == ("01_source", "02_ppo_2")
    assert outputs_of(two, "best") == [Path("stages/02_ppo_2/checkpoints/best.pt")]
    assert outputs_of(Stage(3, "pairs", 1)) == [Path("stages/03_pairs_1")]
    assert outputs_of(Stage(4, "test")) == [Path("test.json")]
    with pytest.raises(CheckpointError, match="there is no style"):
        all_there("ppo", {"source": Path("a"), "style": None})


def test_steps_come_from_epochs_where_none_are_given():
    assert steps_for(20, steps=0, epochs=3, width=8) == 9
    assert steps_for(20, steps=50, epochs=3, width=8, limit=2) == 2


def test_labels_of_another_dataset_are_matched_by_name():
    merge, names, values = join_labels({"background": 0, "LV": 1, "MYO": 2, "LA": 3}, {"LA": "background"})
    assert (names, values) == ({"background": 0, "LV": 1, "MYO": 2}, {0: 0, 1: 1, 2: 2, 3: 0})
    shared = {"merge": merge, "label_names": names, "values": values}
    assert values_by_name({"background": 0, "MYO": 1, "LV": 5}, **shared) == {0: 0, 1: 2, 5: 1}
    with pytest.raises(DataError, match="no such label"):
        values_by_name({"background": 0, "RV": 1}, **shared)


def image_set(count=3):
    return ImageSet(
        ids=tuple(f"i{n}" for n in range(count)),
        subjects=tuple(f"p{n}" for n in range(count)),
        images=torch.rand(count, 1, 4, 4, 2, generator=torch.Generator().manual_seed(0)),
        labels=torch.zeros(count, 4, 4, 2, dtype=torch.uint8),
        spacing_mm=torch.ones(count, 2),
        label_names={"background": 0, "a": 1},
    )


def test_a_set_knows_what_it_holds_and_its_digest_follows():
    whole = image_set()
    assert (whole.channels, whole.classes) == (1, 2)
    assert subset(whole, range(3)) is whole
    assert subset(whole, [2]).ids == ("i2",)
    assert whole.digest() == image_set().digest()
    assert whole.digest() != whole.without_labels().digest()


def test_later_pseudo_labels_win_and_others_are_left_out(tmp_path):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"i0": torch.full((2, 2), number), "x": torch.zeros(2, 2)})
    folders = [tmp_path / "a", tmp_path / "b"]
    assert set(open_pseudo_labels(folders).masks) == {"i0", "x"}
    kept = open_pseudo_labels(folders, image_set()).masks
    assert set(kept) == {"i0"}
    assert int(kept["i0"].sum()) == 4


class Machine:
    """A runtime that only goes backward and steps."""

    def __init__(self):
        self.steps = []

    def backward(self, loss, cases):
        loss.backward()

    def step(self, optimizer, clip_norm):
        self.steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
        optimizer.zero_grad()
        return SimpleNamespace(grad_norm=0.0)

    autocast = staticmethod(nullcontext)


def test_gradients_of_several_rewards_are_added_before_one_step():
    numbers = PixelwisePPOConfig(inner_steps=1, baseline="constant")
    images = torch.rand(2, 1, 4, 4, 2, generator=torch.Generator().manual_seed(1))
    rewards = [torch.rand(2, 4, 4, 2, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]

    def gradients(chosen):
        torch.manual_seed(0)
        network = nn.Conv3d(1, 3, 1)
        players = Players(CategoricalActor(network, classes=3), None, None)
        optimizers = players.optimizers({"actor": 0.1})
        played = rollout(
            players.actor,
            None,
            images,
            lambda actions, _: chosen[0],
            numbers,
            generator=torch.Generator().manual_seed(4),
        )
        machine = Machine()
        several = chosen if len(chosen) > 1 else ()
        improve(
            machine, players, optimizers, played, numbers, ["a", "b"], limits={"actor": 0.0}, rewards=several
        )
        (step,) = machine.steps
        return step

    both, one, two = gradients(rewards), gradients(rewards[:1]), gradients(rewards[1:])
    for whole, first, second in zip(both, one, two, strict=True):
        assert torch.allclose(whole, first + second, atol=1e-7)
        assert float(whole.abs().max()) > 0.0


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_of_several_batches_are_averaged_before_one_step(parts):
    """Eight numbers in one batch, or in four of two, give the same step and the same loss in the log."""
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    course = Course(steps=2, every=2, batch=8 // parts, lr=0.1, accumulate=parts)
    optimizer, seen, rows = torch.optim.SGD(layer.parameters(), lr=0.1), [], []

    def lesson(number):
        seen.append(number)
        part = values.reshape(parts, 8 // parts, 3)[(number - 1) % parts]
        return Lesson((layer(part) ** 2).mean(), [])

    def step(given, *, clip_norm):
        given.step()
        given.zero_grad()
        return SimpleNamespace(grad_norm=0.0)

    machine = SimpleNamespace(
        checkpoint=SimpleNamespace(resume=lambda: 1),
        total_steps=2,
        steps=lambda first, count: range(first, count + 1),
        backward=lambda loss, *, cases: loss.backward(),
        step=step,
        log=lambda number, **shown: rows.append(shown),
    )
    descend(machine, course, optimizer, lesson, dict, best="nothing")
    torch.manual_seed(0)
    other = nn.Linear(3, 1)
    losses = []
    for _ in range(2):
        other.zero_grad()
        losses.append((other(values) ** 2).mean())
        losses[-1].backward()
        with torch.no_grad():
            for weight in other.parameters():
                weight -= 0.1 * weight.grad
    assert seen == list(range(1, 2 * parts + 1))
    assert torch.allclose(layer.weight, other.weight, atol=1e-6)
    shown = [float(row["loss"]) for row in rows if "loss" in row]
    assert shown == pytest.approx([float(loss.detach()) for loss in losses], abs=1e-6)


def test_rates_of_actor_and_critic_rise_and_fall_together():
    modules = {name: nn.Linear(1, 1) for name in ("actor", "critic")}
    optimizers = {name: torch.optim.Adam(module.parameters()) for name, module in modules.items()}
    rates = {"actor": 1.0, "critic": 0.5}
    shown = [
        set_rates(optimizers, rates, step, 10, warmup=3, linear=True, guard=None) for step in (1, 3, 4, 10)
    ]
    assert shown == pytest.approx([0.25, 0.75, 1.0, 1 / 7])
    assert optimizers["critic"].param_groups[0]["lr"] == pytest.approx(0.5 / 7)


@pytest.mark.parametrize(
    ("dice", "validity", "said"),
    [(0.5, 1.0, "makes corrupted masks worse"), (0.8, 0.5, "only 50 %"), (0.8, 0.9, "")],
)
def test_a_corrector_that_does_harm_is_warned_of(caplog, dice, validity, said):
    warn_if_harmful(
        {"val_dice": dice, "corrupted_dice": 0.7, "val_validity": validity, "corrupted_validity": 0.3}
    )
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
