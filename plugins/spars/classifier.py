"""Training of what scores windows: ``medrl spars train-classifier``.

From labels of images: clusters of cells (or annealed top-k) give a map of presence; pseudo-masks cut from it
teach a fraction head; components that volumes without the object show as well are gated away. Networks of
windows learn from bags. With `label_source` ``crop`` voxel masks of training cases take the place of all
that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward.temperature import fit_temperature
from medrl.core.metrics import auroc
from medrl.core.rng import derive_seed, isolated, numpy_generator, torch_generator

from .config import SparsConfig
from .data import Loaded, VolumeSet
from .mil.bank import FeatureBank
from .mil.clusters import FULL_SCALE, learn_clusters, stretched
from .mil.features import to_voxels
from .mil.fraction import RoundFacts, Rows, collect, draw, fraction_loss, one_cycle, optimiser, refused
from .mil.gate import component_statistics, gate_level
from .mil.maps import CellNetwork, ClusterMap, map_of
from .mil.pseudo import pseudo_mask
from .mil.topk import learn_topk
from .mil.windows import annealed_top, bag_logit, bag_loss, dilated, draw_bag, draw_crops, fitted
from .models import CompactNet, FaithfulNet
from .scoring import CompactScorer, FaithfulScorer, FractionScorer, PresenceScorer, ScorerModule

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.spars")

_HELD = 32
"""Fixed windows of each validation volume."""


def fit(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Train the classifier of a config, calibrate it, and tell how well it knows images.

    The checkpoint holds it as ``scorer``; its settings, label source, area under the ROC curve, sensitivity
    and specificity (on the counts of all validation volumes) are in the description and in the manifest.

    Raises:
        RuntimeFault: Labels of validation images are told hardly better than by chance.
        DataError: Labels or masks that are needed are not there.
    """
    kind = cfg.classifier.kind
    if kind in ("fraction", "presence"):
        _fit_cells(rt, cfg, data)
    else:
        _fit_windows(rt, cfg, data)


def images_told(scorer: ScorerModule, part: VolumeSet) -> tuple[list[float], list[int]]:
    """Scores and labels of whole volumes."""
    return [scorer.image_score(volume) for volume in part.volumes], part.labels()


