"""Labels to channels and back."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft.regions import (
    BINARY,
    THREE_CLASS,
    classes,
    make_target,
    nested,
    separate,
    teacher_probabilities,
    teacher_threshold,
)

LABELS = torch.tensor([0, 1, 2, 3]).view(1, 1, 1, 4)
HIPPOCAMPUS = {"background": 0, "anterior": 1, "posterior": 2}


def test_binary_regions_of_the_four_labels():
    target = BINARY.encode(LABELS)
    assert target[0, 0].flatten().tolist() == [0, 1, 1, 1]
    assert target[0, 1].flatten().tolist() == [0, 0, 1, 1]


def test_encoding_and_decoding_three_regions_is_the_identity():
    assert torch.equal(THREE_CLASS.decode(THREE_CLASS.encode(LABELS)), LABELS)


@pytest.mark.parametrize("make", [nested, separate, classes])
def test_any_label_set_survives_encoding_and_decoding(make):
    target = make({"background": 0, "a": 1, "b": 4, "c": 7})
    labels = torch.tensor([0, 1, 4, 7, 4]).view(1, 1, 1, 5)
    encoded = target.encode(labels)
    assert encoded.shape == (1, target.channels, 1, 1, 5)
    assert torch.equal(target.decode(encoded), labels)


def test_class_mode_refuses_a_label_without_a_class():
    with pytest.raises(DataError, match=r"\[5\]"):
        classes(HIPPOCAMPUS).encode(torch.tensor([0, 5]).view(1, 1, 1, 2))


def test_regions_ignore_labels_of_no_region():
    assert separate(HIPPOCAMPUS).encode(torch.tensor([0, 5]).view(1, 1, 1, 2)).sum() == 0


def test_labels_may_carry_a_channel_axis():
    assert torch.equal(BINARY.encode(LABELS[:, None]), BINARY.encode(LABELS))


def test_classes_decide_by_the_largest_probability_and_regions_by_one_half():
    p = torch.tensor([0.40, 0.35, 0.25]).view(1, 3, 1, 1, 1)
    assert classes(HIPPOCAMPUS).decide(p).flatten().tolist() == [True, False, False]
    assert THREE_CLASS.decide(p).flatten().tolist() == [False, False, False]
    assert not bool(THREE_CLASS.decide(torch.full((1, 3, 1, 1, 1), 0.5)).any())


def test_focus_is_cancer_in_the_prostate_and_every_structure_elsewhere():
    assert BINARY.focus == (1,)
    assert THREE_CLASS.focus == (1, 2)
    assert classes(HIPPOCAMPUS).focus == (1, 2)
    assert separate(HIPPOCAMPUS).focus == (0, 1)


def test_unknown_kinds_and_empty_label_sets_are_refused():
    with pytest.raises(ConfigError, match="binary"):
        make_target("binery")
    with pytest.raises(ConfigError):
        make_target("classes", {"background": 0})
    assert make_target("3class") is THREE_CLASS
    assert make_target("binary_classes").encode(LABELS)[0, 2].flatten().tolist() == [0, 0, 1, 1]


def test_three_region_logits_of_a_teacher_give_the_larger_cancer_for_binary():
    logits = torch.tensor([2.0, -1.0, 3.0]).view(1, 3, 1, 1, 1)
    p = teacher_probabilities(logits, BINARY).flatten()
    assert torch.allclose(p, torch.sigmoid(torch.tensor([2.0, 3.0])))


def test_provicnet_classes_become_regions():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = p.log().view(1, 4, 1, 1, 1)
    assert torch.allclose(
        teacher_probabilities(logits, BINARY, "provicnet").flatten(), torch.tensor([0.9, 0.7])
    )
    three = teacher_probabilities(logits, THREE_CLASS, "provicnet").flatten()
    assert torch.allclose(three, torch.tensor([0.9, 0.3, 0.4]))


def test_prostatlasdiff_is_scaled_by_its_peak_and_clipped():
    x = torch.zeros(1, 3, 1, 1, 3)
    x[0, 1, 0, 0] = torch.logit(torch.tensor([0.8, 0.08, 0.008]))
    x[0, 0], x[0, 2] = -20.0, -20.0
    p = teacher_probabilities(x, BINARY, "prostatlasdiff")
    assert torch.allclose(p[0, 1].flatten(), torch.tensor([1.0, 0.5, 0.05]), atol=1e-5)
    assert teacher_threshold("prostatlasdiff") == 0.1
    assert teacher_threshold("nnunet") == 0.5


def test_logits_that_do_not_fit_the_target_name_both_counts():
    with pytest.raises(DataError, match=r"4 channels, expected 2"):
        teacher_probabilities(torch.zeros(1, 4, 1, 1, 1), BINARY)
    with pytest.raises(DataError):
        teacher_probabilities(torch.zeros(1, 4, 1, 1, 1), classes(HIPPOCAMPUS), "provicnet")
    with pytest.raises(ConfigError):
        teacher_probabilities(torch.zeros(1, 2, 1, 1, 1), BINARY, "nnunett")
