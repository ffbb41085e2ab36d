"""Every method with the parts of every other plugin, chosen only by config keys.

Which keys choose parts is read from the config of each method. For every part of another plugin that is of
the right kind, one step is trained: it works, or one line says why not. `FITS` lists what works; everything
else must be refused.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest

from medrl.cli.templates import write_project
from medrl.core.config import flatten, nest, resolve_method
from medrl.core.errors import MedrlError
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.registry import KINDS

pytestmark = pytest.mark.slow

CINE = Path(__file__).parent / "plugin_host" / "fixtures" / "cine"
METHODS = ("graft", "kspace", "rl4seg", "rl4seg3d", "spars", "alpha", "cine")
"""`alpha` and `beta` are projects of ``medrl plugins new``; `cine` is a method of somebody else."""

DIMS = {"graft": 3, "kspace": 2, "rl4seg": 2, "rl4seg3d": 3, "spars": 3, "alpha": 3, "cine": 1}

SMALL = {
    "graft.brats": {"features": [4] * 6},
    "graft.fullres": {"features": [4] * 7},
    "graft.medium": {"features": [4] * 7},
    "graft.large": {"features": [4] * 7},
    "graft.unet3d": {"features": [4] * 5},
    "graft.swin": {"feature_size": 12, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
    "kspace.compact": {"widths": [4, 6]},
    "kspace.recon_unet": {"base": 4, "levels": 2},
    "kspace.unet": {"base": 4},
    "kspace.unetpp": {"base": 1, "deep_supervision": False},
    "rl4seg.unet": {"init_channels": 4, "levels": 3},
    "rl4seg.unet_small": {"channels": [4, 8]},
    "rl4seg3d.unet3d": {"base_filters": 4},
    "rl4seg3d.unet3d_small": {"channels": [4, 8]},
}
"""Parameters that make a network small; they are config values as well."""

PARAMS = {
    ("alpha", "cine.column"): {"columns": 8},
    ("cine", "alpha.policy"): {"observations": 8, "actions": 8},
    ("cine", "beta.policy"): {"observations": 8, "actions": 8},
}
"""Parameters that a part needs in a method."""

SLOW = {"graft.swin": "rl4seg3d", "kspace.unetpp": "graft"}
"""Networks that pad to many voxels, with the method of volumes that tries each as its `model`."""

EMPTY = {"graft": {"loss.name": "losses"}}
"""Keys that choose a part and are empty by default."""


@dataclass(frozen=True)
class World:
    """All plugins, and for each method the config of a run of one step and what is done with it."""

    manager: PluginManager
    folder: Path
    bases: dict[str, dict[str, Any]]

    def keys(self, method: str) -> dict[str, str]:
        """The config keys of a method that choose a part, each with the kind of the part."""
        values = flatten(resolve_method(self.manager, method).values())
        found = dict(EMPTY.get(method, {}))
        for kind in KINDS:
            registered = self.manager.registry(kind).keys()
            found |= {key: kind for key, value in values.items() if value in registered}
        return found

    def pairs(self, method: str) -> Iterator[tuple[str, str]]:
        """Every key of a method with every part of another plugin that is of its kind."""
        for key, kind in sorted(self.keys(method).items()):
            for part in self.manager.registry(kind).entries():
                slow = DIMS[method] == 3 and SLOW.get(part.key, method) != method
                slow = slow or (DIMS[method] == 3 and part.key in SLOW and key != "model.name")
                if part.plugin != method and not slow:
                    yield key, part.key

    def train(self, method: str, key: str, part: str) -> None:
        """Train one step of a method with a part in place of its own."""
        block = key.removesuffix(".name")
        kind = self.keys(method)[key]
        params = dict(SMALL.get(part, {}) if kind == "models" else PARAMS.get((method, part), {}))
        if (
            kind == "models"
            and "spatial_dims" in inspect.signature(self.manager.registry("models").get(part)).parameters
        ):
            params["spatial_dims"] = DIMS[method]
        base = dict(self.bases[method]) | self.bases.get(f"{method}:{block}", {})
        base = {name: value for name, value in base.items() if not name.startswith(f"{block}.")}
        values = base | {key: part} | {f"{block}.{name}": value for name, value in params.items()}
        run = self.folder / f"{method}-{block}-{part}"
        job = build_train_job(self.manager, method, nest(values), run)
        command = self.manager.commands(method).train
        assert command is not None
        try:
            with click.Context(command) as context:
                context.invoke(command.callback, job)
        finally:
            shutil.rmtree(run, ignore_errors=True)


FLAT = {"kspace.compact", "kspace.unet", "kspace.unetpp", "kspace.unext", "kspace.unext_s"}
NETS = {"alpha.net", "beta.net"}
FITS: dict[tuple[str, str], set[str]] = {
    ("graft", "model.name"): NETS
    | {"kspace.unet", "kspace.unetpp", "rl4seg3d.unet3d", "rl4seg3d.unet3d_small"},
    ("graft", "loss.name"): {"alpha.dice_ce", "beta.dice_ce", "cine.energy"},
    ("kspace", "model.name"): NETS | {"rl4seg.unet", "rl4seg.unet_small"},
    ("kspace", "recon_model.name"): set(),
    ("kspace", "agent.name"): set(),
    ("rl4seg", "model.name"): NETS | FLAT,
    ("rl4seg", "critic.name"): NETS | FLAT | {"kspace.recon_unet"},
    ("rl4seg", "reward_model.name"): NETS | FLAT,
    ("rl4seg", "reward.name"): {
        "alpha.dice",
        "beta.dice",
        *(f"rl4seg3d.{name}" for name in ("accuracy", "accuracy_map", "pixelwise_accuracy", "random")),
    },
    ("spars", "model.name"): set(),
    ("spars", "agent.name"): set(),
    ("spars", "env.reward"): set(),
    ("rl4seg3d", "model.name"): NETS | {"graft.swin", "graft.unet3d", "kspace.unet"},
    ("rl4seg3d", "critic.name"): NETS | {"graft.unet3d", "kspace.unet", "spars.compact"},
    ("rl4seg3d", "reward_model.name"): NETS | {"graft.unet3d", "kspace.unet"},
    ("rl4seg3d", "reward.name"): {
        "alpha.dice",
        "beta.dice",
        *(f"rl4seg.{name}" for name in ("accuracy", "accuracy_map", "dice", "pixelwise_accuracy", "random")),
    },
    ("alpha", "model.name"): {
        "beta.net",
        *("graft.tiny", "graft.unet3d", "kspace.unet"),
        *("rl4seg3d.unet3d", "rl4seg3d.unet3d_small"),
    },
    ("alpha", "loss.name"): {
        "beta.dice_ce",
        "cine.energy",
        *("graft.bce_dice", "graft.dice_ce", "graft.focal_dice", "graft.iou", "graft.nnunet"),
        *("graft.softmax_focal", "graft.tversky"),
    },
    ("alpha", "agent.name"): {"beta.policy"},
    ("alpha", "env.name"): {"beta.threshold", "cine.columns"},
    ("alpha", "reward.name"): {
        "beta.dice",
        *(f"rl4seg.{name}" for name in ("accuracy", "accuracy_map", "dice", "pixelwise_accuracy", "random")),
        *(f"rl4seg3d.{name}" for name in ("accuracy", "accuracy_map", "pixelwise_accuracy", "random")),
    },
    ("cine", "agent.name"): {"alpha.policy", "beta.policy"},
    ("cine", "env.name"): set(),
}
"""What fits, for every config key that chooses a part."""


def refusal(world: World, method: str, key: str, part: str) -> MedrlError | None:
    """Train one step with a part; return the handled error of one that does not fit."""
    try:
        world.train(method, key, part)
    except MedrlError as error:
        return error
    return None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Data, plugins, and the parts of earlier stages that later ones start from."""
    from medrl.core.phantoms.cardiac import write_cardiac
    from medrl.core.phantoms.echo import write_echo, write_echo_sequences
    from medrl.core.phantoms.prostate import write_prostate
    from medrl.plugins.spars import trial

    folder = tmp_path_factory.mktemp("interchange")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name in ("alpha", "beta"):
            write_project(name, folder / name)
            install(patch, name, folder / name, folder)
        install(patch, "cine", CINE, folder)
        policy = folder / "plugins.toml"
        policy.write_text("[settings]\nthird_party = 'all'\n")
        manager = PluginManager.create(plugins_file=policy)

        train = {"train.device": "cpu", "train.batch_size": 2, "train.timeout_s": 60.0}
        one = train | {"train.max_steps": 1, "train.validate_every": 1, "train.checkpoint_every": 1}
        write_prostate(folder / "prostate", cases=4, test_cases=0, shape=(32, 32, 8))
        write_cardiac(folder / "cardiac", cases=4, test_cases=0, seed=1, shape=(16, 16), slices=1)
        flat, beating = folder / "flat", folder / "beating"
        for number, name in enumerate(("source", "target"), start=1):
            write_echo(flat / name, cases=6, test_cases=0, seed=number, shape=(32, 32))
            write_echo_sequences(beating / name, cases=6, test_cases=0, seed=number, size=(32, 32), frames=4)
        volumes = {"data.root": str(folder / "prostate"), "data.folds": 2}
        bases = {
            "graft": one | volumes,
            "alpha": one | volumes | {"sample.size": [32, 32, 8], "episodes": 2},
            "cine": one | {"agent.name": "cine.column", "agent.columns": 8},
            "kspace": one | KSPACE | {"data.root": str(folder / "cardiac"), "data.folds": 2},
            "kspace:model": {"stage": "reward"},
            "kspace:recon_model": {"stage": "recon"},
            "kspace:agent": {"stage": "policy"},
            "spars": one | flatten(trial.write(folder / "abdomen")),
            "spars:model": {"stage": "classifier", "classifier.kind": "compact"},
            "rl4seg": one | adapting("rl4seg.unet_small", flat) | {"sample.clahe": False},
            "rl4seg3d": one
            | adapting("rl4seg3d.unet3d_small", beating)
            | {"sample.spacing_mm": [0, 0], "sample.equalise": "off"},
        }
        world = World(manager, folder / "runs", bases)
        classifier = folder / "spars-first"
        job = build_train_job(manager, "spars", nest(bases["spars"] | {"stage": "classifier"}), classifier)
        with click.Context(manager.commands("spars").train) as context:
            context.invoke(manager.commands("spars").train.callback, job)
        bases["spars:agent"] = {"stage": "play", "inputs.classifier": str(classifier)}
        bases["spars:env.reward"] = bases["spars:agent"]
        for method in ("rl4seg", "rl4seg3d"):
            first = folder / f"{method}-first"
            job = build_train_job(manager, method, nest(bases[method]), first)
            command = manager.commands(method).train
            with click.Context(command) as context:
                context.invoke(command.callback, job)
            stages = {path.name.split("_", 1)[1]: str(path) for path in (first / "stages").iterdir()}
            inputs = {
                f"inputs.{name}": stages[name] for name in ("source", "style", "corrector") if name in stages
            }
            inputs |= {
                f"inputs.{name}": stages[f"{name}_1"]
                for name in ("reward", "anatomical", "landmark")
                if f"{name}_1" in stages
            }
            inputs |= {"inputs.actor": stages["style"], "inputs.pairs": [stages["pairs_1"]], "alone": True}
            bases[f"{method}:model"] = inputs | {"stage": "source"}
            bases[f"{method}:critic"] = inputs | {"stage": "ppo", "ppo.baseline": "critic"}
            bases[f"{method}:reward"] = inputs | {"stage": "ppo", "target.allow_labels": True}
            bases[f"{method}:reward_model"] = inputs | {
                "stage": REWARD_STAGE[method],
                "reward.init": "random",
            }
        yield world
    for module in [
        name for name in sys.modules if name.startswith(("medrl_alpha", "medrl_beta", "medrl_cine"))
    ]:
        del sys.modules[module]


