import subprocess
import sys

import pytest

from medrl.cli.main import COMMANDS, root
from medrl.core import errors

HEAVY = ["torch", "monai", "torchio", "nibabel", "numpy", "scipy"]


def test_help_imports_nothing_heavy(toy, medrl_process):
    code = (
        "import sys; from medrl.cli.main import run; run(['--help']); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=toy, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_command_imports_anything_heavy_before_it_runs(toy, command):
    code = (
        f"import sys; from medrl.cli.main import run; run([{command!r}, '--help']); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=toy, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_summaries_of_the_help_are_those_of_the_commands(toy):
    import click

    with click.Context(root) as ctx:
        for name, (_, _, summary) in COMMANDS.items():
            assert root.get_command(ctx, name).short_help == summary


def test_help_lists_every_command_and_method(medrl):
    answer = medrl("--help")
    assert answer.code == 0
    for name in (*COMMANDS, "graft", "toy"):
        assert f"\n  {name} " in answer.out


def test_no_arguments_show_the_help(medrl):
    answer = medrl()
    assert (answer.code, answer.out.startswith("Usage: medrl")) == (0, True)


def test_a_broken_plugin_is_shown_in_the_help_with_its_reason(medrl):
    answer = medrl("--help")
    text = " ".join(answer.out.split())
    assert answer.code == 0
    assert "wreck (broken: importing medrl_wreck failed: ImportError: no module named 'wreckage')" in text


def test_naming_a_broken_plugin_is_exit_code_5(medrl):
    for arguments in (["train", "wreck"], ["wreck"], ["plugins", "info", "wreck"]):
        answer = medrl(*arguments)
        assert answer.code == 5
        assert "wreckage" in answer.err


def test_no_third_party_leaves_out_the_plugins_of_others(medrl):
    assert "toy" not in medrl("--no-third-party", "--help").out.partition("Methods (")[2]
    answer = medrl("--no-third-party", "train", "toy")
    assert answer.code == 5
    assert "--no-third-party" in answer.err


def test_a_plugins_file_is_obeyed(medrl, toy):
    (toy / "policy.toml").write_text("[plugins.toy]\nenabled = false\n")
    answer = medrl("--plugins-file", "policy.toml", "train", "toy")
    assert answer.code == 5
    assert "policy.toml" in answer.err


def test_version_is_that_of_the_distribution(medrl):
    from importlib.metadata import version

    assert medrl("--version").out == f"medrl {version('medrl')}\n"


def test_a_wrong_command_gives_the_nearest_one(medrl):
    answer = medrl("trian")
    assert answer.code == 2
    assert answer.err.splitlines() == [
        "error: no command 'trian' in medrl: did you mean 'train'?",
        "do:    medrl --help",
    ]


def test_a_wrong_method_as_a_command_gives_the_nearest_method(medrl):
    assert "did you mean 'graft'" in medrl("grafft").err


def test_a_wrong_subcommand_gives_the_nearest_one(medrl):
    answer = medrl("data", "chek", "x")
    assert (answer.code, "did you mean 'check'?" in answer.err) == (2, True)


def test_a_wrong_option_gives_the_nearest_one_and_the_help_of_the_method(medrl):
    answer = medrl("train", "toy", "--mod", "fair")
    assert answer.code == 2
    assert "no option '--mod', did you mean '--mode'" in answer.err
    assert "do:    medrl train toy --help" in answer.err


def test_a_wrong_value_names_its_option(medrl):
    answer = medrl("train", "toy", "--precision", "fp8")
    assert (answer.code, answer.err.splitlines()[0]) == (
        2,
        "error: --precision: 'fp8' is not one of 'fp32', 'bf16', 'fp16'",
    )


def test_a_missing_argument_is_named(medrl):
    answer = medrl("data", "check")
    assert (answer.code, answer.err.splitlines()[0]) == (2, "error: DIR is missing")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RuntimeFault", 1),
        ("ConfigError", 2),
        ("DataError", 3),
        ("CheckpointError", 4),
        ("PluginError", 5),
        ("signal", 143),
    ],
)
def test_each_kind_of_error_is_one_line_one_advice_and_its_exit_code(medrl, monkeypatch, name, code):
    monkeypatch.setenv("MEDRL_TOY_FAIL", name)
    answer = medrl("train", "toy", "-o", "r")
    lines = answer.err.splitlines()
    assert answer.code == code
    assert "Traceback" not in answer.err
    assert lines[-2].startswith("error: ")
    assert lines[-1] == ("do:    medrl resume r" if name == "signal" else "do:    mend it")


