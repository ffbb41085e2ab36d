"""Strict YAML, layering with origins, all problems at once, comparison on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.core.config import (
    Block,
    Layer,
    MethodConfig,
    ModelConfig,
    dump_yaml,
    flatten,
    load_yaml,
    machine_keys,
    nest,
    parse_set,
    parse_yaml,
    resolve,
)
from medrl.core.errors import ConfigError


class Teachers(Block):
    folder: Path | None = None
    weights: tuple[float, ...] = ()


class Prize(Block):
    name: str = "toy.prize"
    size: int = 1


class Toy(MethodConfig):
    method: str = "toy"
    model: ModelConfig = ModelConfig(name="toy.small")
    prize: Prize = Prize()
    teachers: Teachers = Teachers()


def test_numbers_and_booleans_are_read_as_people_mean_them():
    values = parse_yaml("a: 1e-3\nb: on\nc: true\nd: 012\ne: 1_000\nf:\ng: .5\nh: no\ni: -3\nj: 1:30\n")
    assert values == {
        "a": 0.001,
        "b": "on",
        "c": True,
        "d": "012",
        "e": 1000,
        "f": None,
        "g": 0.5,
        "h": "no",
        "i": -3,
        "j": "1:30",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("a:\n  b: 1\n  b: 2", "duplicate key 'b'"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("- 1", "must be a mapping"),
        ("a: [", "line 1"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
)
def test_dangerous_or_ambiguous_yaml_is_refused_with_its_place(text, reason):
    with pytest.raises(ConfigError, match=reason.replace("'", ".")):
        parse_yaml(text)


def test_an_oversized_file_is_refused_before_parsing(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("a: " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_yaml(path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(tmp_path / "absent.yaml")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), plain, max_size=4))
def test_written_yaml_reads_back_to_the_same_values(values):
    assert parse_yaml(dump_yaml(values)) == values


def test_later_layers_win_and_origins_are_kept():
    resolved = resolve(
        Toy,
        [
            Layer("defaults.yaml", {"train": {"lr": 0.1, "seed": 3}}),
            Layer("g.yaml", {"train": {"lr": 0.2}}),
            Layer("--set", {"train": {"lr": 0.3}}),
        ],
    )
    assert resolved.config.train.lr == 0.3
    assert resolved.origins["train.lr"] == "--set"
    assert resolved.origins["train.seed"] == "defaults.yaml"
    assert resolved.origins["train.batch_size"] == "built in"


def test_every_problem_is_reported_at_once_with_suggestions():
    layers = [Layer("g.yaml", {"trian": {}, "train": {"lrr": 1, "lr": -1, "seed": "x"}})]
    with pytest.raises(ConfigError) as caught:
        resolve(Toy, layers)
    text = str(caught.value)
    assert "trian: unknown key (g.yaml); did you mean 'train'?" in text
    assert "train.lrr: unknown key (g.yaml); did you mean 'lr'?" in text
    assert "train.lr: Input should be greater than 0, got -1 (g.yaml)" in text
    assert "train.seed" in text
    assert len(caught.value.problems) == 4


def test_another_model_starts_without_the_parameters_of_the_old_one():
    resolved = resolve(
        Toy,
        [
            Layer("a", {"model": {"name": "toy.small", "width": 8}}),
            Layer("b", {"model": {"name": "other.net", "depth": 2}}),
        ],
    )
    assert resolved.config.model.params == {"depth": 2}


def test_a_block_with_fields_of_its_own_keeps_them_under_another_name():
    layers = [
        Layer("a", {"prize": {"name": "toy.prize", "size": 8}}),
        Layer("b", {"prize": {"name": "toy.cup"}}),
    ]
    assert resolve(Toy, layers).config.prize == Prize(name="toy.cup", size=8)


def test_relative_paths_are_taken_from_the_config_file(tmp_path):
    layers = [
        Layer("g.yaml", {"data": {"root": "scans"}, "teachers": {"folder": "../t"}}, base_dir=tmp_path / "c")
    ]
    config = resolve(Toy, layers).config
    assert config.data.root == tmp_path / "c" / "scans"
    assert config.teachers.folder == tmp_path / "t"


def test_resume_comparison_names_the_experiment_and_ignores_the_machine():
    resolved = resolve(Toy, [Layer("a", {"train": {"lr": 0.1, "workers": 4}})])
    other = resolve(Toy, [Layer("a", {"train": {"lr": 0.2, "workers": 0, "device": "cpu"}})])
    assert resolved.difference(other.values()) == ["train.lr: 0.2 -> 0.1"]
    assert resolve(Toy, [Layer("a", {"train": {"workers": 2}})]).hash == resolve(Toy, []).hash
    assert resolved.hash != other.hash
    assert {"train.workers", "train.device", "train.threads"} <= machine_keys(Toy)


def test_resolved_config_survives_its_own_yaml():
    resolved = resolve(Toy, [Layer("a", {"data": {"root": "/d"}, "teachers": {"weights": [1e-7, 0.25]}})])
    again = resolve(Toy, [Layer("b", parse_yaml(resolved.to_yaml()))])
    assert again.config == resolved.config
    assert again.hash == resolved.hash


def test_set_values_are_typed_and_malformed_ones_refused():
    assert parse_set("train.lr=1e-3") == ("train.lr", 0.001)
    assert parse_set("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_set("a=x=y") == ("a", "x=y")
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_set("train.lr")


def test_nest_and_flatten_are_inverse_and_conflicts_are_named():
    flat = {"a.b": 1, "a.c.d": 2, "e": []}
    assert flatten(nest(flat)) == flat
    with pytest.raises(ConfigError, match="'a' is already a value"):
        nest({"a": 1, "a.b": 2})


def test_a_config_is_frozen():
    config = resolve(Toy, []).config
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0
