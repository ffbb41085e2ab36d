"""Readers of measured k-space: fastMRI, ISMRMRD, BART."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medrl.core.errors import DataError
from medrl.plugins.kspace.coils import cg_sense, combine, estimate_sensitivities, root_sum_of_squares
from medrl.plugins.kspace.data import RawScan, SamplePlan, find_reader, prepare, read_scan
from medrl.plugins.kspace.data.bart import open_bart, read_bart
from medrl.plugins.kspace.data.fastmri import open_fastmri, read_fastmri
from medrl.plugins.kspace.data.mrd import open_ismrmrd, parse_header, read_ismrmrd
from medrl.plugins.kspace.fourier import fft2c, ifft2c
from medrl.plugins.kspace.quality import nmse

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real images are not here: {DATA} does not exist"),
]

PLAIN = SamplePlan(shape=None, label_names={"background": 0})


def noise(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def image_of(kspace):
    return ifft2c(torch.from_numpy(np.ascontiguousarray(kspace))).numpy()


def header(
    encoded=(16, 12, 1),
    recon=(16, 12, 1),
    field=(320.0, 240.0, 8.0),
    limits=(0, 11, 6),
    trajectory="cartesian",
):
    def space(name, matrix, size):
        axes = "".join(f"<{a}>{v}</{a}>" for a, v in zip("xyz", matrix, strict=True))
        mm = "".join(f"<{a}>{v}</{a}>" for a, v in zip("xyz", size, strict=True))
        return f"<{name}><matrixSize>{axes}</matrixSize><fieldOfView_mm>{mm}</fieldOfView_mm></{name}>"

    bounds = ""
    if limits:
        low, high, centre = limits
        bounds = (
            "<encodingLimits><kspace_encoding_step_1>"
            f"<minimum>{low}</minimum><maximum>{high}</maximum><center>{centre}</center>"
            "</kspace_encoding_step_1></encodingLimits>"
        )
    shown = space("reconSpace", recon, field) if recon else ""
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
        f"{space('encodedSpace', encoded, field)}{shown}{bounds}<trajectory>{trajectory}</trajectory>"
        "</encoding></ismrmrdHeader>"
    )


# --- fastMRI -------------------------------------------------------------------------------------------


def write_fastmri(path: Path, kspace, *, reference="", xml="", mask=None, patient="", sensitivities=None):
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
        if reference:
            images = np.abs(image_of(kspace))
            file[reference] = np.sqrt((images**2).sum(axis=1)) if kspace.ndim == 4 else images
        if xml:
            file["ismrmrd_header"] = xml
        if mask is not None:
            file["mask"] = mask
        if sensitivities is not None:
            file["sensitivities"] = sensitivities
        if patient:
            file.attrs["patient_id"] = patient


@pytest.mark.parametrize(
    ("shape", "reference"), [((3, 16, 12), "reconstruction_esc"), ((2, 4, 16, 12), "reconstruction_rss")]
)
def test_fastmri_file_round_trips_to_the_same_image(tmp_path, shape, reference):
    kspace = noise(*shape)
    write_fastmri(tmp_path / "file1.h5", kspace, reference=reference, xml=header())
    raw = read_fastmri(tmp_path / "file1.h5")
    assert np.array_equal(raw.kspace, kspace)
    assert raw.spacing_mm == (20.0, 20.0, 8.0)
    assert raw.slices == tuple(range(shape[0]))
    found = prepare(raw, PLAIN, "file1")
    # The target is the reconstruction that the file brings, but for the scale.
    images = found.target * found.scale.view(-1, 1, 1)
    assert np.allclose(images.numpy(), raw.reference, atol=1e-4)
    assert found.target.flatten(1).amax(dim=1).tolist() == pytest.approx([1.0] * shape[0])
    again = ifft2c(found.kspace)
    again = root_sum_of_squares(again) if again.ndim == 4 else again.abs()
    assert torch.allclose(again, found.target, atol=1e-5)


def test_columns_outside_of_the_encoding_limits_are_padding(tmp_path):
    kspace = noise(1, 16, 12)
    # 8 lines were measured, line 4 is the centre: columns 6 - 4 = 2 up to 9.
    write_fastmri(tmp_path / "a.h5", kspace, xml=header(limits=(0, 7, 4)))
    raw = read_fastmri(tmp_path / "a.h5")
    assert np.flatnonzero(raw.missing).tolist() == [0, 1, 10, 11]
    found = prepare(raw, PLAIN, "a")
    assert found.padding.nonzero().flatten().tolist() == [0, 1, 10, 11]
    assert (found.kspace[..., found.padding] == 0).all()
    write_fastmri(tmp_path / "b.h5", kspace, xml=header(limits=(0, 15, 6)))
    with pytest.raises(DataError, match="columns 0 to 16 were measured, of 12"):
        read_fastmri(tmp_path / "b.h5")


def test_undersampled_and_damaged_fastmri_files_are_refused(tmp_path):
    kspace = noise(1, 8, 8)
    write_fastmri(tmp_path / "a.h5", kspace, mask=np.arange(8) % 2 == 0)
    with pytest.raises(DataError, match="undersampled"):
        read_fastmri(tmp_path / "a.h5")
    write_fastmri(tmp_path / "b.h5", kspace, mask=np.ones(8, bool))
    assert read_fastmri(tmp_path / "b.h5").kspace.shape == (1, 8, 8)
    kspace[0, 1, 1] = np.nan
    write_fastmri(tmp_path / "c.h5", kspace)
    with pytest.raises(DataError, match="NaN"):
        read_fastmri(tmp_path / "c.h5")
    (tmp_path / "d.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:900])
    with pytest.raises(DataError, match=r"d\.h5"):
        read_fastmri(tmp_path / "d.h5")


def test_files_of_one_fastmri_patient_stay_together_and_folders_deal_the_cases(tmp_path):
    for part, names in (("train", "abc"), ("val", "d"), ("test", "e")):
        (tmp_path / f"multicoil_{part}").mkdir()
        for name in names:
            patient = "p1" if name in "ab" else name
            path = tmp_path / f"multicoil_{part}" / f"{name}.h5"
            write_fastmri(path, noise(1, 8, 8), patient=patient)
    dataset = open_fastmri(tmp_path)
    assert {one.id: one.patient for one in dataset.scans} == {
        "a": "p1",
        "b": "p1",
        "c": "c",
        "d": "d",
        "e": "e",
    }
    assert dataset.apart == {"e"}
    split = dataset.fold(0)
    assert [one.id for one in split.train] == ["a", "b", "c"]
    assert [one.id for one in split.val] == ["d"]
    assert find_reader(tmp_path) == "fastmri"
    flat = open_fastmri(tmp_path / "multicoil_train")
    parts = flat.fold(0, folds=2)
    assert not {one.patient for one in parts.train} & {one.patient for one in parts.val}


def test_given_sensitivities_are_read_and_used(tmp_path):
    image = noise(1, 8, 8)
    maps = noise(1, 3, 8, 8, seed=1)
    kspace = fft2c(torch.from_numpy(maps * image[:, None])).numpy()
    write_fastmri(tmp_path / "a.h5", kspace, sensitivities=maps)
    found = prepare(read_fastmri(tmp_path / "a.h5"), PLAIN, "a")
    assert torch.allclose(found.target * found.scale, torch.from_numpy(np.abs(image)), atol=1e-4)
    assert torch.equal(found.sensitivities, torch.from_numpy(maps))


# --- ISMRMRD -------------------------------------------------------------------------------------------

INDEX = np.dtype(
    [(name, "<u2") for name in (
        "kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast", "phase",
        "repetition", "set", "segment",
    )] + [("user", "<u2", (8,))]
)  # fmt: skip
HEAD = np.dtype(
    [
        ("version", "<u2"), ("flags", "<u8"), ("number_of_samples", "<u2"), ("active_channels", "<u2"),
        ("discard_pre", "<u2"), ("discard_post", "<u2"), ("center_sample", "<u2"), ("idx", INDEX),
    ]
)  # fmt: skip


def acquisition(samples, *, step=0, centre=None, flags=(), discard=(0, 0), **counters):
    head = np.zeros((), HEAD)
    head["active_channels"], head["number_of_samples"] = samples.shape
    head["center_sample"] = samples.shape[1] // 2 if centre is None else centre
    head["flags"] = sum(1 << (flag - 1) for flag in flags)
    head["discard_pre"], head["discard_post"] = discard
    head["idx"]["kspace_encode_step_1"] = step
    for name, value in counters.items():
        head["idx"][name] = value
    return head, np.ascontiguousarray(samples, dtype=np.complex64).view(np.float32).ravel()


def write_ismrmrd(path: Path, acquisitions, xml, group="dataset"):
    floats = h5py.special_dtype(vlen=np.float32)
    kind = np.dtype([("head", HEAD), ("traj", floats), ("data", floats)])
    with h5py.File(path, "w") as file:
        records = np.empty(len(acquisitions), dtype=kind)
        for number, (head, values) in enumerate(acquisitions):
            records[number] = (head, np.zeros(0, np.float32), values)
        file[f"{group}/data"] = records
        file.create_dataset(f"{group}/xml", data=np.array([xml], dtype=object), dtype=h5py.string_dtype())


def oversampled(kspace):
    """The same image in the middle of twice the field of view along the readout (rows)."""
    images = image_of(kspace)
    rows = images.shape[-2]
    wide = np.zeros((*images.shape[:-2], 2 * rows, images.shape[-1]), np.complex64)
    wide[..., rows // 2 : rows // 2 + rows, :] = images
    return fft2c(torch.from_numpy(wide)).numpy()


def lines(kspace, **counters):
    """One acquisition for each column of ``(C, H, W)``."""
    return [acquisition(kspace[:, :, step], step=step, **counters) for step in range(kspace.shape[-1])]


@pytest.mark.parametrize("coils", [1, 3])
def test_ismrmrd_file_round_trips_to_the_same_image(tmp_path, coils):
    kspace = noise(2, coils, 16, 12)
    acquisitions = [one for number in (1, 0) for one in lines(oversampled(kspace[number]), slice=number)]
    write_ismrmrd(tmp_path / "scan.h5", acquisitions, header(encoded=(32, 12, 1)))
    raw = read_ismrmrd(tmp_path / "scan.h5")
    expected = kspace if coils > 1 else kspace[:, 0]
    assert raw.kspace.shape == expected.shape
    assert np.allclose(raw.kspace, expected, atol=1e-5)
    assert not raw.missing.any()
    assert raw.spacing_mm == (10.0, 20.0, 8.0)
    found = prepare(raw, PLAIN, "scan")
    images = np.abs(image_of(kspace))
    combined = np.sqrt((images**2).sum(axis=1))
    assert np.allclose((found.target * found.scale.view(-1, 1, 1)).numpy(), combined, atol=1e-4)


def test_noise_readouts_whiten_the_coils_and_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    mixing = np.array([[2.0, 0.0], [1.0 + 0.5j, 0.7]])
    kspace = noise(2, 8, 6)
    white = noise(2, 20000, seed=4) / np.sqrt(2)
    scan = np.einsum("ab,bhw->ahw", mixing, kspace).astype(np.complex64)
    noisy = acquisition((mixing @ white).astype(np.complex64), step=int(rng.integers(6)), flags=(19,))
    write_ismrmrd(tmp_path / "a.h5", [noisy, *lines(scan)], header((8, 6, 1), (8, 6, 1), limits=None))
    raw = read_ismrmrd(tmp_path / "a.h5")
    # The factor of the covariance is triangular, as the mixing is; it is found again, but for sampling error.
    assert np.allclose(raw.kspace[0], kspace, atol=0.1)
    assert not np.allclose(raw.kspace[0], scan, atol=1.0)
    write_ismrmrd(tmp_path / "b.h5", lines(scan), header((8, 6, 1), (8, 6, 1), limits=None))
    assert np.allclose(read_ismrmrd(tmp_path / "b.h5").kspace[0], scan, atol=1e-6)


def test_readouts_are_placed_by_their_counter_and_missing_columns_are_marked(tmp_path):
    kspace = noise(1, 8, 6)
    chosen = [5, 1, 3, 2]
    acquisitions = [acquisition(kspace[:, :, step], step=step) for step in chosen]
    write_ismrmrd(tmp_path / "a.h5", acquisitions, header((8, 6, 1), None, limits=None))
    raw = read_ismrmrd(tmp_path / "a.h5")
    assert np.flatnonzero(raw.missing).tolist() == [0, 4]
    assert np.allclose(raw.kspace[0][:, chosen], kspace[0][:, chosen])
    assert (raw.kspace[..., [0, 4]] == 0).all()
    # With limits, the centre line lies in the middle: counter 2 becomes column 3.
    acquisitions = [acquisition(kspace[:, :, step], step=step) for step in range(4)]
    write_ismrmrd(tmp_path / "b.h5", acquisitions, header((8, 6, 1), None, limits=(0, 3, 2)))
    raw = read_ismrmrd(tmp_path / "b.h5")
    assert np.flatnonzero(raw.missing).tolist() == [0, 5]
    assert np.allclose(raw.kspace[0][:, 1:5], kspace[0][:, :4])


def test_averages_reversed_and_partial_readouts_are_taken_as_they_were_meant(tmp_path):
    kspace = noise(1, 8, 6)
    first = acquisition(kspace[:, :, 0] * 1.5, step=0, average=0)
    second = acquisition(kspace[:, :, 0] * 0.5, step=0, average=1)
    backwards = acquisition(kspace[:, ::-1, 1], step=1, centre=3, flags=(22,))
    # The first two points were not measured; three more before them are to be thrown away.
    junk = np.full((1, 3), 99, np.complex64)
    late = acquisition(np.concatenate([junk, kspace[:, 2:, 2]], axis=1), step=2, centre=5, discard=(3, 0))
    rest = [acquisition(kspace[:, :, step], step=step) for step in (3, 4, 5)]
    skipped = [acquisition(np.full((1, 8), 7), step=3, flags=(flag,)) for flag in (20, 23, 24, 27)]
    write_ismrmrd(
        tmp_path / "a.h5",
        [first, second, backwards, late, *rest, *skipped],
        header((8, 6, 1), None, limits=None),
    )
    found = read_ismrmrd(tmp_path / "a.h5").kspace[0]
    expected = kspace[0].copy()
    expected[:2, 2] = 0
    assert np.allclose(found, expected, atol=1e-6)


def test_partitions_become_slices_and_phases_frames(tmp_path):
    volume = noise(1, 4, 8, 6)
    kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(volume, axes=1), axis=1, norm="ortho"), axes=1)
    acquisitions = [one for z in range(4) for one in lines(kspace[:, z], kspace_encode_step_2=z)]
    write_ismrmrd(tmp_path / "a.h5", acquisitions, header((8, 6, 4), None, limits=None))
    raw = read_ismrmrd(tmp_path / "a.h5")
    assert np.allclose(raw.kspace, volume[0], atol=1e-5)
    assert raw.slices == (0, 1, 2, 3)
    acquisitions = [one for t in range(2) for one in lines(volume[:, t], phase=t)]
    write_ismrmrd(tmp_path / "b.h5", acquisitions, header((8, 6, 1), None, limits=None))
    raw = read_ismrmrd(tmp_path / "b.h5")
    assert raw.frames == ("t00", "t01")
    assert raw.slices == (0, 0)
    assert np.allclose(raw.kspace, volume[0, :2], atol=1e-6)


def test_ismrmrd_files_that_cannot_be_sorted_are_refused(tmp_path):
    good = lines(noise(1, 8, 6))
    plain = header((8, 6, 1), None, limits=None)
    cases = {
        "only Cartesian": (good, header((8, 6, 1), None, limits=None, trajectory="spiral")),
        "does not fit": ([*good, acquisition(noise(1, 8), step=6)], plain),
        r"readouts of \[1, 2\] coils": ([*good, acquisition(noise(2, 8), step=1)], plain),
        "no readout of an image": ([acquisition(noise(1, 8), flags=(19,))], plain),
        "no encoding": (good, "<ismrmrdHeader/>"),
        "declares entities": (good, '<!DOCTYPE a [<!ENTITY b "c">]><ismrmrdHeader/>'),
        "no XML": (good, "<ismrmrdHeader>"),
        "above the limit": (good, header((60000, 60000, 60), None, limits=None)),
    }
    for number, (why, (acquisitions, xml)) in enumerate(cases.items()):
        path = tmp_path / f"{number}.h5"
        write_ismrmrd(path, acquisitions, xml)
        with pytest.raises(DataError, match=why):
            read_ismrmrd(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x/data"] = np.zeros(3)
    with pytest.raises(DataError, match="no ISMRMRD file"):
        read_ismrmrd(tmp_path / "other.h5")


def test_a_header_without_field_of_view_leaves_the_spacing_unknown():
    found = parse_header(header(field=(0.0, 0.0, 0.0), limits=None).encode(), "x")
    assert np.isnan(found.spacing_mm).all()
    assert found.padding(12) == (0, 12)


def test_a_folder_of_ismrmrd_files_is_one_case_each(tmp_path):
    for name in ("s1", "s2"):
        write_ismrmrd(
            tmp_path / f"{name}.h5", lines(noise(1, 8, 6)), header((8, 6, 1), None, limits=None), "scan"
        )
    dataset = open_ismrmrd(tmp_path)
    assert [one.id for one in dataset.scans] == ["s1", "s2"]
    assert dataset.read(dataset.scans[0], with_label=False).kspace.shape == (1, 8, 6)
    assert find_reader(tmp_path) == "ismrmrd"
    assert read_scan(tmp_path / "s1.h5").kspace.shape == (1, 8, 6)


# --- BART ----------------------------------------------------------------------------------------------


def write_cfl(path: Path, values):
    shape = values.shape + (1,) * (16 - values.ndim)
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, shape)) + "\n")
    values.astype("<c8").ravel(order="F").tofile(path)


@pytest.mark.parametrize("shape", [(9, 7), (1, 9, 7), (9, 1, 7)])
def test_bart_slices_have_rows_and_columns_whichever_dimensions_are_encoded(tmp_path, shape):
    values = noise(*shape)
    write_cfl(tmp_path / "a.cfl", values)
    raw = read_bart(tmp_path / "a.cfl")
    assert np.array_equal(raw.kspace[0], values.reshape(9, 7))


def test_bart_coils_slices_and_sensitivities_are_read(tmp_path):
    values = noise(1, 9, 7, 4)
    write_cfl(tmp_path / "scan.cfl", values)
    write_cfl(tmp_path / "scan_sens.cfl", values * 2)
    dataset = open_bart(tmp_path)
    assert [one.id for one in dataset.scans] == ["scan"]
    raw = dataset.read(dataset.scans[0], with_label=False)
    assert np.array_equal(raw.kspace[0], values[0].transpose(2, 0, 1))
    assert np.array_equal(raw.sensitivities, raw.kspace * 2)
    assert {path.name for path in dataset.files(dataset.scans[0], with_label=False)} == {
        "scan.cfl", "scan.hdr", "scan_sens.cfl", "scan_sens.hdr",
    }  # fmt: skip
    stacked = noise(9, 7, 1, 2, *[1] * 9, 3)
    write_cfl(tmp_path / "stack.cfl", stacked)
    raw = read_bart(tmp_path / "stack.cfl")
    assert raw.kspace.shape == (3, 2, 9, 7)
    assert np.array_equal(raw.kspace[2, 1], stacked[:, :, 0, 1].reshape(9, 7, 3)[..., 2])


def test_bart_volumes_are_transformed_along_the_second_phase_encoding(tmp_path):
    volume = noise(6, 5, 4)
    kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(volume, axes=2), axis=2, norm="ortho"), axes=2)
    write_cfl(tmp_path / "v.cfl", kspace)
    assert np.allclose(read_bart(tmp_path / "v.cfl").kspace, volume.transpose(2, 0, 1), atol=1e-5)


def test_bart_columns_of_zeros_are_missing(tmp_path):
    values = noise(8, 6)
    values[:, [1, 4]] = 0
    write_cfl(tmp_path / "a.cfl", values)
    assert np.flatnonzero(read_bart(tmp_path / "a.cfl").missing).tolist() == [1, 4]


def test_damaged_bart_files_are_refused(tmp_path):
    write_cfl(tmp_path / "a.cfl", noise(8, 6))
    whole = (tmp_path / "a.cfl").read_bytes()
    (tmp_path / "a.cfl").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="376 bytes, its header announces 384"):
        read_bart(tmp_path / "a.cfl")
    (tmp_path / "a.cfl").write_bytes(whole)
    for text in ("", "# Dimensions\n", "# Dimensions\n8 -6\n", "# Dimensions\n100000 100000 100000\n"):
        (tmp_path / "a.hdr").write_text(text)
        with pytest.raises(DataError, match=r"a\.hdr"):
            read_bart(tmp_path / "a.cfl")
    write_cfl(tmp_path / "b.cfl", noise(8, 6, 1, 1, 2))
    with pytest.raises(DataError, match="dimension 4 has 2 entries"):
        read_bart(tmp_path / "b.cfl")


def test_a_scan_holds_either_images_or_kspace():
    with pytest.raises(DataError, match="either images or k-space"):
        RawScan(names=("z",), frames=("",), slices=(0,))
    with pytest.raises(DataError, match="differ in number"):
        RawScan(names=("z",), frames=("",), slices=(0, 1), kspace=noise(1, 4, 4))


# --- real data -----------------------------------------------------------------------------------------


class TestReal:
    pytestmark = real

    def test_the_brain_of_eight_coils_has_its_centre_in_the_middle_and_a_real_phase(self):
        raw = read_bart(DATA / "kspace" / "brain8ch_full.cfl")
        assert raw.kspace.shape == (1, 8, 230, 180)
        assert not raw.missing.any()
        energy = (np.abs(raw.kspace) ** 2).sum(axis=(0, 1, 2))
        assert abs(int(energy.argmax()) - 90) <= 1
        assert energy[86:95].sum() / energy.sum() > 0.8
        turned = np.roll(energy[::-1], 1)
        assert np.abs(turned - energy).sum() / energy.sum() > 0.01  # not Hermitian

    def test_sense_reconstructs_every_second_column_of_the_brain(self):
        raw = read_bart(DATA / "kspace" / "brain8ch_full.cfl")
        found = prepare(raw, PLAIN, "brain")
        kspace = found.kspace
        maps = estimate_sensitivities(kspace, 24)
        target = combine(ifft2c(kspace), maps)
        # One image stands for eight coils: its energy is nearly that of their root sum of squares.
        assert float(nmse(target.abs(), found.target)) < 0.02
        mask = torch.zeros(1, 180, dtype=torch.bool)
        mask[:, ::2] = True
        mask[:, 78:102] = True
        zero_filled = combine(ifft2c(kspace * mask.view(1, 1, 1, -1)), maps)
        unfolded = cg_sense(kspace, mask, maps)
        assert float(nmse(unfolded, target)) < 0.5 * float(nmse(zero_filled, target))
        assert float(nmse(unfolded, target)) < 0.02

    def test_the_simulated_ismrmrd_brain_is_read(self):
        raw = read_scan(DATA / "kspace" / "ismrmrd_brain_simulated.h5")
        assert raw.kspace.shape == (1, 256, 256)
        assert not raw.missing.any()
        image = np.abs(image_of(raw.kspace[0]))
        # A head in air: the corners are dark, the middle is not.
        corners = image[:24, :24].mean() + image[-24:, -24:].mean()
        assert image[96:160, 96:160].mean() > 5 * corners
        assert find_reader(DATA / "kspace" / "ismrmrd_brain_simulated.h5") == "ismrmrd"