REWARD_STAGE = {"rl4seg": "reward", "rl4seg3d": "anatomical"}

KSPACE: dict[str, Any] = {
    "sample.shape": [16, 16],
    "acquisition.init_center": 2,
    "budget.train": [2, 3],
    "budget.eval": [2],
    "model.name": "kspace.compact",
    "model.widths": [4, 6],
    "seg.steps": 1,
    "recon.steps": 1,
    "validation.cases": 2,
}


def adapting(network: str, data: Path) -> dict[str, Any]:
    """A loop of rl4seg or rl4seg3d whose stages have one step."""
    steps = {f"{stage}.steps": 1 for stage in ("source", "style", "corrector", "reward", "ppo")}
    networks = {
        key: value
        for block in ("model", "critic", "reward_model")
        for key, value in ((f"{block}.name", network), (f"{block}.channels", [4, 8]))
    }
    return {
        **networks,
        **steps,
        "data.root": str(data / "source"),
        "data.folds": 2,
        "target.root": str(data / "target"),
        "pairs.count": 8,
        "ppo.inner_steps": 1,
        "ppo.validation_images": 2,
    }


def install(patch: pytest.MonkeyPatch, name: str, project: Path, folder: Path) -> None:
    """Make a project importable, with the metadata of its distribution."""
    info = folder / "site" / f"medrl_{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: medrl-{name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[medrl.plugins]\n{name} = medrl_{name}.plugin\n")
    patch.syspath_prepend(str(project))
    patch.syspath_prepend(str(folder / "site"))


