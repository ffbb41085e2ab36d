"""Teachers: trained by fold, extracted onto the student's windows, files refused when they do not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, ConfigError, DataError, RuntimeFault
from medrl.plugins.graft import data, teachers, train
from medrl.plugins.graft.features import DTYPES, Expected, FeatureWriter, open_teacher, open_teachers
from medrl.plugins.graft.models import as_output
from medrl.plugins.graft.windows import centre_window

LABELS = {"background": 0, "organ": 1}


def expected(case_id="case_1", shape=(6, 8, 8), **changes):
    values = {
        "case_id": case_id,
        "window": centre_window(shape, (4, 8, 8)),
        "shape": shape,
        "spacing": (1.0, 1.0, 3.0),
        "image_hash": "a" * 64,
    }
    return Expected(**{**values, **changes})


def arrays(seed=0):
    torch.manual_seed(seed)
    return {"neg1": torch.randn(3, 4, 8, 8), "logits": torch.randn(2, 4, 8, 8)}


@pytest.fixture
def written(tmp_path):
    writer = FeatureWriter(
        tmp_path / "teacher_0",
        teacher="f" * 64,
        source="run",
        channels={"neg1": 3, "logits": 2},
        target="classes",
        labels=LABELS,
        dtype="bf16",
    )
    writer.write(expected(), arrays())
    return tmp_path / "teacher_0"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_features_come_back_as_they_were_stored(tmp_path, dtype):
    folder = tmp_path / dtype
    writer = FeatureWriter(
        folder,
        teacher="f",
        source="",
        channels={"neg1": 3, "logits": 2},
        target="classes",
        labels=LABELS,
        dtype=dtype,
    )
    writer.write(expected(), arrays())
    found = open_teacher(folder).read(expected(), ["neg1", "logits"])
    for name, tensor in arrays().items():
        assert torch.equal(found[name], tensor.to(DTYPES[dtype]))


def test_reading_maps_the_file_and_writing_to_the_tensor_does_not_change_it(written):
    first = open_teacher(written).read(expected(), ["neg1"])["neg1"]
    before = first.clone()
    first.zero_()
    assert torch.equal(open_teacher(written).read(expected(), ["neg1"])["neg1"], before)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"window": centre_window((6, 8, 8), (6, 8, 8))}, "window"),
        ({"shape": (7, 8, 8)}, "image shape"),
        ({"spacing": (1.0, 1.0, 2.0)}, "spacing"),
        ({"image_hash": "b" * 64}, "image content"),
    ],
)
def test_features_of_another_window_shape_grid_or_image_are_refused_by_name(written, changes, what):
    with pytest.raises(DataError) as error:
        open_teacher(written).read(expected(**changes), ["neg1"])
    assert what in str(error.value)
    assert "case_1" in str(error.value)
    assert str(written / "case_1") in str(error.value)


def test_features_of_another_case_are_refused_even_under_its_name(written):
    shutil.copytree(written / "case_1", written / "case_2")
    with pytest.raises(DataError, match="case case_2: .*case is case_1, the student needs case_2"):
        open_teacher(written).check(expected("case_2"))


def test_features_of_another_teacher_are_refused(written):
    record = json.loads((written / "teacher.json").read_text())
    (written / "teacher.json").write_text(json.dumps({**record, "teacher": "e" * 64}))
    with pytest.raises(DataError, match="teacher is f+, the student needs e+"):
        open_teacher(written).check(expected())


def test_a_flipped_bit_is_found_when_the_file_is_first_opened(written):
    path = written / "case_1" / "neg1.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="its content changed"):
        open_teacher(written).read(expected(), ["neg1"])


def test_a_truncated_file_is_refused(written):
    path = written / "case_1" / "logits.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="case case_1: .*logits.npy"):
        open_teacher(written).read(expected(), ["logits"])


def test_values_that_overflow_the_precision_are_not_written(tmp_path):
    writer = FeatureWriter(
        tmp_path / "t",
        teacher="f",
        source="",
        channels={"neg1": 3},
        target="classes",
        labels=LABELS,
        dtype="fp16",
    )
    with pytest.raises(RuntimeFault, match="not finite"):
        writer.write(expected(), {"neg1": torch.full((3, 4, 8, 8), 1e6)})
    assert not (tmp_path / "t" / "case_1").exists()
    assert not list((tmp_path / "t").glob("*.tmp"))


def test_a_folder_never_mixes_two_teachers(written):
    with pytest.raises(DataError, match="another teacher"):
        FeatureWriter(
            written,
            teacher="e",
            source="",
            channels={"neg1": 3, "logits": 2},
            target="classes",
            labels=LABELS,
            dtype="bf16",
        )


def test_teachers_are_found_one_level_below_in_the_order_of_their_numbers(written):
    for k in (10, 2):
        shutil.copytree(written, written.with_name(f"teacher_{k}"))
    found = open_teachers([written.parent], taps=["neg1"], target="classes", labels=LABELS)
    assert [teacher.name for teacher in found] == ["teacher_0", "teacher_2", "teacher_10"]


def test_a_teacher_of_other_labels_or_without_the_tap_is_refused(written):
    with pytest.raises(DataError, match="the teacher predicts classes of"):
        open_teachers([written], taps=["neg1"], target="classes", labels={"background": 0, "bone": 1})
    with pytest.raises(DataError, match="no features of neg2"):
        open_teachers([written], taps=["neg2"], target="classes", labels=LABELS)


def test_teacher_k_is_an_ordinary_run_that_never_saw_fold_k(teacher_runs):
    seen = []
    for k in range(2):
        meta = load_checkpoint(find_checkpoint(teacher_runs / f"teacher_{k}", "last"), method="graft").meta
        assert (meta["config"]["data"]["fold"], meta["config"]["data"]["folds"]) == (k, 2)
        assert meta["step"] == 2
        seen.append(meta["config"]["train"]["seed"])
    assert seen[0] != seen[1]


def test_training_finished_teachers_again_changes_nothing(teacher_runs, manager, resolve):
    path = find_checkpoint(teacher_runs / "teacher_1", "last")
    before = path.read_bytes()
    teachers.train_teachers(manager, resolve, teacher_runs, count=2, only=[1])
    assert path.read_bytes() == before


def test_extracted_features_are_those_of_the_teacher_on_the_students_window(
    teacher_runs, manager, resolve, tmp_path
):
    config = resolve([]).config
    found = teachers.extract(
        manager,
        config,
        teachers.find_teachers(teacher_runs),
        tmp_path / "f",
        taps=["neg1", "neg2"],
        dtype="fp32",
    )
    assert (found.written, found.kept) == (8, 0)
    student = data.gather_data(config, manager, Cache(tmp_path / "cache"))
    teacher = teachers.open_network(teachers.find_teachers(teacher_runs)[1], manager, torch.device("cpu"))
    case = student.labelled[0]
    prepared = student.store.get(case)
    stored = open_teacher(found.folders[1]).read(student.store.expected(prepared), ["neg1", "neg2", "logits"])
    box = torch.from_numpy(student.store.expected(prepared).window.cut(prepared.image))
    live = as_output(teacher.network(box[None]))
    assert torch.allclose(stored["logits"], live.main[0], atol=1e-5)
    assert torch.allclose(stored["neg1"], live.features["neg1"][0], atol=1e-5)
    assert stored["neg2"].shape == live.features["neg2"][0].shape


def test_pooled_files_take_a_quarter_of_the_space_and_train(
    teacher_runs, manager, resolve, tmp_path, make_job
):
    runs = teachers.find_teachers(teacher_runs)
    whole = teachers.extract(manager, resolve([]).config, runs, tmp_path / "whole", dtype="fp32")
    small = teachers.extract(manager, resolve([]).config, runs, tmp_path / "small", dtype="fp32", pooled=True)
    assert small.bytes < 0.6 * whole.bytes  # the logits stay whole
    student = data.gather_data(resolve([]).config, manager, Cache(tmp_path / "cache"))
    expected = student.store.expected(student.store.get(student.labelled[0]))
    a, b = (open_teacher(found.folders[0]).read(expected, ["neg1", "logits"]) for found in (whole, small))
    assert torch.equal(a["logits"], b["logits"])
    blocks = a["neg1"].unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    assert torch.allclose(blocks, b["neg1"], atol=1e-5)
    with pytest.raises(DataError, match="pooling"):
        teachers.extract(manager, resolve([]).config, runs, tmp_path / "small", dtype="fp32")
    job = make_job(
        tmp_path / "run",
        {
            "teachers": {"features": [str(tmp_path / "small")]},
            "weighting": {"mode": "reinforce", "prior": "probe"},
            "agent": {"policy": "state"},
            "split": {"reward": 0.4},
            "distill": {"mask_features": True},
        },
    )
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("loss_features", 0) > 0] == [1, 2, 3]


def test_extraction_goes_on_where_it_stopped(teacher_runs, manager, resolve, tmp_path):
    runs = teachers.find_teachers(teacher_runs)
    teachers.extract(manager, resolve([]).config, runs, tmp_path / "f")
    victim = sorted((tmp_path / "f" / "teacher_0").glob("prostate_*"))[0]
    shutil.rmtree(victim)
    again = teachers.extract(manager, resolve([]).config, runs, tmp_path / "f")
    assert (again.written, again.kept) == (1, 7)


def test_training_refuses_features_extracted_for_another_window(
    teacher_runs, manager, resolve, tmp_path, make_job
):
    teachers.extract(manager, resolve([]).config, teachers.find_teachers(teacher_runs), tmp_path / "f")
    job = make_job(
        tmp_path / "run",
        {
            "teachers": {"features": [str(tmp_path / "f")]},
            "sample": {"size": [6, 32, 32]},
            "data": {"folds": 5},
        },
    )
    found = data.gather_data(job.config, manager, Cache(tmp_path / "cache"))
    with pytest.raises(DataError, match="window is"):
        found.check_features()


def test_an_empty_folder_holds_no_teachers(tmp_path):
    with pytest.raises(CheckpointError, match="no teachers"):
        teachers.find_teachers(tmp_path)


def test_a_teacher_number_that_does_not_exist_is_refused(manager, tmp_path):
    with pytest.raises(ConfigError, match="no teacher 7"):
        teachers.train_teachers(manager, lambda layers: None, tmp_path, count=3, only=[7])


def test_padding_of_a_window_is_what_the_teacher_saw(tmp_path):
    image = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    window = centre_window((2, 4, 4), (4, 4, 4))
    assert not window.cut(image)[:, [0, 3]].any()
