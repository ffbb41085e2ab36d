import json

import pytest

from medrl.cli.console import (
    Console,
    console,
    counted,
    number,
    plain_table,
    plain_values,
    size,
    start_console,
    write_json,
)
from medrl.cli.progress import _Counter, chosen_metrics, duration


class Terminal:
    """A stream that says that it is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_colours_need_a_terminal_and_nobody_who_forbids_them(monkeypatch):
    import sys

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Console().fancy is False
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert Console().fancy is True
    assert Console(plain=True).fancy is False
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console().fancy is False


def test_a_table_on_a_terminal_holds_every_cell(monkeypatch):
    import sys

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    screen = Console()
    screen.table(["a", "b"], [["[bold]x", screen.style("y", fg="red")]])
    assert "[bold]x" in terminal.text
    assert "\x1b[31my" in terminal.text


def test_a_plain_table_is_aligned_and_cuts_nothing():
    long = "x" * 200
    assert plain_table(["a", "bb"], [["1", long], ["22", ""]], right=(0,)) == [
        " a  bb",
        "--  " + "-" * 200,
        " 1  " + long,
        "22",
    ]


def test_json_holds_no_numbers_that_json_does_not_know(capsys, tmp_path):
    write_json({"a": float("nan"), "b": float("inf"), "c": tmp_path, "d": {1, 2}, 3: None})
    assert json.loads(capsys.readouterr().out) == {
        "a": None,
        "b": "inf",
        "c": str(tmp_path),
        "d": [1, 2],
        "3": None,
    }


def test_arrays_become_lists_in_json():
    import array

    assert plain_values({"x": array.array("d", [1.0, 2.0])}) == {"x": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5000"), (0.00001, "1.00e-05"), (0.0, "0.0000"), (3, "3"), (None, "–"), (float("nan"), "–"),
     (float("inf"), "inf"), ("x", "x"), (True, "True"), (2e7, "2.00e+07")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_sizes_durations_and_counts_are_for_people():
    assert [size(count) for count in (12, 2048, 3 * 2**20, 5 * 2**40)] == [
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [duration(seconds) for seconds in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]
    assert [counted(1, "case"), counted(0, "case")] == ["1 case", "0 cases"]


def test_the_numbers_that_say_most_come_first():
    text = chosen_metrics(
        {"lr": 0.1, "kd_loss": 2.0, "val_dice": 0.5, "loss": 1.0, "x": 1.0, "flag": True, "y": "z"}
    )
    assert text == "loss 1.0000  val_dice 0.5000  kd_loss 2.0000  lr 0.1000"


def test_lines_of_progress_come_at_intervals_with_rate_and_remaining_time(capsys):
    now = [0.0]
    counter = _Counter(console(), "step", clock=lambda: now[0])
    for step in range(1, 101):
        counter.update(step, 100, f"loss {step}")
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/100  loss 1"
    assert lines[1] == "step 11/100  loss 11  1 steps/s  1 min 29 s left"
    assert lines[-1] == "step 100/100  loss 100  1 steps/s"
    assert len(lines) == 11


def test_another_stage_begins_to_count_anew(capsys):
    now = [0.0]
    counter = _Counter(console(), "step", clock=lambda: now[0])
    for _ in range(2):
        for step in range(1, 21):
            counter.update(step, 20)
            now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == lines[-3] == "step 20/20  1 steps/s"
    assert lines[-2] == "step 10/20  1 steps/s  10 s left"


def test_a_bar_on_a_narrow_terminal_keeps_count_and_rate(monkeypatch):
    import sys

    from medrl.cli.progress import training_progress

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_console()  # another test may have asked for plain output
    with training_progress() as show:
        for step in range(1, 6):
            show(step, 1000, {"loss": 0.25, "val_dice_of_a_very_long_name_indeed_that_does_not_fit": 0.5})
    last = terminal.text.split("step ")[-1]
    assert "5/1000" in last
    assert "/s" in last
    assert "loss 0.2500" in last
