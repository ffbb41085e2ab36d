import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.stages import Pipeline, path_hash


class Work:
    """Two stages, the second reads what the first wrote; `ran` lists what was done."""

    def __init__(self, root):
        self.root, self.ran = root, []
        self.source, self.middle, self.end = (
            root / "source.txt",
            root / "out" / "middle",
            root / "out" / "end.txt",
        )
        if not self.source.exists():
            self.source.write_text("3")

    def go(self, factor=2):
        pipeline = Pipeline(self.root / "out")
        self.ran = []
        inputs = {"source": self.source, "factor": factor}
        pipeline.stage("double", inputs=inputs, outputs=[self.middle], run=lambda: self.double(factor))
        pipeline.stage("count", inputs={"middle": self.middle}, outputs=[self.end], run=self.count)
        return self.ran

    def double(self, factor):
        self.ran.append("double")
        self.middle.mkdir(exist_ok=True)
        (self.middle / "value.txt").write_text(str(int(self.source.read_text()) * factor))

    def count(self):
        self.ran.append("count")
        self.end.write_text(str(len((self.middle / "value.txt").read_text())))


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_stages_run_once_and_are_then_done(work):
    assert work.go() == ["double", "count"]
    assert work.go() == []
    assert {name: status.state for name, status in Pipeline(work.root / "out").status().items()} == {
        "double": "done",
        "count": "done",
    }


def test_a_changed_input_file_runs_its_stage_and_those_that_read_from_it(work):
    work.go()
    work.source.write_text("50")
    assert work.go() == ["double", "count"]
    assert work.end.read_text() == "3"


def test_a_stage_whose_inputs_come_out_equal_does_not_run_again(work):
    work.go()
    work.source.write_text("03")
    assert work.go() == ["double"]


def test_a_changed_parameter_runs_the_stage(work):
    work.go()
    assert work.go(factor=9) == ["double", "count"]


def test_a_new_time_on_an_unchanged_file_changes_nothing(work):
    work.go()
    os.utime(work.source, (1.0, 1.0))
    assert work.go() == []


def test_an_edited_output_is_made_again(work):
    work.go()
    work.end.write_text("9")
    status = Pipeline(work.root / "out").status()["count"]
    assert (status.state, status.reason) == ("changed", "end.txt is not what the stage wrote")
    assert work.go() == ["count"]
    assert work.end.read_text() == "1"


def test_a_missing_output_is_made_again(work):
    work.go()
    (work.middle / "value.txt").unlink()
    assert work.go() == ["double"]


def test_a_file_added_to_an_output_folder_is_noticed(work):
    work.go()
    (work.middle / "foreign.txt").write_text("")
    assert work.go()[0] == "double"


def test_a_failed_stage_is_recorded_and_runs_again(work):
    pipeline = Pipeline(work.root / "out")

    def fail():
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        pipeline.stage("one", inputs={}, outputs=[], run=fail)
    status = Pipeline(work.root / "out").status()["one"]
    assert (status.state, status.reason) == ("failed", "ValueError: no luck")
    assert Pipeline(work.root / "out").stage("one", inputs={}, outputs=[], run=lambda: None)


def test_a_stage_that_fails_after_it_was_done_is_not_done(work):
    out = work.root / "out"
    Pipeline(out).stage("one", inputs={"a": 1}, outputs=[], run=lambda: None)
    with pytest.raises(ZeroDivisionError):
        Pipeline(out).stage("one", inputs={"a": 2}, outputs=[], run=lambda: 1 / 0)
    assert Pipeline(out).stage("one", inputs={"a": 1}, outputs=[], run=lambda: None)