def image_auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Area under the ROC curve of labels of images; NaN with one class alone."""
    if len(set(labels)) < 2:
        return math.nan
    return float(auroc(list(scores), [bool(label) for label in labels]))


def image_counts(scorer: ScorerModule, scores: Sequence[float], labels: Sequence[int]) -> dict[str, float]:
    """Counts of images told rightly and wrongly at the midpoint; sensitivity and specificity of them."""
    called = [score >= float(scorer.image_midpoint) for score in scores]
    counts = {
        "true_positives": sum(c and y for c, y in zip(called, labels, strict=True)),
        "false_negatives": sum(not c and y for c, y in zip(called, labels, strict=True)),
        "true_negatives": sum(not c and not y for c, y in zip(called, labels, strict=True)),
        "false_positives": sum(c and not y for c, y in zip(called, labels, strict=True)),
    }
    positive = counts["true_positives"] + counts["false_negatives"]
    negative = counts["true_negatives"] + counts["false_positives"]
    return {
        **{name: float(value) for name, value in counts.items()},
        "sensitivity": counts["true_positives"] / positive if positive else math.nan,
        "specificity": counts["true_negatives"] / negative if negative else math.nan,
    }


def midpoint(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The score between two images that best tells all apart; of equal ones the middle.

    >>> midpoint([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    0.5
    """
    values = sorted(set(scores))
    if len(values) < 2 or len(set(labels)) < 2:
        return values[len(values) // 2] if values else 0.5
    cuts = [0.5 * (low + high) for low, high in pairwise(values)]
    positives = sum(labels)

    def worth(cut: float) -> float:
        hits = sum(s >= cut and y for s, y in zip(scores, labels, strict=True)) / positives
        rejected = sum(s < cut and not y for s, y in zip(scores, labels, strict=True))
        return hits + rejected / (len(labels) - positives)

    best = max(worth(cut) for cut in cuts)
    equal = [cut for cut in cuts if worth(cut) >= best - 1e-12]
    return equal[len(equal) // 2]


def check_auc(auc: float, least: float, *, source: str) -> None:
    """Refuse a classifier that hardly tells images apart; one that cannot be judged is let through.

    Raises:
        RuntimeFault: It is below the least.
    """
    if math.isnan(auc):
        _log.warning("validation volumes are all alike: whether the classifier knows anything cannot be told")
        return
    if auc < least:
        raise RuntimeFault(
            f"the classifier tells validation images apart with an AUC of {auc:.3f}, near chance "
            f"(classifier.least_auc is {least:g})",
            why="scores of such a classifier lead nowhere, so that nothing is trained on them",
            do="give more volumes, above all without the object (64 of each were enough on phantoms); or try "
            "--set classifier.cluster.grid, --set classifier.mil=topk, --set sample.hu_window"
            + ("; or --set classifier.label_source=crop where there are masks" if source == "image" else ""),
        )


# -- dense maps over cells -------------------------------------------------------------------------


def _fit_cells(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Kinds `fraction` and `presence`."""
    settings = cfg.classifier
    train = _chosen(data.train, settings.patients)
    bank = FeatureBank(train.volumes, settings.cluster.grid, device=rt.device)
    scorer = _cell_scorer(cfg)
    rt.prepare(scorer)
    if scorer.presence is not None:
        scorer.presence.requires_grad_(requires_grad=False)
    rt.checkpoint.register(scorer=scorer)
    optimizer: torch.optim.AdamW | None = None
    if isinstance(scorer, FractionScorer):
        optimizer = optimiser(scorer.head, settings.head)
        rt.checkpoint.register(optimizer=optimizer)
    _describe(rt, cfg, data, scorer)
    start = rt.checkpoint.resume()
    if start == 0:
        _learn_presence(rt, cfg, data, scorer, bank, train)
    if optimizer is None or not isinstance(scorer, FractionScorer):
        for step in rt.steps(start, 1):
            rt.log(step, val_auc=_auc_of(scorer, data.val))
    else:
        _fit_fraction(rt, cfg, data, scorer, optimizer, bank, train, start)
        _gate(cfg, data, scorer)
    _finish(rt, cfg, data, scorer)


def _cell_scorer(cfg: SparsConfig) -> FractionScorer | PresenceScorer:
    settings = cfg.classifier
    presence: ClusterMap | CellNetwork | None = None
    if settings.label_source == "image":
        if settings.mil == "topk":
            presence = CellNetwork(settings.head.widths)
        else:
            presence = ClusterMap(settings.cluster.runs, settings.cluster.clusters, full_scale=FULL_SCALE)
    if settings.kind == "presence":
        if presence is None:
            raise ConfigError(
                "classifier.kind presence",
                why="it is learned from labels of images",
                do="--set classifier.kind=fraction for label_source crop",
            )
        return PresenceScorer(presence, cell=settings.cluster.grid, label_source=settings.label_source)
    with isolated(derive_seed(cfg.train.seed, "spars", "head")):
        head = CellNetwork(settings.head.widths)
    return FractionScorer(
        head,
        presence,
        cell=settings.cluster.grid,
        component=settings.gate.component,
        statistic=settings.gate.statistic,
        label_source=settings.label_source,
    )


def _learn_presence(
    rt: Runtime,
    cfg: SparsConfig,
    data: Loaded,
    scorer: FractionScorer | PresenceScorer,
    bank: FeatureBank,
    train: VolumeSet,
) -> None:
    """The map of presence, from labels of images; and the scale of features."""
    settings, seed = cfg.classifier, cfg.train.seed
    presence = scorer.presence
    if presence is None:
        rows = [bank.draw(k, settings.cluster.cells, seed, "scale") for k in range(len(bank))]
        cast("FractionScorer", scorer).head.learn_scale(torch.cat(rows))
        return
    found: ClusterMap | CellNetwork
    facts: dict[str, list[float]]
    if isinstance(presence, ClusterMap):
        clusters = learn_clusters(bank, train.labels(), settings.cluster, seed=seed)
        highest = clusters.z.flatten().sort(descending=True).values[:8]
        found, facts = clusters, {"highest_z": [round(float(z), 2) for z in highest]}
        clusters.z.copy_(stretched(clusters.z))
    else:
        widths = settings.head.widths
        found, losses = learn_topk(bank, train.labels(), settings.topk, seed=seed, widths=widths)
        facts = {"bag_losses": [round(loss, 4) for loss in losses]}
    presence.load_state_dict(found.state_dict())
    if isinstance(scorer, FractionScorer):
        scorer.head.mean.copy_(found.mean)
        scorer.head.scale.copy_(found.scale)
    _note(rt, presence=facts)
    auc = _presence_auc(scorer, data.val)
    _log.info("map of presence: %s, AUC of validation images %.3f", facts, auc)
    check_auc(auc, settings.least_auc, source=settings.label_source)


def _fit_fraction(
    rt: Runtime,
    cfg: SparsConfig,
    data: Loaded,
    scorer: FractionScorer,
    optimizer: torch.optim.AdamW,
    bank: FeatureBank,
    train: VolumeSet,
    start: int,
) -> None:
    """Rounds of pseudo-masks and head. A round that the guards refuse leaves the head as it was."""
    settings = cfg.classifier
    steps = _steps(cfg, settings.head.steps)
    rounds = settings.pseudo.rounds if settings.label_source == "image" else 1
    first = {name: value.clone() for name, value in _fresh(scorer, cfg).items()}
    rows: Rows | None = None
    for step in rt.steps(start, rounds * steps):
        number, place = divmod(step - 1, steps)
        if place == 0:
            rows = _begin(rt, cfg, data, scorer, optimizer, bank, train, number, first)
        elif rows is None and int(scorer.round) == number:
            rows = collect(bank, _masks(cfg, data, scorer, bank, train, number), seed=cfg.train.seed)
        if rows is None:
            continue  # the round was refused
        rate = one_cycle(place + 1, steps, highest=settings.head.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = draw(
            rows,
            settings.head.batch,
            seed=cfg.train.seed,
            step=step,
            rank=rt.rank,
            world_size=rt.world_size,
        )
        loss = fraction_loss(scorer.head, batch, weight=settings.head.weight)
        rt.backward(loss)
        rt.step(optimizer)
        rt.log(step, loss=loss.detach(), lr=rate, round=number)
        if place == steps - 1:
            _end(rt, cfg, data, scorer, step, number)


def _begin(
    rt: Runtime,
    cfg: SparsConfig,
    data: Loaded,
    scorer: FractionScorer,
    optimizer: torch.optim.AdamW,
    bank: FeatureBank,
    train: VolumeSet,
    number: int,
    first: Mapping[str, Tensor],
) -> Rows | None:
    """Pseudo-masks of a round, and a new head; None if a guard refuses them."""
    if number and int(scorer.round) != number - 1:
        return None  # the round before was refused
    if number:
        scorer.teacher.load_state_dict(scorer.head.state_dict())
    masks = _masks(cfg, data, scorer, bank, train, number)
    facts = _facts(masks)
    if number:
        before = _facts(_masks(cfg, data, scorer, bank, train, number - 1, teacher=False))
        why = refused(before, facts, cfg.classifier.pseudo)
        if why:
            _refuse(rt, number, why)
            return None
    if not facts.voxels:
        _log.warning("no positive training volume has a pseudo-mask: the fraction head will find nothing")
    _note(rt, **{f"round_{number}": {"voxels": facts.voxels, "found": facts.found}})
    scorer.head.load_state_dict({**scorer.head.state_dict(), **first})
    optimizer.state.clear()
    scorer.round.fill_(number)
    return collect(bank, masks, seed=cfg.train.seed)


def _end(rt: Runtime, cfg: SparsConfig, data: Loaded, scorer: FractionScorer, step: int, number: int) -> None:
    """Compare the head of a round with that before; put the better one back if a guard refuses it."""
    auc = _auc_of(scorer, data.val)
    rt.log(step, val_auc=auc)
    if not number or math.isnan(auc):
        return
    kept = {name: value.clone() for name, value in scorer.head.state_dict().items()}
    scorer.head.load_state_dict(scorer.teacher.state_dict())
    before = _auc_of(scorer, data.val)
    why = refused(RoundFacts(1, 1.0, before), RoundFacts(1, 1.0, auc), cfg.classifier.pseudo)
    if why:
        _refuse(rt, number, why)
        return
    scorer.head.load_state_dict(kept)


def _masks(
    cfg: SparsConfig,
    data: Loaded,
    scorer: FractionScorer,
    bank: FeatureBank,
    train: VolumeSet,
    number: int,
    *,
    teacher: bool = True,
) -> list[Tensor | None]:
    """Masks to learn from: pseudo-masks of positive volumes, or true ones with label_source `crop`."""
    del data
    labels = train.labels()
    if scorer.label_source == "crop":
        return [mask if bool(mask.any()) else None for mask in train.open_masks()]
    # Round 0 learns from the map of presence, later ones from the head of the round before.
    later = scorer.teacher if teacher else scorer.head
    source = cast("ClusterMap | CellNetwork", scorer.presence if number == 0 else later)
    found: list[Tensor | None] = []
    for index, label in enumerate(labels):
        if not label:
            found.append(None)
            continue
        volume, features = bank.volume(index), bank.features(index)
        chance = to_voxels(map_of(source, features), volume.shape, bank.cell)
        if number and scorer.presence is not None:
            # What the map of presence does not point at too belongs to no pseudo-mask of a further round.
            presence = to_voxels(map_of(scorer.presence, features), volume.shape, bank.cell)
            chance = torch.minimum(chance, presence)
        found.append(pseudo_mask(volume, chance, cfg.classifier.pseudo))
    return found


def _facts(masks: Sequence[Tensor | None]) -> RoundFacts:
    sizes = [int(mask.sum()) for mask in masks if mask is not None]
    return RoundFacts(sum(sizes), sum(size > 0 for size in sizes) / max(len(sizes), 1))


def _fresh(scorer: FractionScorer, cfg: SparsConfig) -> dict[str, Tensor]:
    """New weights of the head, always the same ones."""
    with isolated(derive_seed(cfg.train.seed, "spars", "head")):
        made = CellNetwork(cfg.classifier.head.widths)
    device = scorer.head.mean.device
    return {name: value.detach().to(device) for name, value in made.named_parameters()}


def _gate(cfg: SparsConfig, data: Loaded, scorer: FractionScorer) -> None:
    """The level that components must reach, from validation volumes without the object."""
    gate = cfg.classifier.gate
    if not gate.on or not len(data.val):
        scorer.level.fill_(-1.0)
        return
    peaks: list[float] = []
    for volume, label in zip(data.val.volumes, data.val.labels(), strict=True):
        if label:
            continue
        fraction, presence = scorer.maps(volume)
        if gate.statistic == "peak":
            peaks.append(float(presence.max()))
            continue
        peaks += component_statistics(
            fraction,
            presence,
            component=gate.component,
            statistic=gate.statistic,
            smallest=cfg.map.smallest,
        )
    low, high = gate.limits
    scorer.level.fill_(gate_level(peaks, margin=gate.margin, limits=(low, high)))


# -- networks of windows ---------------------------------------------------------------------------


def _fit_windows(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Kinds `compact` and `faithful`."""
    settings, net = cfg.classifier, cfg.classifier.net
    train = _chosen(data.train, settings.patients)
    scorer = _window_scorer(rt, cfg)
    rt.prepare(scorer)
    optimizer = torch.optim.Adam(scorer.network.parameters(), lr=net.lr)
    rt.checkpoint.register(scorer=scorer, optimizer=optimizer)
    _describe(rt, cfg, data, scorer)
    crops = settings.label_source == "crop"
    masks = _train_masks(train, dilate=net.dilate) if crops else None
    window = training_window(cfg)
    labels = train.labels()
    steps = _steps(cfg, net.steps)
    every = cfg.train.validate_every or max(1, steps // 5)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        scorer.train()
        losses: list[Tensor] = []
        names = []
        for index, source in _drawn(rt, cfg, labels, step):
            volume = train.volumes[index].to(rt.device)
            if masks is not None:
                drawn = draw_crops(masks[index], window, net.windows, source)
            else:
                drawn = draw_bag(volume.shape, labels[index], window, net.windows, source)
            with rt.autocast():
                logits = scorer.window_logits(volume, drawn.corners, drawn.size).float()
            target = drawn.labels.to(rt.device)
            if crops:
                losses.append(F.cross_entropy(logits, target.long()))
            else:
                top = annealed_top(step, steps, windows=net.windows, top=min(net.top, net.windows))
                losses.append(bag_loss(_difference(logits)[None], target[:1], top))
            names.append(train.ids[index])
        loss = torch.stack(losses).mean()
        rt.backward(loss, cases=names)
        done = rt.step(optimizer)
        rt.log(step, loss=loss.detach(), grad_norm=done.grad_norm)
        if step % every == 0 and step < rt.total_steps:
            rt.log(step, val_auc=_auc_of(scorer, data.val))
    scorer.eval()
    if settings.calibrate and len(data.val):
        _calibrate_windows(cfg, data.val, scorer, window)
    _finish(rt, cfg, data, scorer)


def training_window(cfg: SparsConfig) -> tuple[int, int, int]:
    """Windows that networks learn from: those that are scored; crops of their own for the faithful one."""
    settings = cfg.classifier
    if settings.kind == "faithful" and settings.label_source == "crop":
        return settings.net.crop
    return cfg.score.window


def _window_scorer(rt: Runtime, cfg: SparsConfig) -> CompactScorer | FaithfulScorer:
    settings = cfg.classifier
    with isolated(derive_seed(cfg.train.seed, "spars", "network")):
        if settings.kind == "faithful":
            return FaithfulScorer(
                FaithfulNet(), enlarge=settings.net.enlarge, label_source=settings.label_source
            )
        params = {"channels": settings.net.channels, **cfg.model.params}
        network = rt.job.manager.registry("models").build(cfg.model.name, **params)
    if not isinstance(network, CompactNet):
        raise ConfigError(
            f"model.name {cfg.model.name}",
            why="classifier.kind compact needs logits of cells",
            do="--set model.name=spars.compact, or --set classifier.kind=faithful",
        )
    return CompactScorer(network, batch=cfg.score.batch, label_source=settings.label_source)


def _train_masks(train: VolumeSet, *, dilate: bool) -> list[Tensor]:
    masks = train.open_masks()
    return [dilated(mask) if dilate else mask for mask in masks]


def _drawn(
    rt: Runtime, cfg: SparsConfig, labels: Sequence[int], step: int
) -> list[tuple[int, torch.Generator]]:
    """This rank's volumes of a step, every other one positive, each with a generator of its own."""
    net, seed = cfg.classifier.net, cfg.train.seed
    classes = [[k for k, label in enumerate(labels) if label == value] for value in (1, 0)]
    found = []
    for place in range(rt.rank * net.patients, (rt.rank + 1) * net.patients):
        pool = classes[place % 2] or classes[1 - place % 2]
        rng = numpy_generator(seed, "spars", "windows", step, place)
        source = torch_generator(seed, "spars", "corners", step, place)
        found.append((pool[int(rng.integers(len(pool)))], source))
    return found


@torch.no_grad()
def _calibrate_windows(
    cfg: SparsConfig, val: VolumeSet, scorer: CompactScorer | FaithfulScorer, window: tuple[int, int, int]
) -> None:
    """Fit the temperature on fixed windows of validation volumes: crops, or bags, by their labels."""
    net = cfg.classifier.net
    logits, targets = [], []
    masks = val.open_masks() if scorer.label_source == "crop" else None
    count = _HELD if scorer.kind == "compact" else min(_HELD, net.windows)
    for index, volume in enumerate(val.volumes):
        source = torch_generator(cfg.train.seed, "spars", "held", val.ids[index])
        if masks is not None:
            mask = dilated(masks[index]) if net.dilate else masks[index]
            drawn = draw_crops(mask, window, count, source)
        else:
            drawn = draw_bag(volume.shape, val.labels()[index], window, count, source)
        scores = scorer.windows(volume, drawn.corners, fitted(window, volume.shape)).cpu()
        found = torch.logit(scores.double(), eps=1e-12)
        logits.append(found if masks is not None else bag_logit(found[None], min(net.top, count)))
        targets.append(drawn.labels.double() if masks is not None else drawn.labels[:1].double())
    together = torch.cat(targets)
    if 0.0 < float(together.mean()) < 1.0:
        scorer.temperature.fill_(fit_temperature(torch.cat(logits), together))


# -- what all kinds share --------------------------------------------------------------------------


def _finish(rt: Runtime, cfg: SparsConfig, data: Loaded, scorer: ScorerModule) -> None:
    """Calibrate on images, judge, describe, and save; or refuse."""
    settings = cfg.classifier
    facts: dict[str, Any] = {"val_auc": math.nan}
    if len(data.val):
        scores, labels = images_told(scorer, data.val)
        facts["val_auc"] = image_auc(scores, labels)
        scorer.image_midpoint.fill_(midpoint(scores, labels))
        if settings.calibrate and 0 < sum(labels) < len(labels):
            logits = torch.tensor(scores, dtype=torch.float64) - float(scorer.image_midpoint)
            fitted_to = torch.tensor(labels, dtype=torch.float64)
            scorer.image_temperature.fill_(fit_temperature(logits, fitted_to))
        facts |= image_counts(scorer, scores, labels)
    check_auc(facts["val_auc"], settings.least_auc, source=settings.label_source)
    scorer.ready.fill_(1)
    plain = {name: None if math.isnan(value) else value for name, value in facts.items()}
    described = {"kind": settings.kind, "label_source": settings.label_source, **plain}
    rt.checkpoint.describe(auc=plain["val_auc"], classifier=described, masks_opened=len(data.masks.opened))
    _note(rt, classifier=described, masks_opened=len(data.masks.opened))
    if not cfg.train.max_steps or rt.completed:
        rt.checkpoint.save(rt.completed)
    _log.info("classifier: %s", described)


def _describe(rt: Runtime, cfg: SparsConfig, data: Loaded, scorer: ScorerModule) -> None:
    settings = cfg.classifier
    rt.checkpoint.describe(**data.facts(), scorer=scorer.settings(), label_source=settings.label_source)
    if rt.is_main:
        data.write_split(rt.run.dir)
    _note(rt, label_source=settings.label_source, split=data.split())


def _note(rt: Runtime, **facts: Any) -> None:
    if rt.is_main:
        rt.run.note(**facts)


def _refuse(rt: Runtime, number: int, why: str) -> None:
    _log.warning("round %d of pseudo-masks is left out: %s", number + 1, why)
    _note(rt, **{f"round_{number}": {"refused": why}})


def _chosen(part: VolumeSet, patients: int) -> VolumeSet:
    """The volumes of the first so many patients; all for 0."""
    if not patients:
        return part
    names = sorted(set(part.patients))[:patients]
    return part.subset([k for k, name in enumerate(part.patients) if name in names])


def _steps(cfg: SparsConfig, steps: int) -> int:
    return min(steps, cfg.train.max_steps) if cfg.train.max_steps else steps


def _auc_of(scorer: ScorerModule, part: VolumeSet) -> float:
    if not len(part) or part.presence is None:
        return math.nan
    return image_auc(*images_told(scorer, part))


def _presence_auc(scorer: FractionScorer | PresenceScorer, part: VolumeSet) -> float:
    """AUC of images by the map of presence alone."""
    if isinstance(scorer, FractionScorer) and scorer.presence is not None:
        return _auc_of(PresenceScorer(scorer.presence, cell=scorer.cell).to(scorer.device), part)
    return _auc_of(scorer, part)


def _difference(logits: Tensor) -> Tensor:
    """Logit of presence from two logits ``(..., 2)``."""
    return logits[..., 1] - logits[..., 0]
