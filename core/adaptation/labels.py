"""Labels of two domains made one set: joined, renumbered, matched by name."""

from __future__ import annotations

from collections.abc import Mapping

from medrl.core.errors import ConfigError, DataError, did_you_mean


def join_labels(
    labels: Mapping[str, int], merge: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, int], dict[int, int]]:
    """Join labels; return what is joined by name, the values of the rest, and old to new values.

    A label to join may be one that only the target has.

    Raises:
        ConfigError: A label to join to does not exist or is itself joined, or the background would go.

    >>> join_labels({"background": 0, "LV": 1, "MYO": 2, "LA": 3}, {"LV": "MYO", "3": "background"})[2]
    {0: 0, 1: 1, 2: 1, 3: 0}
    """
    by_value = {str(value): name for name, value in labels.items()}
    joined: dict[str, str] = {}
    for text, other in merge.items():
        name, into = by_value.get(text, text), by_value.get(other, other)
        if into == "background":
            into = by_value["0"]
        if into not in labels:
            raise ConfigError(
                "sample.merge", why=f"no label '{into}'; {did_you_mean(into, labels)}", do=f"{dict(labels)}"
            )
        if labels.get(name) == 0:
            raise ConfigError("sample.merge", why="the background cannot be joined to another label")
        if name != into:
            joined[name] = into
    chained = [name for name, into in joined.items() if into in joined]
    if chained:
        raise ConfigError(
            "sample.merge",
            why=f"'{chained[0]}' is joined to '{joined[chained[0]]}', which is itself joined",
            do="name the last one",
        )
    left = sorted((value, name) for name, value in labels.items() if name not in joined)
    names = {name: number for number, (_, name) in enumerate(left)}
    values = {value: names[joined.get(name, name)] for name, value in labels.items()}
    return joined, names, dict(sorted(values.items()))


def values_by_name(
    declared: Mapping[str, int] | None,
    *,
    merge: Mapping[str, str],
    label_names: Mapping[str, int],
    values: Mapping[int, int],
) -> dict[int, int]:
    """Values in the files of another dataset to values in `label_names`, matched by name.

    Args:
        declared: Its label values by name; None if it does not name them: then as in the source.
        merge: What is joined, by name, as `join_labels` returned it.
        label_names: Values of the labels that are left.
        values: Old to new values of the source.

    Raises:
        DataError: It has a label that the source does not know.
    """
    if declared is None:
        return dict(values)
    found: dict[int, int] = {}
    for name, value in declared.items():
        joined = merge.get(name, name)
        if value != 0 and joined not in label_names:
            raise DataError(
                f"label '{name}'",
                why=f"the source has no such label, only {', '.join(label_names)}",
                do=f"--set 'sample.merge={{{name}: background}}', or rename it in dataset.json",
            )
        found[value] = 0 if value == 0 else label_names[joined]
    return found
