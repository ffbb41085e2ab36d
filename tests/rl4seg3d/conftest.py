"""Small echo sequences, networks and files in the forms of other programs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.manager import PluginManager

OBLIQUE = np.array(
    [[0.28, 0.09, 0.0, -21.0], [-0.08, 0.27, 0.12, 14.0], [0.03, -0.1, 0.99, 7.5], [0.0, 0.0, 0.0, 1.0]]
)


def ellipse(width, height, frames=1, *, centre=None, radii=None):
    """A filled ellipse `(X, Y, T)` of 0 and 1, in the middle by default."""
    cx, cy = centre or ((width - 1) / 2, (height - 1) / 2)
    rx, ry = radii or (width / 4, height / 3)
    x, y = np.arange(width)[:, None], np.arange(height)[None, :]
    inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1.0
    return np.repeat(inside[..., None], frames, axis=2).astype(np.float32)


def speckle(width, height, frames, seed=0):
    """Grey values 0 to 255 `(X, Y, T)` uint8 with a dark ellipse."""
    generator = np.random.default_rng(seed)
    noise = generator.gamma(2.0, 40.0, (width, height, frames))
    return np.clip(noise * (1.0 - 0.7 * ellipse(width, height, frames)), 0, 255).astype(np.uint8)


def save(path: Path, data, affine=None, *, spacing=(0.37, 0.37, 1.0), time_unit=None, step=None) -> Path:
    """Write a NIfTI file."""
    image = nib.Nifti1Image(data, np.diag([*spacing, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm", time_unit)
    if step is not None:
        image.header["pixdim"][4] = step
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_dicom(path: Path, pixels, *, kind="MONOCHROME2", regions=(), **tags) -> Path:
    """Write an ultrasound DICOM file of frames `(T, rows, columns[, 3])`, or of one frame."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    colour = kind not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    frames = pixels.shape[0] if pixels.ndim == 3 + colour else None
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.PatientName = "MUSTERMANN^MAX"
    dataset.Modality = "US"
    dataset.Rows, dataset.Columns = pixels.shape[frames is not None :][:2]
    if frames is not None:
        dataset.NumberOfFrames = frames
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = kind
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixels.astype(np.uint8).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    if regions:
        made = []
        for unit, dx, dy, box in regions:
            region = Dataset()
            region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = unit
            region.PhysicalDeltaX, region.PhysicalDeltaY = dx, dy
            region.RegionLocationMinX0, region.RegionLocationMinY0 = box[:2]
            region.RegionLocationMaxX1, region.RegionLocationMaxY1 = box[2:]
            made.append(region)
        dataset.SequenceOfUltrasoundRegions = pydicom.Sequence(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.create(third_party=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """Helpers that make small files."""
    return SimpleNamespace(
        OBLIQUE=OBLIQUE, ellipse=ellipse, speckle=speckle, save=save, write_dicom=write_dicom
    )