def test_a_killed_stage_is_not_done(tmp_path):
    code = textwrap.dedent(
        f"""
        import os
        from pathlib import Path
        from medrl.core.stages import Pipeline
        root = Path({str(tmp_path)!r})
        def run():
            (root / "made.txt").write_text("half")
            os.kill(os.getpid(), 9)
        Pipeline(root).stage("make", inputs={{}}, outputs=[Path("made.txt")], run=run)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    pipeline = Pipeline(tmp_path)
    assert pipeline.status()["make"].state == "running"
    assert pipeline.stage(
        "make",
        inputs={},
        outputs=[tmp_path / "made.txt"],
        run=lambda: (tmp_path / "made.txt").write_text("whole"),
    )
    assert (tmp_path / "made.txt").read_text() == "whole"


def test_a_stage_that_does_not_write_its_output_fails(tmp_path):
    with pytest.raises(RuntimeFault, match=r"did not write .*nothing\.txt"):
        Pipeline(tmp_path).stage("one", inputs={}, outputs=[tmp_path / "nothing.txt"], run=lambda: None)
    assert Pipeline(tmp_path).status()["one"].state == "failed"


def test_a_missing_input_is_named_with_its_stage_and_nothing_runs(tmp_path):
    with pytest.raises(DataError, match=r"stage one: input 'data': .*absent"):
        Pipeline(tmp_path).stage("one", inputs={"data": tmp_path / "absent"}, outputs=[], run=pytest.fail)


def test_an_input_that_is_no_plain_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="input 'f'"):
        Pipeline(tmp_path).stage("one", inputs={"f": object()}, outputs=[], run=pytest.fail)


@pytest.mark.parametrize(
    ("one", "two"), [(1, 1.0), (1, True), ("1", 1), ([1, 2], [2, 1]), (None, "null"), ([], "")]
)
def test_values_that_differ_in_type_or_order_are_different_inputs(tmp_path, one, two):
    Pipeline(tmp_path).stage("s", inputs={"v": one}, outputs=[], run=lambda: None)
    assert Pipeline(tmp_path).stage("s", inputs={"v": one}, outputs=[], run=lambda: None) is False
    assert Pipeline(tmp_path).stage("s", inputs={"v": two}, outputs=[], run=lambda: None) is True


def test_a_removed_input_is_a_change(tmp_path):
    Pipeline(tmp_path).stage("s", inputs={"a": 1, "b": None}, outputs=[], run=lambda: None)
    assert Pipeline(tmp_path).stage("s", inputs={"a": 1}, outputs=[], run=lambda: None)


def test_a_pipeline_that_was_moved_is_still_done(work):
    work.go()
    moved = Work(work.root)
    (work.root / "out").rename(work.root / "elsewhere")
    moved.middle, moved.end = work.root / "elsewhere" / "middle", work.root / "elsewhere" / "end.txt"
    pipeline = Pipeline(work.root / "elsewhere")
    assert not pipeline.stage("count", inputs={"middle": moved.middle}, outputs=[moved.end], run=pytest.fail)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99, "stages": {}}'])
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path, text):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Pipeline(tmp_path)
    assert "stages.json" in str(caught.value)
    assert "remove it" in caught.value.do


def test_the_record_is_written_whole_and_leaves_no_temporary_file(work):
    work.go()
    record = json.loads((work.root / "out" / "stages.json").read_text())
    assert list(record["stages"]) == ["double", "count"]
    assert sorted(path.name for path in (work.root / "out").iterdir()) == ["end.txt", "middle", "stages.json"]


def test_a_folder_without_room_for_the_record_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeFault, match="cannot be written"):
        Pipeline(tmp_path / "file" / "sub").stage("one", inputs={}, outputs=[], run=lambda: None)


def test_the_hash_of_a_folder_follows_names_and_contents(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = path_hash(folder)
    (folder / "a").rename(folder / "b")
    second = path_hash(folder)
    (folder / "b").write_text("2")
    assert len({first, second, path_hash(folder)}) == 3


def test_programs_side_by_side_have_records_of_their_own_in_one_folder(tmp_path):
    def stage(pipeline, name):
        out = tmp_path / f"{name}.txt"
        pipeline.stage(name, inputs={"name": name}, outputs=[out], run=lambda: out.write_text(name))

    both = {name: Pipeline(tmp_path, record=f"records/{name}.json") for name in ("one", "two")}
    for name, pipeline in both.items():
        stage(pipeline, name)
    for name, other in (("one", "two"), ("two", "one")):
        again = Pipeline(tmp_path, record=f"records/{name}.json")
        assert list(again.status()) == [name]
        assert again.is_done(name, inputs={"name": name}, outputs=[Path(f"{name}.txt")])
        assert not again.is_done(name, inputs={"name": other}, outputs=[Path(f"{name}.txt")])
        assert not again.is_done(other, inputs={"name": other}, outputs=[Path(f"{other}.txt")])
        again.take_over(other, both[other])
        assert again.is_done(other, inputs={"name": other}, outputs=[Path(f"{other}.txt")])
