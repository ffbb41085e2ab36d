"""Networks, policies, rewards and correctors of a config, new or from the checkpoints of other stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medrl.core import rng
from medrl.core.adaptation import actors
from medrl.core.adaptation import parts as general
from medrl.core.adaptation.actors import Critic, PixelActor
from medrl.core.adaptation.parts import numbers as numbers
from medrl.core.checkpoint import Checkpoint
from medrl.core.learned_reward import (
    CorrectorModule,
    RewardNet,
    StyleRanges,
    StyleShift,
    build_corrector,
    input_channels,
)
from medrl.core.learned_reward.correctors import LEARNED
from medrl.core.validity import Rules

from .config import Rl4segConfig
from .domains import Domains

if TYPE_CHECKING:
    from medrl.core.config import ModelConfig
    from medrl.core.manager import PluginManager

METHOD = "rl4seg"
_TRIAL = (64, 64)
"""Size in pixels of the image on which a network is tried."""


# -- networks ----------------------------------------------------------------------------------------


def build_network(
    model: ModelConfig, manager: PluginManager, what: str, *, in_channels: int, out_channels: int, seed: int
) -> nn.Module:
    """Build a network by its registry key, and try it on an empty image.

    Args:
        model: Key and parameters.
        manager: Source of networks of every plugin.
        what: The block of the config that names it.
        in_channels: Channels of its input; the data decide.
        out_channels: Channels of its output.
        seed: Of its weights.

    Raises:
        ConfigError: Unknown key or parameters, or a network that does not map 2D images to logits.
    """
    return general.build_network(
        model,
        manager,
        what,
        in_channels=in_channels,
        out_channels=out_channels,
        seed=rng.derive_seed(seed, METHOD, what, "weights"),
        trial=_TRIAL,
        advice=f"--set {what}.name=rl4seg.unet",
    )


def actor_kind(cfg: Rl4segConfig) -> str:
    """Kind of the actor, `auto` resolved."""
    return "categorical" if cfg.actor.kind == "auto" else cfg.actor.kind


def actor_network(cfg: Rl4segConfig, manager: PluginManager, *, channels: int, classes: int) -> nn.Module:
    """Build the network of the actor."""
    out = actors.out_channels(actor_kind(cfg), classes)
    return build_network(
        cfg.model, manager, "model", in_channels=channels, out_channels=out, seed=cfg.train.seed
    )


def as_actor(cfg: Rl4segConfig, network: nn.Module, classes: int, *, bn_mode: str = "eval") -> PixelActor:
    """Make the policy of a network."""
    return actors.build_actor(network, classes=classes, kind=actor_kind(cfg), bn_mode=bn_mode)  # type: ignore[arg-type]


def critic(cfg: Rl4segConfig, manager: PluginManager, *, channels: int) -> Critic:
    """Build the critic."""
    network = build_network(
        cfg.critic, manager, "critic", in_channels=channels, out_channels=1, seed=cfg.train.seed
    )
    return Critic(network, bn_mode="batch")


def reward_net(cfg: Rl4segConfig, manager: PluginManager, *, channels: int, classes: int) -> RewardNet:
    """Build the reward net with new weights; each of several networks has its own."""
    block = cfg.reward
    networks = [
        build_network(
            cfg.reward_model,
            manager,
            "reward_model",
            in_channels=input_channels(channels, classes, block.encoding),
            out_channels=classes if block.head == "class" else 1,
            seed=rng.derive_seed(cfg.train.seed, "net", number),
        )
        for number in range(block.nets)
    ]
    return RewardNet(networks, classes=classes, head=block.head, encoding=block.encoding, reduce=block.reduce)


def corrector(
    cfg: Rl4segConfig,
    manager: PluginManager,
    *,
    classes: int,
    shape: Sequence[int],
    masks: Tensor | None = None,
) -> CorrectorModule:
    """Build the corrector; learned ones have new weights.

    Args:
        cfg: The config.
        manager: Source of the denoiser's network.
        classes: K.
        shape: Spatial size of the label maps.
        masks: ``(N, *S)`` source masks, of which the atlas is made.
    """
    kind = cfg.corrector.kind
    network: nn.Module | None = None
    if kind == "denoiser":
        network = build_network(
            cfg.model,
            manager,
            "model",
            in_channels=classes,
            out_channels=classes,
            seed=rng.derive_seed(cfg.train.seed, "corrector"),
        )
    with rng.isolated(rng.derive_seed(cfg.train.seed, METHOD, "corrector", "weights")):
        return build_corrector(
            kind, classes=classes, network=network, masks=masks, shape=shape, **cfg.corrector.params
        )


# -- what other stages made --------------------------------------------------------------------------


def load_part(path: Path | None, name: str, module: nn.Module, what: str) -> Checkpoint:
    """Fill a module from a checkpoint of rl4seg; see `medrl.core.adaptation.parts.load_part`."""
    return general.load_part(path, name, module, what, method=METHOD)


def open_part(path: Path | None, name: str, what: str) -> Checkpoint:
    """Open a checkpoint of rl4seg that holds a part; arguments as in `load_part`."""
    return general.open_part(path, name, what, method=METHOD)


def load_reward(cfg: Rl4segConfig, net: RewardNet) -> None:
    """Fill the reward net of PPO; its temperature is used only where `reward.calibrated` says so."""
    load_part(cfg.inputs.reward, "reward", net, "inputs.reward")
    if not cfg.reward.calibrated:
        net.set_temperature(1.0)


def ready_corrector(cfg: Rl4segConfig, manager: PluginManager, data: Domains) -> CorrectorModule:
    """Return the corrector of a config, with its trained weights if it has any."""
    made = corrector(cfg, manager, classes=data.classes, shape=data.shape, masks=data.masks)
    if cfg.corrector.kind in LEARNED:
        load_part(cfg.inputs.corrector, "corrector", made, "inputs.corrector")
    return made.requires_grad_(requires_grad=False).eval()


def start_reward(cfg: Rl4segConfig, net: RewardNet) -> None:
    """Start every network of a reward net from an actor whose first layer is widened.

    Raises:
        ConfigError: Actor and reward net are not of one kind.
    """
    init = cfg.reward.init
    if init != "random":
        weights = open_part(getattr(cfg.inputs, init), "actor", f"inputs.{init}").states["actor"]
        general.start_reward(net, weights, init)


# -- rules and styles --------------------------------------------------------------------------------


def rules_of(cfg: Rl4segConfig, label_names: Mapping[str, int]) -> Rules:
    """Load the anatomical rules, with the label values of the data where names agree."""
    return general.rules_of(cfg.rules, label_names)


def style_shift(cfg: Rl4segConfig, name: str) -> StyleShift:
    """Return the style changes of a config; `name` separates the draws of stages."""
    ranges = StyleRanges(borrow=cfg.style.borrow).only(*cfg.style.families).scaled(cfg.style.strength)
    return StyleShift(ranges, seed=rng.derive_seed(cfg.train.seed, "style", name))
