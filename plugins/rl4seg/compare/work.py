"""The work of one seed: stages that all methods share are made once, then each method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.adaptation.actors import PixelActor
from medrl.core.checkpoint import write_checkpoint
from medrl.core.config import Layer
from medrl.core.errors import ConfigError, DataError
from medrl.core.jobs import TrainJob
from medrl.core.runtime.session import choose_device
from medrl.core.stages import Pipeline

from .. import baselines, loop, parts, tsit
from .. import data as rl4seg_data
from ..baselines import Budget, Refiner
from ..baselines.refining import Way
from ..config import Rl4segConfig
from ..data import ImageSet
from ..domains import Domains, load_domains
from ..scoring import Scores, largest_blob, score, score_masks, segment
from ..stages import outputs_of, plan_stages, steps_of
from .catalogue import BY_KEY, Method, Start

if TYPE_CHECKING:
    from medrl.core.adaptation.stages import Stage
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager

RATES: Mapping[str, float] = {"entropy": 5e-4, "confident": 5e-4, "refined": 1e-3, "supervised": 1e-3}
"""Learning rates of the baselines, chosen on the tuning group of benchmarks/rl4seg_evidence.py."""
BATCH_NORM: Mapping[str, str] = {"entropy": "batch", "confident": "batch", "refined": "batch"}
"""What the baselines do with the statistics of batch normalisation."""

Resolve = Callable[[Sequence[Layer]], "Resolved[Any]"]
_VERSION = 1


class SeedStudy:
    """Everything that one seed makes, in a folder of its own.

    Args:
        manager: Source of networks and rewards.
        resolve: Resolves the config with further layers on top.
        folder: ``runs``, ``networks`` and ``scores`` are made in it.
        seed: Training seed.
        say: Shows a line of progress.
        command: The command line, for the record of the runs.
        rates: Learning rates of baselines instead of `RATES`.
    """

    def __init__(
        self,
        manager: PluginManager,
        resolve: Resolve,
        folder: Path,
        seed: int,
        *,
        say: Callable[[str], None] = lambda _line: None,
        command: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.manager, self.folder, self.seed = manager, folder, seed
        self.say, self.command = say, command
        self.rates = {**RATES, **(rates or {})}
        self._resolve = resolve
        self.resolved = self._config({"loop": {"start": "style"}})
        self.cfg: Rl4segConfig = self.resolved.config
        self.device = choose_device(str(self.cfg.train.device))
        if self.cfg.train.threads > 0:
            torch.set_num_threads(self.cfg.train.threads)

    def record(self, name: str) -> Pipeline:
        """Return the record of a method, in a file of its own, so that methods can be made side by side."""
        found = Pipeline(self.folder, record=f"records/{name}.json")
        found.take_over(name, Pipeline(self.folder))  # older comparisons have one record for all
        return found

    # -- data ----------------------------------------------------------------------------------------

    @cached_property
    def domains(self) -> Domains:
        """Source with labels, target without."""
        return load_domains(self.cfg, self.manager)

    @cached_property
    def test(self) -> ImageSet:
        """Target test images with labels, for scoring.

        Raises:
            DataError: The target has none.
        """
        found = rl4seg_data.load_target(self.cfg, labels="test", plan=self.domains.plan).test
        if found is None or not found.ids or found.labels is None:
            raise DataError(
                "comparison",
                why="the target has no labelled test images",
                do="put them into imagesTs and labelsTs",
            )
        return found

    @cached_property
    def rules(self) -> Any:
        """Anatomical rules with the label values of the data."""
        return parts.rules_of(self.cfg, self.domains.label_names)

    @property
    def budget(self) -> Budget:
        """What a baseline may spend: the optimiser steps of one iteration of PPO."""
        ppo = self.cfg.ppo
        return Budget(
            steps=ppo.steps * ppo.inner_steps,
            batch=ppo.batch or self.cfg.train.batch_size,
            lr=ppo.lr,
            seed=self.seed,
            warmup=ppo.warmup * ppo.inner_steps,
            bf16=self.cfg.train.precision == "bf16",
            device=str(self.device),
        )

    @property
    def source_steps(self) -> int:
        """Steps of the source actor."""
        return steps_of(self.cfg.source, self.cfg, len(self.domains.source.train.ids))

    @cached_property
    def target_has_labels(self) -> bool:
        """Whether target training images have labels, which the upper bounds need."""
        try:
            return self._labelled_target().labels is not None
        except DataError:
            return False

    def members(self, count: int) -> list[PixelActor]:
        """Return the source actor and further ones that differ in their seed: an ensemble."""
        found = [self.start("source")]
        for number in range(1, count):
            folder = self.run_folder(f"member_{number}")
            seed = rng.derive_seed(self.seed, "member", number) % 2**31
            self._loop(self._config({"train": {"seed": seed}, "stage": "source", "alone": True}), folder)
            found.append(self.actor(folder))
        return found

    def budget_of(self, method: Method) -> Budget:
        """The budget with the rate of a kind of baseline."""
        return replace(
            self.budget,
            lr=self.rates.get(method.kind, self.budget.lr),
            batch_norm=BATCH_NORM.get(method.kind, "batch"),
        )

    # -- what all methods share ----------------------------------------------------------------------

    def shared(self, kind: str) -> Path:
        """Return the checkpoint of a stage that all methods share, made if it is not there.

        Args:
            kind: ``source``, ``style``, ``corrector`` or ``reward`` (of the first iteration).
        """
        given: Path | None = getattr(self.cfg.inputs, kind)
        if given is not None:
            return given
        folder = self.run_folder("style-ppo")
        wanted = folder / outputs_of(self._stages_upto(kind)[-1], self.cfg)[0]
        for stage in self.lacking([kind]):
            self.say(f"seed {self.seed}: {_SHARED[stage.kind]}")
            self._loop(self._config({"loop": {"start": "style"}, "stage": stage.kind}), folder)
        return wanted

    def lacking(self, kinds: Sequence[str]) -> list[Stage]:
        """Return the stages that are still to be made before these kinds of shared stages are all there."""
        asked = [kind for kind in kinds if getattr(self.cfg.inputs, kind) is None]
        stages = max((self._stages_upto(kind) for kind in asked), key=len, default=[])
        folder = self.run_folder("style-ppo")
        return [stage for stage in stages if not (folder / outputs_of(stage, self.cfg)[0]).exists()]

    def _stages_upto(self, kind: str) -> list[Stage]:
        plan = plan_stages(self.cfg)
        numbers = [stage.number for stage in plan if stage.kind == kind]
        if not numbers:
            raise ConfigError(f"comparison, stage {kind}", why="this config has no such stage")
        return plan[: numbers[0]]

    def trained_reward(self, key: str) -> Any:
        """Return the last reward net that a method with a reward of its own trained."""
        method = BY_KEY[key]
        resolved = self._loop_config(method)
        cfg: Rl4segConfig = resolved.config
        last = [stage for stage in plan_stages(cfg) if stage.kind == "reward"][-1]
        net = parts.reward_net(
            cfg, self.manager, channels=self.domains.channels, classes=self.domains.classes
        )
        parts.load_part(self.run_folder(key) / outputs_of(last, cfg)[0], "reward", net, "reward")
        if not cfg.reward.calibrated:
            net.set_temperature(1.0)
        return net.requires_grad_(requires_grad=False).to(self.device).eval()

    def run_folder(self, key: str) -> Path:
        """Run folder of a method that is a loop."""
        return self.folder / "runs" / key

    def actor(self, path: Path) -> PixelActor:
        """Return the actor of a checkpoint, in evaluation mode on the device."""
        network = parts.actor_network(
            self.cfg, self.manager, channels=self.domains.channels, classes=self.domains.classes
        )
        parts.load_part(path, "actor", network, "actor")
        actor = parts.as_actor(self.cfg, network, self.domains.classes)
        return actor.to(self.device).eval()

    def start(self, start: Start) -> PixelActor:
        """Return the source or the style actor."""
        return self.actor(self.shared(start))

    def refiner(self, way: Way) -> Refiner:
        """Return the shared reward net and corrector, as far as a way of refining asks for them."""
        return Refiner(
            reward=None if way == "corrector" else self.reward_net,
            corrector=None if way == "reward" else self.corrector,
            weight=self.weight,
            device=str(self.device),
        )

    @property
    def weight(self) -> float:
        """Share of the reward net in the full reward."""
        return float(self.cfg.reward.params.get("weight", 0.25))

    @cached_property
    def reward_net(self) -> Any:
        """The shared reward net; its temperature as the config says."""
        net = parts.reward_net(
            self.cfg, self.manager, channels=self.domains.channels, classes=self.domains.classes
        )
        parts.load_reward(self._with_inputs({"reward": self.shared("reward")}), net)
        return net.requires_grad_(requires_grad=False).to(self.device).eval()

    @cached_property
    def corrector(self) -> Any:
        """The shared corrector."""
        inputs = {"corrector": self.shared("corrector")} if self.cfg.needs_corrector else {}
        made = parts.ready_corrector(self._with_inputs(inputs), self.manager, self.domains)
        return made.to(self.device)

    # -- methods -------------------------------------------------------------------------------------

    def make(self, method: Method) -> None:
        """Make a method and score it, unless that is done."""
        self.record(method.key).stage(
            method.key,
            inputs=self._inputs(method),
            outputs=[Path("scores") / f"{method.key}.json"],
            run=lambda: self._make(method),
        )

    def is_made(self, method: Method) -> bool:
        """Whether a method has scores that were made from what there is now."""
        if self.lacking(self.needs(method)):
            return False
        return self.record(method.key).is_done(
            method.key, inputs=self._inputs(method), outputs=[Path("scores") / f"{method.key}.json"]
        )

    def _inputs(self, method: Method) -> dict[str, Any]:
        """Everything that decides the scores of a method; shared stages are made if they are not there."""
        inputs: dict[str, Any] = {
            "version": _VERSION,
            "config": self.resolved.hash,
            "images": self.domains.digest(),
            "rate": self.rates.get(method.kind, 0.0),
            "values": json.dumps(method.values, sort_keys=True),
        }
        for kind in self.needs(method):
            inputs[kind] = self.shared(kind)
        return inputs

    def needs(self, method: Method) -> list[str]:
        """Shared stages that a method takes."""
        found: list[str] = [method.start] if method.start else []
        if method.kind == "more" or (method.kind == "loop" and method.needs_reward):
            found.append("style")
        if method.needs_corrector and self.cfg.needs_corrector:
            found.append("corrector")
        if method.needs_reward and self._shares_reward:
            found.append("reward")
        return list(dict.fromkeys(found))

    def reads(self, method: Method) -> list[str]:
        """Shared stages that making a method reads, beside those that decide its scores."""
        more = self._loop_inputs(method) if method.kind == "loop" and method.key != "style-ppo" else []
        return list(dict.fromkeys([*self.needs(method), *more]))

    @property
    def _shares_reward(self) -> bool:
        """Whether loops take the shared reward net: with several iterations each trains its own."""
        return self.cfg.loop.iterations == 1 or self.cfg.inputs.reward is not None

    def read(self, method: Method) -> tuple[dict[str, Scores], float]:
        """Return the scores of a finished method by row key, and its seconds."""
        content = json.loads((self.folder / "scores" / f"{method.key}.json").read_text(encoding="utf-8"))
        found = {key: Scores.from_dict(value) for key, value in content["scores"].items()}
        return found, float(content["seconds"])

    def _make(self, method: Method) -> None:
        self.say(f"seed {self.seed}: {method.title}" + (f" ({method.start})" if method.start else ""))
        started = time.process_time()
        makers: dict[str, Callable[[Method], dict[str, Scores]]] = {
            "start": self._start,
            "post_hoc": self._post_hoc,
            "loop": self._run_loop,
            "more": self._more,
            "tsit": self._tsit,
        }
        found = makers.get(method.kind, self._trained)(method)
        content = {
            "seconds": time.process_time() - started,
            "scores": {key: scores.as_dict() for key, scores in found.items()},
        }
        path = self.folder / "scores" / f"{method.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    def _start(self, method: Method) -> dict[str, Scores]:
        return {method.key: self._score(self.start(method.start))}

    def _post_hoc(self, method: Method) -> dict[str, Scores]:
        masks = segment(self.start(method.start), self.test.images, device=self.device)
        better = self.refiner(_way(method)).refine(_way(method), masks, self.test.images)
        return {method.key: score_masks(largest_blob(better.numpy()), self.test, self.rules)}

    def _trained(self, method: Method) -> dict[str, Scores]:
        """Train a baseline that is no run of the loop, and keep its network."""
        target, budget = self.domains.target.train, self.budget_of(method)
        actor = self.start(method.start or "source")
        if method.kind == "batch_norm":
            trained = baselines.adapt_batch_norm(actor, target, budget)
        elif method.kind == "entropy":
            trained = baselines.minimise_entropy(actor, target, budget)
        elif method.kind == "confident":
            trained = baselines.self_train_sure(actor, target, budget)
        elif method.kind == "refined":
            masks = segment(actor, target.images, device=self.device)
            labels = self.refiner(_way(method)).refine(_way(method), masks, target.images)
            trained = baselines.self_train(actor, target, labels, budget)
        else:
            trained = baselines.supervise(
                actor, self._labelled_target(), replace(budget, steps=budget.steps + self.source_steps)
            )
        adapted = cast("PixelActor", trained)  # a copy of what went in
        self._keep(method, adapted)
        return {method.key: self._score(adapted)}

    def _labelled_target(self) -> ImageSet:
        """Target training images with their labels, for the upper bound alone."""
        cfg = self._config({"target": {"allow_labels": True}}).config
        return rl4seg_data.load_target(cfg, labels="train", plan=self.domains.plan).train

    def _tsit(self, method: Method) -> dict[str, Scores]:
        budget = replace(
            self.budget, steps=self.budget.steps + self.source_steps, lr=self.cfg.source.lr, clip=0.0
        )
        network = tsit_networks(self, budget)
        return {method.key: self._score(network)}

    def _more(self, method: Method) -> dict[str, Scores]:
        """Go on with style tuning for as many steps as PPO takes."""
        steps = self.budget.steps
        values = {
            "stage": "style",
            "alone": True,
            "style": {"steps": steps},
            "inputs": {"source": str(self.shared("style"))},
        }
        folder = self.run_folder(method.key)
        self._loop(self._config(values), folder)
        return {method.key: self._score(self.actor(folder))}

    def _run_loop(self, method: Method) -> dict[str, Scores]:
        """Run the loop from a start, with the shared stages as inputs."""
        folder = self.run_folder(method.key)
        resolved = self._loop_config(method)
        self._loop(resolved, folder)
        found = {}
        stages = [stage for stage in plan_stages(resolved.config) if stage.kind == "ppo"]
        for stage in stages[:-1]:
            place = folder / outputs_of(stage, resolved.config)[0]
            found[f"{method.key}@{stage.iteration}"] = self._score(self.actor(place))
        found[method.key] = self._score(self.actor(folder))
        return found

    def _loop_config(self, method: Method) -> Resolved[Any]:
        """The config of a method that is a loop; that of ``style-ppo`` also makes the shared stages."""
        if method.key == "style-ppo":
            return self.resolved
        given = {kind: str(self.shared(kind)) for kind in self._loop_inputs(method)}
        values = merged(dict(method.values), {"loop": {"start": method.start}, "inputs": given})
        found = self._config(values)
        cfg: Rl4segConfig = found.config
        if cfg.pairs.kind != "prediction":
            return found
        # Each iteration predicts images that none before has seen: deal those that there are.
        share = max(1, len(self.domains.target.train.ids) // cfg.loop.iterations)
        return self._config(merged(values, {"pairs": {"images": min(cfg.pairs.images, share)}}))

    def _loop_inputs(self, method: Method) -> list[str]:
        needed = self._config(merged(dict(method.values), {"loop": {"start": method.start}})).config
        kinds = ["source"]
        kinds += ["style"] if needed.needs_style else []
        kinds += ["corrector"] if needed.needs_corrector else []
        kinds += ["reward"] if method.needs_reward and self._shares_reward else []
        return kinds

    # -- helpers -------------------------------------------------------------------------------------

    def _score(self, network: Any) -> Scores:
        return score(network, self.test, self.rules, device=self.device)

    def _keep(self, method: Method, actor: PixelActor) -> None:
        """Write the network as a checkpoint that `medrl predict` knows."""
        origin = parts.open_part(self.shared(method.start or "source"), "actor", "actor")
        path = self.folder / "networks" / f"{method.key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = actor.network.state_dict()
        write_checkpoint(path, {"actor": state}, {**origin.meta, "kind": "last", "metric": None})

    def _config(self, values: Mapping[str, Any]) -> Resolved[Any]:
        return self._resolve([Layer("comparison", merged({"train": {"seed": self.seed}}, dict(values)))])

    def _with_inputs(self, inputs: Mapping[str, Path]) -> Rl4segConfig:
        given = {kind: str(path) for kind, path in inputs.items()}
        found: Rl4segConfig = self._config({"loop": {"start": "style"}, "inputs": given}).config
        return found

    def _loop(self, resolved: Resolved[Any], folder: Path) -> None:
        loop.run(
            TrainJob(
                method="rl4seg",
                resolved=resolved,
                run_dir=folder,
                manager=self.manager,
                resume="auto",
                command=self.command,
            )
        )


def tsit_networks(study: SeedStudy, budget: Budget) -> tsit.OnePerClass:
    """Train TS-IT on the images of a study."""

    def build() -> torch.nn.Module:
        return parts.build_network(
            study.cfg.model,
            study.manager,
            "model",
            in_channels=study.domains.channels,
            out_channels=1,
            seed=torch.initial_seed(),
        )

    return tsit.train(
        build, study.domains.source.train, study.domains.target.train, study.domains.classes, budget
    )


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested values over others."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, Mapping)
            result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _way(method: Method) -> Way:
    if method.way == "corrector":
        return "corrector"
    if method.way == "reward":
        return "reward"
    return "both" if method.way == "both" else "mixed"


_SHARED = {
    "source": "source actor",
    "style": "style tuning",
    "corrector": "corrector",
    "pairs": "pairs for the reward net",
    "reward": "reward net",
}