@pytest.mark.parametrize(("method", "key"), FITS)
def test_parts_of_other_plugins_train_a_step_or_are_refused_in_one_line(world, method, key):
    fitting, lines = set(), {}
    for name, part in world.pairs(method):
        if name != key:
            continue
        error = refusal(world, method, key, part)
        if error is None:
            fitting.add(part)
        else:
            lines[part] = f"{error.what}: {error.why}"
    assert fitting == FITS[method, key], lines
    for part, line in lines.items():
        assert "\n" not in line, (part, line)
        assert line.rpartition(": ")[2], (part, line)


@pytest.mark.parametrize("method", METHODS)
def test_every_key_that_chooses_a_part_is_in_the_matrix(world, method):
    assert sorted(world.keys(method)) == sorted(key for name, key in FITS if name == method)


def test_networks_agents_environments_losses_and_rewards_of_others_work_together(world):
    values = world.bases["alpha"] | {
        "model.name": "beta.net",
        "loss.name": "graft.tversky",
        "agent.name": "beta.policy",
        "env.name": "beta.threshold",
        "reward.name": "rl4seg.dice",
    }
    job = build_train_job(world.manager, "alpha", nest(values), world.folder / "together")
    command = world.manager.commands("alpha").train
    with click.Context(command) as context:
        context.invoke(command.callback, job)
    assert (job.run_dir / "checkpoints" / "last.pt").is_file()


def test_a_batch_that_batch_normalisation_cannot_take_is_refused_in_one_line(world):
    small = world.bases["alpha"] | {"train.batch_size": 1, "sample.size": [16, 16, 8]}
    narrow = replace(world, bases=world.bases | {"alpha": small})
    error = refusal(narrow, "alpha", "model.name", "kspace.unet")
    assert error is not None
    assert error.what == "batch normalisation sees one value in a channel at step 1"
    assert "train.batch_size" in error.do
