"""A real CT: lesions are implanted, since none with labels is at hand; files in any orientation are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medrl.core.volume import read_volume
from medrl.plugins.spars.data import implant_lesions, prepare_volume, restore
from medrl.plugins.spars.data_config import SampleConfig

CT = Path(__file__).parents[3] / "shared" / "data" / "ct_totalsegmentator"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (CT / "example_ct_sm.nii.gz").is_file(), reason="the real CT is not here"),
]


def test_a_real_ct_comes_back_onto_its_own_grid():
    volume = read_volume(CT / "example_ct_sm.nii.gz")
    prepared, plan = prepare_volume(volume, SampleConfig())
    assert prepared.shape == (122, 101, 30)
    assert 0.0 <= float(prepared.min()) < float(prepared.max()) <= 1.0
    back = restore(prepared, plan, kind="linear")
    expected = np.clip((volume.data[0].astype(np.float32) + 200.0) / 450.0, 0.0, 1.0)
    assert np.allclose(back, expected, atol=1e-5)


def test_implanted_lesions_lie_in_the_liver_and_are_darker():
    image = read_volume(CT / "example_ct_sm.nii.gz").data[0].astype(np.float32)
    liver = read_volume(CT / "example_seg.nii.gz", kind="label").data[0] == 5
    changed, mask = implant_lesions(image, liver, np.random.default_rng(0), count=(2, 2), radius=(3.0, 5.0))
    assert mask.sum() > 100
    assert not (mask & ~liver).any()
    assert (changed - image)[mask].mean() < -20.0
    assert np.array_equal(changed[~liver], image[~liver])
