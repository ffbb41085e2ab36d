"""Which subjects train a reward net, which validate and which test it: by hash, the same for ever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from medrl.core.errors import ConfigError
from medrl.core.rng import derive_seed

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SubjectSplit:
    """Assigns each subject to a part by the hash of its name.

    A subject's part depends on its name, the seed and the shares; it is the same in every iteration and does
    not change when pairs are added. Only in small populations are subjects moved, those nearest to the
    limit first, so that no wanted part is empty while another has two; training comes first.

    Args:
        validation: Share of subjects that validate.
        test: Share of subjects that test.
        seed: Other seeds give other splits.
        moved: Part of each subject that was moved; `of` finds them.

    Raises:
        ConfigError: Shares that leave nothing for training.

    Source: specification §14.7; the original shuffles anew in each instance, so that training and test
    overlap, and fewer than ten pairs leave training empty (§13.13).
    """

    validation: float = 0.1
    test: float = 0.0
    seed: int = 0
    moved: Mapping[str, Part] | None = None

    def __post_init__(self) -> None:
        if self.validation < 0.0 or self.test < 0.0 or self.validation + self.test >= 1.0:
            raise ConfigError(
                "split of subjects",
                why=f"validation {self.validation} and test {self.test} leave nothing for training",
            )

    @classmethod
    def of(
        cls, subjects: Iterable[str], *, validation: float = 0.1, test: float = 0.0, seed: int = 0
    ) -> SubjectSplit:
        """The split of a population: all subjects that there will ever be pairs of.

        >>> split = SubjectSplit.of(["a", "b", "c", "d", "e"], validation=0.1)
        >>> sorted({split.part(name) for name in "abcde"})
        ['train', 'val']
        """
        plain = cls(validation, test, seed)
        names = sorted(set(subjects), key=plain.place)
        parts = {name: plain.part(name) for name in names}
        wanted: tuple[tuple[Part, float], ...] = (("train", 1.0), ("val", validation), ("test", test))
        moved: dict[str, Part] = {}
        for part, share in wanted:
            if share == 0.0 or part in parts.values():
                continue
            # The fullest other part gives one, if it keeps one, or if there would be no training without it.
            giver = max(PARTS, key=lambda other: sum(value == other for value in parts.values()))
            held = [name for name in names if parts[name] == giver]
            if len(held) > 1 or (held and part == "train"):
                name = held[-1] if part == "train" else held[0]
                parts[name] = moved[name] = part
        return cls(validation, test, seed, moved or None)

    def place(self, subject: str) -> float:
        """Place of a subject in [0, 1): test comes first, then validation, then training."""
        return float(derive_seed(self.seed, "subject", subject) / 2**63)

    def part(self, subject: str) -> Part:
        """Part of a subject, also of one that was not in the population."""
        if self.moved and subject in self.moved:
            return self.moved[subject]
        place = self.place(subject)
        if place < self.test:
            return "test"
        return "val" if place < self.test + self.validation else "train"
