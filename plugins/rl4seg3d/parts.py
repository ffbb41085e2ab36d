"""Networks, policies, reward nets and correctors of a config, new or from the checkpoints of other stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medrl.core import rng
from medrl.core.adaptation import parts as general
from medrl.core.adaptation.actors import CategoricalActor, Critic
from medrl.core.checkpoint import Checkpoint
from medrl.core.learned_reward import (
    CorrectorModule,
    RewardNet,
    StyleRanges,
    StyleShift,
    input_channels,
)
from medrl.core.learned_reward.correctors import LEARNED
from medrl.core.learned_reward.net import Criterion
from medrl.core.validity import is_valid

from .config import Net, Rl4seg3dConfig
from .corrector import build_corrector
from .data import FRAMES
from .domains import METHOD, Domains

if TYPE_CHECKING:
    from medrl.core.config import ModelConfig
    from medrl.core.manager import PluginManager

_TRIAL = (64, 64, FRAMES)
"""Size of the window on which a network is tried."""


# -- networks ----------------------------------------------------------------------------------------


def build_network(
    model: ModelConfig, manager: PluginManager, what: str, *, in_channels: int, out_channels: int, seed: int
) -> nn.Module:
    """Build a network by its registry key, and try it on an empty window.

    Args:
        model: Key and parameters.
        manager: Source of networks of every plugin.
        what: The block of the config that names it.
        in_channels: Channels of its input; the data decide.
        out_channels: Channels of its output.
        seed: Of its weights.

    Raises:
        ConfigError: Unknown key or parameters, or a network that does not map windows to logits.
    """
    return general.build_network(
        model,
        manager,
        what,
        in_channels=in_channels,
        out_channels=out_channels,
        seed=rng.derive_seed(seed, METHOD, what, "weights"),
        trial=_TRIAL,
        advice=f"--set {what}.name=rl4seg3d.unet3d",
    )


def actor_network(cfg: Rl4seg3dConfig, manager: PluginManager, *, channels: int, classes: int) -> nn.Module:
    """Build the network of the actor."""
    return build_network(
        cfg.model, manager, "model", in_channels=channels, out_channels=classes, seed=cfg.train.seed
    )


def as_actor(network: nn.Module, classes: int) -> CategoricalActor:
    """Make the policy of a network; its normalisation sees one window at a time, so it is the same always."""
    return CategoricalActor(network, classes=classes)


def critic(cfg: Rl4seg3dConfig, manager: PluginManager, *, channels: int) -> Critic:
    """Build the critic; one with deep supervision learns at every resolution."""
    network = build_network(
        cfg.critic, manager, "critic", in_channels=channels, out_channels=1, seed=cfg.train.seed
    )
    return Critic(network, bn_mode="batch", deep=True)


def reward_net(
    cfg: Rl4seg3dConfig, manager: PluginManager, name: Net, *, channels: int, classes: int
) -> RewardNet:
    """Build a reward net with new weights.

    The landmark net tells how well the ends of the mitral annulus are placed, which is no matter of right
    or wrong labels: it has a binary head and learns by squared error always.
    """
    block = cfg.reward
    head = block.head if name == "anatomical" else "binary"
    network = build_network(
        cfg.reward_model,
        manager,
        "reward_model",
        in_channels=input_channels(channels, classes, block.encoding),
        out_channels=classes if head == "class" else 1,
        seed=rng.derive_seed(cfg.train.seed, "net", name),
    )
    criterion: Criterion = block.criterion if name == "anatomical" else "mse"
    return RewardNet([network], classes=classes, head=head, encoding=block.encoding, criterion=criterion)


def corrector(
    cfg: Rl4seg3dConfig, manager: PluginManager, data: Domains, *, masks: Tensor | None = None
) -> CorrectorModule:
    """Build the corrector; learned ones have new weights.

    Args:
        cfg: The config.
        manager: Source of the denoiser's network.
        data: Knows classes and the size of windows.
        masks: ``(N, *S)`` source masks, of which the atlas is made.
    """
    kind = cfg.corrector.kind
    network: nn.Module | None = None
    if kind == "denoiser":
        network = build_network(
            cfg.model,
            manager,
            "model",
            in_channels=data.classes,
            out_channels=data.classes,
            seed=rng.derive_seed(cfg.train.seed, "corrector"),
        )
    with rng.isolated(rng.derive_seed(cfg.train.seed, METHOD, "corrector", "weights")):
        return build_corrector(
            kind,
            classes=data.classes,
            network=network,
            masks=masks,
            shape=data.shape,
            **cfg.corrector.params,
        )


# -- what other stages made --------------------------------------------------------------------------


def load_part(path: Path | None, name: str, module: nn.Module, what: str) -> Checkpoint:
    """Fill a module from a checkpoint of rl4seg3d; see `medrl.core.adaptation.parts.load_part`."""
    return general.load_part(path, name, module, what, method=METHOD)


def ready_net(cfg: Rl4seg3dConfig, manager: PluginManager, name: Net, data: Domains) -> RewardNet:
    """Return a trained reward net; its temperature is used only where `reward.calibrated` says so."""
    net = reward_net(cfg, manager, name, channels=data.channels, classes=data.classes)
    load_part(getattr(cfg.inputs, name), "reward", net, f"inputs.{name}")
    if not cfg.reward.calibrated:
        net.set_temperature(1.0)
    return net.requires_grad_(requires_grad=False).eval()


def ready_corrector(cfg: Rl4seg3dConfig, manager: PluginManager, data: Domains) -> CorrectorModule:
    """Return the corrector of a config, with its trained weights if it has any."""
    masks = data.masks if cfg.corrector.kind == "atlas" else None
    made = corrector(cfg, manager, data, masks=masks)
    if cfg.corrector.kind in LEARNED:
        load_part(cfg.inputs.corrector, "corrector", made, "inputs.corrector")
    return made.requires_grad_(requires_grad=False).eval()


def start_reward(cfg: Rl4seg3dConfig, name: Net, net: RewardNet) -> None:
    """Start the anatomical net from an actor whose first layer is widened, if the config says so.

    Raises:
        ConfigError: Actor and reward net are not of one kind.
    """
    init = cfg.reward.init
    if name == "anatomical" and init != "random":
        path: Path | None = getattr(cfg.inputs, init)
        weights = general.open_part(path, "actor", f"inputs.{init}", method=METHOD).states["actor"]
        general.start_reward(net, weights, init)


# -- rules and styles --------------------------------------------------------------------------------


def validity(cfg: Rl4seg3dConfig, label_names: Mapping[str, int]) -> Callable[[Tensor], bool]:
    """Return whether every frame of a label map ``(X, Y, T)`` keeps the anatomical rules."""
    rules = general.rules_of(cfg.rules, label_names)
    return lambda mask: all(is_valid(frame, rules) for frame in mask.unbind(dim=-1))


def style_shift(cfg: Rl4seg3dConfig, name: str) -> StyleShift:
    """Return the style changes of a config; `name` separates the draws of stages."""
    ranges = StyleRanges(borrow=cfg.style.borrow).only(*cfg.style.families).scaled(cfg.style.strength)
    return StyleShift(ranges, seed=rng.derive_seed(cfg.train.seed, "style", name))
