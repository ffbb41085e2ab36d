"""The plugin manager: discovery, policy, isolation, commands, registries by key, observers."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys

import click
import pytest

from medrl.core.errors import ConfigError, PluginError
from medrl.core.manager import HOOKS, PluginManager

BUNDLED = sorted(
    point.name
    for point in importlib.metadata.entry_points(group="medrl.plugins")
    if point.dist is not None and point.dist.name == "medrl"
)
"""The plugins of the installed medrl."""

PARTS = """
@hookimpl
def medrl_register_models(registry):
    registry.add("linear", "torch.nn:Linear", summary="one layer")

@hookimpl
def medrl_register_losses(registry):
    registry.add("absolute", abs, summary="the absolute value")
"""

COMMANDS = """
import click

@click.command("train")
def train(job): ...

@click.command("show-weights")
def show(): ...

@click.command("show-weights")
def show_again(): ...

@hookimpl
def medrl_register_commands(commands):
    commands.train(f"{__name__}:train")
    commands.predict(f"{__name__}:absent")
    commands.demo(f"{__name__}:PluginInfo")
    commands.tool(f"{__name__}:show")
"""


def status(manager, name):
    return {entry.name: entry.status for entry in manager.entries()}[name]


def test_names_are_listed_without_importing_a_plugin(write_plugin):
    module = write_plugin("one", "raise RuntimeError('imported')")
    manager = PluginManager.create()
    assert "one" in manager.names()
    assert status(manager, "one") == "available"
    assert module not in sys.modules


def test_an_entry_says_where_a_plugin_comes_from_without_importing_it(write_plugin):
    module = write_plugin("one", distribution="medrl-one", version="2.5")
    entry = next(entry for entry in PluginManager.create().entries() if entry.name == "one")
    assert (entry.distribution, entry.version, entry.origin) == ("medrl-one", "2.5", "third-party")
    assert entry.file.endswith(f"{module}.py")
    assert module not in sys.modules


def test_the_bundled_plugin_is_found_with_its_file(no_policy):
    entry = next(entry for entry in PluginManager.create().entries() if entry.name == "graft")
    assert entry.origin == "bundled"
    assert entry.file.endswith("graft/plugin.py")


def test_a_plugin_is_loaded_once_and_its_version_is_that_of_its_distribution(write_plugin):
    write_plugin("one", PARTS, version="2.5")
    manager = PluginManager.create()
    loaded = manager.load("one")
    assert manager.load("one") is loaded
    assert manager.info("one").version == "2.5"
    assert status(manager, "one") == "loaded"


def test_an_unknown_plugin_names_near_matches(write_plugin):
    write_plugin("kspace_two")
    with pytest.raises(PluginError, match="there is no plugin of this name, did you mean 'kspace_two'"):
        PluginManager.create().load("kspace_to")


def test_a_broken_plugin_is_quarantined_and_its_parts_are_forgotten(write_plugin):
    write_plugin("good", PARTS)
    write_plugin(
        "half",
        """
        @hookimpl
        def medrl_register_models(registry):
            registry.add("linear", "torch.nn:Linear", summary="one layer")

        @hookimpl
        def medrl_register_losses(registry):
            raise KeyError("halfway")
        """,
    )
    manager = PluginManager.create()
    keys = manager.registry("models").keys()
    assert "good.linear" in keys
    assert "half.linear" not in keys
    assert status(manager, "half") == "broken"
    entry = next(entry for entry in manager.entries() if entry.name == "half")
    assert entry.reason == "medrl_register_losses failed: KeyError: 'halfway'"
    with pytest.raises(PluginError, match="medrl_register_losses failed"):
        manager.load("half")


def test_a_broken_plugin_is_not_imported_a_second_time(write_plugin, no_policy):
    counter = no_policy / "count"
    write_plugin("bad", f"open({str(counter)!r}, 'a').write('x')\nraise ValueError('no')")
    manager = PluginManager.create()
    for _ in range(3):
        with pytest.raises(PluginError, match="ValueError: no"):
            manager.load("bad")
    manager.load_all()
    assert counter.read_text() == "x"


def test_strict_raises_what_is_tolerated_otherwise(write_plugin, monkeypatch):
    write_plugin("bad", "raise ValueError('no')")
    PluginManager.create().load_all()
    with pytest.raises(PluginError, match="ValueError: no"):
        PluginManager.create(strict=True).load_all()
    monkeypatch.setenv("MEDRL_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match="ValueError: no"):
        PluginManager.create().load_all()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def medrl_plugin_info(): ...", "'medrl_plugin_info' is not marked with @hookimpl"),
        ("@hookimpl\ndef medrl_plugin_info(): ...", "must return a PluginInfo, it returned nothing"),
        ("@hookimpl\ndef medrl_plugin_info(): return 'me'", "must return a PluginInfo, it returned str"),
        (
            "@hookimpl\ndef medrl_plugin_info(): return PluginInfo(name='other', api=1, summary='x')",
            "it calls itself 'other', its entry point says 'one'",
        ),
        (
            "@hookimpl\ndef medrl_plugin_info(): return PluginInfo(name='one', api=1, summary='')",
            "its PluginInfo has no summary",
        ),
        ("@hookimpl\ndef medrl_plugin_info(): return 1 / 0", "medrl_plugin_info failed: ZeroDivisionError"),
    ],
)
def test_a_plugin_must_say_who_it_is(write_plugin, code, why):
    write_plugin("one", code)
    with pytest.raises(PluginError, match=why):
        PluginManager.create().load("one")


def test_an_older_api_asks_for_the_plugin_and_a_newer_one_for_medrl(write_plugin):
    info = "@hookimpl\ndef medrl_plugin_info(): return PluginInfo(name={!r}, api={}, summary='x')"
    write_plugin("old", info.format("old", 0))
    write_plugin("new", info.format("new", 2))
    manager = PluginManager.create()
    with pytest.raises(PluginError, match="written for plugin API 0, this medrl has 1") as old:
        manager.load("old")
    with pytest.raises(PluginError, match="written for plugin API 2, this medrl has 1") as new:
        manager.load("new")
    assert old.value.do == "pip install --upgrade medrl-old"
    assert new.value.do == "pip install --upgrade medrl"


def test_an_entry_point_may_name_an_object_in_a_module(write_plugin, tmp_path):
    module = write_plugin(
        "one",
        """
        class Holder:
            @staticmethod
            @hookimpl
            def medrl_plugin_info():
                return PluginInfo(name="one", api=1, summary="an object that holds the hooks")
        """,
    )
    metadata = next((tmp_path / "site").glob("*.dist-info")) / "entry_points.txt"
    metadata.write_text(f"[medrl.plugins]\none = {module}:Holder\n")
    assert PluginManager.create().info("one").name == "one"


def test_two_third_party_plugins_of_one_name_are_both_left_out(write_plugin):
    write_plugin("same", distribution="medrl-first", version="1.0")
    write_plugin("same", distribution="medrl-second", version="2.0")
    manager = PluginManager.create()
    assert "same" not in manager.names()
    assert [entry.status for entry in manager.entries() if entry.name == "same"] == ["duplicate", "duplicate"]
    with pytest.raises(PluginError, match=r"duplicate: brought by 'medrl-first 1.0' and 'medrl-second 2.0'"):
        manager.load("same")


def test_a_third_party_plugin_cannot_take_the_name_of_a_bundled_one(write_plugin):
    module = write_plugin("graft", distribution="medrl-thief")
    manager = PluginManager.create()
    assert manager.names().count("graft") == 1
    thief = next(entry for entry in manager.entries() if entry.distribution == "medrl-thief")
    assert thief.status == "duplicate"
    assert "the one of medrl is used" in thief.reason
    manager.load_all()
    assert module not in sys.modules


def test_switching_off_one_of_two_duplicates_frees_the_name(write_plugin):
    write_plugin("graft", distribution="medrl-thief")
    manager = PluginManager.create(third_party=False)
    assert [entry.status for entry in manager.entries() if entry.name == "graft"].count("disabled") == 1
    assert "graft" in manager.names()


def test_a_plugin_name_that_no_key_can_carry_is_disabled(write_plugin):
    write_plugin("Bad-Name")
    manager = PluginManager.create()
    with pytest.raises(PluginError, match="must be lower-case letters, digits and underscores"):
        manager.load("Bad-Name")


def test_policy_all_uses_everything_that_is_not_switched_off(write_plugin, no_policy):
    write_plugin("one")
    write_plugin("two")
    (no_policy / "plugins.toml").write_text(
        "[settings]\nthird_party = 'all'\n[plugins.two]\nenabled = false\n"
    )
    manager = PluginManager.create()
    assert [name for name in manager.names() if name not in BUNDLED] == ["one"]
    with pytest.raises(PluginError, match=r"disabled: switched off in plugins.toml"):
        manager.load("two")


def test_policy_listed_is_an_allow_list_and_the_default_of_a_file(write_plugin, no_policy):
    write_plugin("one")
    write_plugin("two")
    (no_policy / "plugins.toml").write_text("[plugins.two]\n")
    manager = PluginManager.create()
    assert [name for name in manager.names() if name not in BUNDLED] == ["two"]
    with pytest.raises(
        PluginError, match=r"not listed in plugins.toml; to allow it, add a line '\[plugins.one\]'"
    ):
        manager.load("one")


def test_no_third_party_leaves_the_bundled_plugins(write_plugin):
    write_plugin("one")
    manager = PluginManager.create(third_party=False)
    assert manager.names() == BUNDLED
    with pytest.raises(PluginError, match="switched off by --no-third-party"):
        manager.load("one")


def test_the_file_on_the_command_line_wins_over_the_variable_and_the_folder(
    write_plugin, no_policy, monkeypatch
):
    write_plugin("one")
    (no_policy / "plugins.toml").write_text("[plugins.one]\nenabled = false\n")
    allowed = no_policy / "allowed.toml"
    allowed.write_text("[plugins.one]\n")
    none = no_policy / "none.toml"
    none.write_text("[settings]\nthird_party = false\n")
    assert "one" not in PluginManager.create().names()
    monkeypatch.setenv("MEDRL_PLUGINS", str(allowed))
    assert "one" in PluginManager.create().names()
    assert "one" not in PluginManager.create(plugins_file=none).names()


def test_the_file_in_the_folder_of_the_user_is_the_last_resort(write_plugin, tmp_path):
    write_plugin("one")
    folder = tmp_path / "xdg" / "medrl"
    folder.mkdir(parents=True)
    (folder / "plugins.toml").write_text("[settings]\nthird_party = 'none'\n")
    assert "one" not in PluginManager.create().names()


def test_a_named_policy_file_that_is_missing_is_an_error(no_policy, monkeypatch):
    with pytest.raises(ConfigError, match="--plugins-file names a file that does not exist"):
        PluginManager.create(plugins_file=no_policy / "absent.toml")
    monkeypatch.setenv("MEDRL_PLUGINS", str(no_policy / "absent.toml"))
    with pytest.raises(ConfigError, match=r"\$MEDRL_PLUGINS names a file that does not exist"):
        PluginManager.create()


def test_all_problems_of_a_policy_file_are_reported_together(no_policy):
    (no_policy / "plugins.toml").write_text(
        "plugin = 1\n[settings]\nthird_partie = true\nthird_party = 'some'\n"
        "[plugins]\nother = 3\n[plugins.graft]\nenable = true\nenabled = 'yes'\nrequires = 'h5py'\n"
    )
    with pytest.raises(ConfigError) as caught:
        PluginManager.create()
    text = str(caught.value)
    for problem in (
        "unknown key 'plugin', did you mean 'plugins'",
        "unknown key 'settings.third_partie', did you mean 'third_party'",
        "settings.third_party is 'some', expected all, listed, none, true or false",
        "'plugins.other' is 3, expected a table",
        "unknown key 'plugins.graft.enable', did you mean 'enabled'",
        "plugins.graft.enabled is 'yes', expected true or false",
        "plugins.graft.requires is 'h5py', expected a list",
    ):
        assert problem in text


def test_a_policy_file_that_is_no_toml_is_an_error(no_policy):
    (no_policy / "plugins.toml").write_text("[plugins\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        PluginManager.create()


def test_a_missing_requirement_disables_a_plugin_and_names_the_command(write_plugin, no_policy):
    module = write_plugin("one")
    (no_policy / "plugins.toml").write_text("[plugins.one]\nrequires = ['click', 'medrl-no-such-thing']\n")
    manager = PluginManager.create()
    with pytest.raises(PluginError, match="requires medrl-no-such-thing, .* pip install medrl-no-such-thing"):
        manager.load("one")
    assert module not in sys.modules


def test_a_plugin_that_is_listed_but_not_installed_says_so(no_policy):
    (no_policy / "plugins.toml").write_text("[plugins.cardio]\n")
    with pytest.raises(PluginError, match=r"listed in plugins.toml but not installed"):
        PluginManager.create().load("cardio")


def test_a_key_loads_only_its_own_plugin(write_plugin):
    write_plugin("one", PARTS)
    other = write_plugin("two", PARTS)
    made = PluginManager.create().registry("models").build("one.linear", in_features=2, out_features=1)
    assert made.in_features == 2
    assert other not in sys.modules


def test_a_key_of_a_misspelt_plugin_names_near_matches(write_plugin):
    write_plugin("cardio", PARTS)
    registry = PluginManager.create().registry("models")
    with pytest.raises(ConfigError, match="there is no plugin 'cardo', did you mean 'cardio.linear'"):
        registry.get("cardo.linear")
    with pytest.raises(ConfigError, match="model 'cardio.liner': unknown key, did you mean 'cardio.linear'"):
        registry.get("cardio.liner")


def test_a_key_without_a_plugin_names_the_full_key(write_plugin):
    write_plugin("cardio", PARTS)
    with pytest.raises(ConfigError, match=r"expected 'plugin.name', did you mean 'cardio.linear'"):
        PluginManager.create().registry("models").get("linear")


def test_a_key_of_a_broken_plugin_is_a_plugin_error(write_plugin):
    write_plugin("bad", "raise ValueError('no')")
    with pytest.raises(PluginError, match="ValueError: no"):
        PluginManager.create().registry("models").get("bad.linear")


def test_an_unknown_kind_of_registry_names_near_matches(no_policy):
    with pytest.raises(ConfigError, match="registry 'model': unknown kind, did you mean 'models'"):
        PluginManager.create().registry("model")


def test_managers_share_no_registry(write_plugin):
    write_plugin("one", PARTS)
    first, second = PluginManager.create(), PluginManager.create()
    first.load("one")
    assert first.registry("losses")._registry is not second.registry("losses")._registry
    assert second.registry("losses")._registry.keys() == []


def test_commands_are_resolved_when_asked_for(write_plugin):
    write_plugin("one", COMMANDS)
    commands = PluginManager.create().commands("one")
    assert commands.provided() == ["train", "predict", "demo"]
    assert isinstance(commands.train, click.Command)
    assert commands.evaluate is None
    assert list(commands.tools) == ["show-weights"]
    with pytest.raises(PluginError, match="plugin 'one', command predict: .* has no 'absent'"):
        _ = commands.predict
    with pytest.raises(PluginError, match="is a type, expected a click command"):
        _ = commands.demo


def test_two_tools_of_one_name_are_refused(write_plugin):
    write_plugin("one", COMMANDS + "    commands.tool(show_again)\n")
    with pytest.raises(PluginError, match="two tools are named 'show-weights'"):
        _ = PluginManager.create().commands("one").tools


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("commands.train('a:b'); commands.train('c:d')", "command train: registered twice"),
        ("commands.tool(len)", "expected 'module:attribute' or a click command"),
        ("commands.tool('medrl.no.colon')", "expected 'module:attribute', got"),
        ("commands.trian('a:b')", "AttributeError: 'CommandRecorder' object has no attribute 'trian'"),
    ],
)
def test_a_wrong_command_registration_breaks_only_its_plugin(write_plugin, line, why):
    write_plugin("one", f"@hookimpl\ndef medrl_register_commands(commands):\n    {line}\n")
    with pytest.raises(PluginError, match=why):
        PluginManager.create().load("one")


def test_observers_of_all_plugins_are_told(write_plugin, no_policy):
    for name in ("one", "two"):
        write_plugin(
            name,
            f"""
            @hookimpl
            def medrl_run_finished(run, outcome):
                (run / {name!r}).write_text(outcome)
            """,
        )
    manager = PluginManager.create()
    manager.load_observers()
    manager.notify("medrl_run_finished", run=no_policy, outcome="finished")
    assert (no_policy / "one").read_text() == (no_policy / "two").read_text() == "finished"


@pytest.mark.parametrize("exception", ["ValueError('disk gone')", "SystemExit(3)"])
def test_an_observer_is_switched_off_after_its_first_error_with_one_warning(
    write_plugin, no_policy, caplog, exception
):
    write_plugin(
        "bad",
        f"""
        @hookimpl
        def medrl_metrics_logged(run, step):
            with (run / "calls").open("a") as file:
                file.write(str(step))
            raise {exception}
        """,
    )
    write_plugin(
        "good",
        """
        @hookimpl
        def medrl_metrics_logged(run, step, metrics):
            with (run / "good").open("a") as file:
                file.write(str(step))
        """,
    )
    manager = PluginManager.create()
    manager.load("bad")
    manager.load("good")
    with caplog.at_level(logging.WARNING, logger="medrl.plugins"):
        for step in (1, 2, 3):
            manager.notify("medrl_metrics_logged", run=no_policy, step=step, metrics={})
    assert (no_policy / "calls").read_text() == "1"
    assert (no_policy / "good").read_text() == "123"
    assert len(caplog.records) == 1
    assert "observers are off, because medrl_metrics_logged failed" in caplog.text
    entry = next(entry for entry in manager.entries() if entry.name == "bad")
    assert entry.status == "loaded"
    assert "its observers are off" in entry.reason


def test_only_observers_can_be_notified(no_policy):
    with pytest.raises(
        ValueError, match="'medrl_run_start' is no observer, did you mean 'medrl_run_started'"
    ):
        PluginManager.create().notify("medrl_run_start", run=None)


def test_listing_plugins_imports_nothing_heavy(no_policy):
    code = (
        "import sys; from medrl.core.manager import PluginManager; PluginManager.create().entries();"
        "heavy = ('torch', 'monai', 'numpy', 'nibabel', 'torchio', 'scipy', 'pydantic');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_hooks_are_those_of_the_specification():
    assert "medrl_plugin_info" in HOOKS
    assert len(HOOKS) == 14
