"""Registries: keys, targets, checks against the base class, parameters."""

from __future__ import annotations

import collections
from typing import Any, Protocol

import pytest

from medrl.core.errors import ConfigError, PluginError
from medrl.core.registry import BASES, KINDS, Registry, check_target, import_target


class Shape(Protocol):
    """A protocol with one method."""

    def area(self) -> float: ...


class Square:
    """Fits `Shape`."""

    def __init__(self, side: float, *, name: str = "square") -> None:
        if side < 0:
            raise ValueError("side must not be negative")
        self.side = side
        self.name = name

    def area(self) -> float:
        return self.side**2


class Dot:
    """Does not fit `Shape`."""


def make_counter(**counts: int) -> dict[str, int]:
    return collections.Counter(counts)


def make_list(size: int) -> list[int]:
    return [0] * size


@pytest.fixture
def registry() -> Registry[Any]:
    return Registry("models")


def test_a_key_is_the_plugin_and_the_name(registry):
    registry.recorder("graft").add("tiny", Square, summary="a square")
    assert registry.keys() == ["graft.tiny"]
    entry = registry.entries()[0]
    assert (entry.key, entry.plugin, entry.summary) == ("graft.tiny", "graft", "a square")
    assert entry.location == f"{__name__}:Square"


def test_a_target_given_as_text_is_imported_only_when_asked_for(registry):
    registry.recorder("p").add("absent", "medrl_no_such_module:Thing", summary="cannot be imported")
    registry.recorder("p").add("counter", "collections:Counter", summary="standard library")
    assert registry.get("p.counter") is collections.Counter
    with pytest.raises(PluginError, match="importing 'medrl_no_such_module' failed: ModuleNotFoundError"):
        registry.get("p.absent")


def test_a_missing_attribute_names_near_matches(registry):
    registry.recorder("p").add("x", "collections:OrderdDict", summary="misspelt")
    with pytest.raises(PluginError, match="'collections' has no 'OrderdDict', did you mean 'OrderedDict'"):
        registry.get("p.x")


def test_an_unknown_key_lists_near_matches(registry):
    registry.recorder("graft").add("fullres", Square, summary="large")
    registry.recorder("graft").add("tiny", Square, summary="small")
    with pytest.raises(ConfigError, match=r"model 'graft.tinny': unknown key, did you mean 'graft.tiny'"):
        registry.get("graft.tinny")


def test_a_duplicate_names_both_owners(registry):
    registry.recorder("p").add("x", "collections:Counter", summary="first")
    with pytest.raises(
        PluginError, match=r"'collections:Counter' by plugin 'p'.*'collections:deque' by plugin 'p'"
    ):
        registry.recorder("p").add("x", "collections:deque", summary="second")
    assert registry.get("p.x") is collections.Counter


@pytest.mark.parametrize("name", ["", "Tiny", "a.b", "../x", "tiny net", "1st", "graft-tiny"])
def test_a_name_is_lower_case_letters_digits_and_underscores(registry, name):
    with pytest.raises(PluginError, match="must be lower-case letters, digits and underscores"):
        registry.recorder("graft").add(name, Square, summary="x")
    assert registry.keys() == []


@pytest.mark.parametrize(
    "target", ["collections", "collections.Counter", ":x", "a:", "os:system('x')", "a b:c"]
)
def test_a_target_is_module_colon_attribute(registry, target):
    with pytest.raises(PluginError, match="expected 'module:attribute'"):
        registry.recorder("p").add("x", target, summary="x")


def test_a_target_that_is_neither_text_nor_callable_is_refused(registry):
    with pytest.raises(PluginError, match="or a callable, got 3"):
        registry.recorder("p").add("x", 3, summary="x")


def test_an_empty_summary_is_refused(registry):
    with pytest.raises(PluginError, match="the summary is empty"):
        registry.recorder("p").add("x", Square, summary="  ")


