import pytest

from medrl.cli.init import comments, config_text
from medrl.core.config import flatten, load_yaml, parse_yaml, resolve_method
from medrl.core.manager import PluginManager


def test_the_file_is_valid_as_written(medrl, toy):
    assert medrl("init", "toy").code == 0
    assert medrl("train", "toy", "-c", "config.yaml", "--print-config").code == 0
    assert medrl("train", "-c", "config.yaml", "--print-config").code == 0


@pytest.mark.parametrize("method", ["toy", "graft"])
def test_the_full_file_holds_every_value_and_changes_none(toy, method):
    manager = PluginManager.create()
    values = parse_yaml(config_text(manager, method, full=True))
    defaults = resolve_method(manager, method).values()
    defaults["data"]["root"] = values["data"]["root"]
    assert flatten(values) == flatten(defaults)


@pytest.mark.parametrize("method", ["toy", "graft"])
@pytest.mark.parametrize("full", [True, False])
def test_every_value_is_explained_but_constructor_parameters_of_networks(toy, method, full):
    block, above = "", ""
    for line in config_text(PluginManager.create(), method, full=full).splitlines():
        if line and not line.lstrip().startswith("#"):
            block = line.partition(":")[0] if not line.startswith(" ") else block
            assert above.lstrip().startswith("#") or (block == "model" and "name:" not in line), line
        above = line


def test_comments_of_the_defaults_win_over_descriptions(toy):
    text = config_text(PluginManager.create(), "toy", full=True)
    assert "# what it likes best (paper, section 3)\n  mode: fair" in text
    assert "# of the ratio, unitless\n  clip: 0.2" in text
    assert "# how the toy decides\npolicy:" in text
    assert "# Optimiser steps.\n  max_steps: 4" in text


def test_the_short_file_holds_the_usual_values_and_the_options_of_the_method(toy):
    values = parse_yaml(config_text(PluginManager.create(), "toy"))
    assert values["policy"] == {"mode": "fair"}
    assert set(values["data"]) == {"root", "fold", "folds", "group_by"}
    assert "keep_last" not in values["train"]


def test_a_preset_and_a_dataset_are_written_into_it(medrl, toy):
    medrl("init", "toy", "-o", "sub/c.yaml", "--preset", "smoke", "--data", "images")
    values = load_yaml(toy / "sub" / "c.yaml")
    assert values["train"]["max_steps"] == 3
    assert values["data"]["root"] == str(toy / "images")


def test_a_file_that_is_there_is_not_replaced_unasked(medrl, toy):
    (toy / "config.yaml").write_text("mine: 1\n")
    answer = medrl("init", "toy")
    assert (answer.code, "--force" in answer.err) == (2, True)
    assert (toy / "config.yaml").read_text() == "mine: 1\n"
    assert medrl("init", "toy", "--force").code == 0


def test_a_dash_writes_to_stdout(medrl, toy):
    assert parse_yaml(medrl("init", "toy", "-o", "-").out)["method"] == "toy"
    assert list(toy.iterdir()) == []


def test_an_unknown_method_gives_the_nearest(medrl):
    answer = medrl("init", "tooy")
    assert (answer.code, "did you mean 'toy'?" in answer.err) == (2, True)


def test_comments_are_found_above_and_behind_values():
    text = "# top\na: 1\nb:  # block\n  # first\n  # second\n  c: 'x # no'  # third\n  d: 2\n# far\n\ne: 1\n"
    assert comments(text) == {"a": "top", "b": "block", "b.c": "first second third"}