def test_a_defect_is_one_line_and_its_traceback_is_shown_with_debug_only(medrl, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "bug")
    plain = medrl("train", "toy", "-o", "a")
    assert plain.code == 1
    assert plain.err.splitlines()[-2:] == [
        "error: unexpected ZeroDivisionError: division by zero",
        "do:    run again with --debug to see where, and report it with that output",
    ]
    assert "Traceback" in medrl("--debug", "train", "toy", "-o", "b").err


def test_global_flags_are_understood_after_the_command(medrl, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "bug")
    assert "Traceback" in medrl("train", "toy", "-o", "a", "--debug").err
    monkeypatch.delenv("MEDRL_TOY_FAIL")
    assert medrl("train", "toy", "-o", "b", "--quiet").err == ""


def test_quiet_shows_errors_still(medrl):
    assert medrl("-q", "train", "tooy").err.startswith("error: no method 'tooy'")


def test_a_missing_disk_is_one_line_with_the_path(medrl, toy):
    (toy / "file").write_text("x")
    answer = medrl("train", "toy", "-o", "file/run")
    assert answer.code in (1, 2)
    assert "file" in answer.err
    assert "Traceback" not in answer.err


def test_interruption_outside_a_run_is_130_and_termination_143(monkeypatch, medrl):
    import medrl.cli.methods as module
    from medrl.cli.failure import Terminated

    def raise_it(kind):
        def describe(*_arguments):
            raise kind

        return describe

    monkeypatch.setattr(module, "describe", raise_it(KeyboardInterrupt))
    assert medrl("methods", "toy").code == errors.EXIT_INTERRUPTED
    monkeypatch.setattr(module, "describe", raise_it(Terminated))
    assert medrl("methods", "toy").code == errors.EXIT_TERMINATED


def test_a_reader_that_leaves_early_is_no_error(medrl_process, toy):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m medrl.cli init graft --full -o - | head -1"],
        capture_output=True,
        text=True,
        cwd=toy,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_process_exits_with_the_code(medrl_process):
    assert medrl_process("trian").code == 2


def test_later_ranks_do_not_repeat_what_the_first_one_says(medrl, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert medrl("train", "tooy").err == ""
    monkeypatch.setenv("MEDRL_TOY_FAIL", "DataError")
    assert medrl("train", "toy", "-o", "r").err.startswith("error: [rank 1] case toy_001: it is broken")


def test_warnings_of_medrl_are_lines_and_information_needs_verbose(medrl, capsys):
    import logging

    medrl("--version")
    medrl("methods")
    capsys.readouterr()
    log = logging.getLogger("medrl.test")
    log.warning("watch out")
    log.info("by the way")
    assert capsys.readouterr().err == "warning: watch out\n"
    medrl("-v", "methods")
    capsys.readouterr()
    log.info("by the way")
    assert capsys.readouterr().err == "by the way\n"


def test_a_strict_manager_refuses_to_go_on_with_a_broken_plugin(medrl, monkeypatch):
    monkeypatch.setenv("MEDRL_PLUGINS_STRICT", "1")
    answer = medrl("--help")
    assert (answer.code, "wreckage" in answer.err) == (5, True)


def test_the_logged_copy_of_an_error_is_not_shown_again(medrl, capsys):
    import logging

    medrl("methods")
    capsys.readouterr()
    logging.getLogger("medrl.runtime").error("rank %d failed at step %d", 0, 1)
    logging.getLogger("medrl.runtime").warning("kept")
    assert capsys.readouterr().err == "warning: kept\n"