def test_a_class_must_derive_from_the_base():
    registry: Registry[Any] = Registry("models", "collections:UserDict")
    registry.recorder("p").add("x", "collections:Counter", summary="no UserDict")
    with pytest.raises(PluginError, match="'collections:Counter' does not derive from collections.UserDict"):
        registry.get("p.x")


def test_a_value_that_cannot_be_called_is_no_part(registry):
    registry.recorder("p").add("x", "sys:maxsize", summary="a number")
    with pytest.raises(PluginError, match="'sys:maxsize' is a int, expected a class or a function"):
        registry.get("p.x")


def test_a_factory_is_checked_by_what_it_makes():
    registry: Registry[Any] = Registry("models", "collections:Counter")
    registry.recorder("p").add("good", make_counter, summary="a counter")
    registry.recorder("p").add("bad", make_list, summary="a list")
    assert registry.build("p.good", a=2)["a"] == 2
    with pytest.raises(PluginError, match="expected a Counter, the factory made a list"):
        registry.build("p.bad", size=1)


def test_a_protocol_base_checks_the_methods():
    registry: Registry[Any] = Registry("models", f"{__name__}:Shape")
    registry.recorder("p").add("square", Square, summary="fits")
    registry.recorder("p").add("dot", Dot, summary="lacks area")
    registry.recorder("p").add("made", make_list, summary="makes a list")
    assert registry.get("p.square") is Square
    with pytest.raises(PluginError, match="lacks area of Shape"):
        registry.get("p.dot")
    with pytest.raises(PluginError, match="expected a Shape, the factory made a list"):
        registry.build("p.made", size=2)


def test_build_reports_all_unknown_and_missing_parameters_at_once(registry):
    registry.recorder("p").add("square", Square, summary="x")
    with pytest.raises(ConfigError) as caught:
        registry.build("p.square", nam="a", colour="red")
    text = str(caught.value)
    assert "unknown parameter 'nam', did you mean 'name'" in text
    assert "unknown parameter 'colour', known: name, side" in text
    assert "missing parameter 'side'" in text


def test_build_passes_the_parameters(registry):
    registry.recorder("p").add("square", Square, summary="x")
    made = registry.build("p.square", side=3.0, name="s")
    assert (made.area(), made.name) == (9.0, "s")


def test_values_that_a_part_refuses_become_one_config_error(registry):
    registry.recorder("p").add("square", Square, summary="x")
    with pytest.raises(ConfigError, match="refused its parameters: ValueError: side must not be negative"):
        registry.build("p.square", side=-1.0)


def test_a_parameter_named_key_reaches_the_part(registry):
    registry.recorder("p").add("counter", make_counter, summary="x")
    assert registry.build("p.counter", key=4, self=5) == {"key": 4, "self": 5}


def test_discard_forgets_one_plugin_and_keeps_the_others(registry):
    registry.recorder("a").add("x", Square, summary="x")
    registry.recorder("ab").add("x", Dot, summary="x")
    registry.get("a.x")
    registry.discard("a")
    assert registry.keys() == ["ab.x"]
    with pytest.raises(ConfigError, match="unknown key"):
        registry.get("a.x")


def test_every_kind_has_a_base_and_models_are_torch_modules():
    assert tuple(BASES) == KINDS
    registry: Registry[Any] = Registry("models", BASES["models"])
    registry.recorder("p").add("linear", "torch.nn:Linear", summary="one layer")
    registry.recorder("p").add("counter", "collections:Counter", summary="no network")
    assert tuple(registry.build("p.linear", in_features=3, out_features=2).weight.shape) == (2, 3)
    with pytest.raises(PluginError, match="does not derive from torch.nn"):
        registry.get("p.counter")


def test_a_module_that_ends_the_program_becomes_a_plugin_error(tmp_path, monkeypatch):
    (tmp_path / "medrl_quits_on_import.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"it ended the program \(SystemExit\)"):
        import_target("medrl_quits_on_import:x", what="part")


def test_check_target_accepts_nested_attributes():
    check_target("a.b_c:D.e", what="part")
    assert import_target("collections:OrderedDict.fromkeys", what="part")("a") == {"a": None}
