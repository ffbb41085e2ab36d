import math

import pytest
import torch

from medrl.plugins.kspace.fourier import (
    ColumnReconstruction,
    PointReconstruction,
    fft2c,
    fft3c,
    ifft2c,
    ifft3c,
    zero_filled,
)
from medrl.plugins.kspace.quality import nmse, psnr

LINE = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])


def columns(*acquired, width=4):
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[:, list(acquired)] = True
    return mask


def noise(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_line_has_the_kspace_and_energy_of_the_specification():
    kspace = fft2c(LINE)
    assert torch.allclose(kspace[0, 0], torch.tensor([-1 + 0j, 1 + 1j, 5 + 0j, 1 - 1j]), atol=1e-6)
    assert float(kspace.abs().square().sum()) == pytest.approx(30.0, abs=1e-5)
    assert float(LINE.square().sum()) == 30.0


def test_worked_line_from_dc_alone():
    image = zero_filled(fft2c(LINE), columns(2))
    assert torch.allclose(image, torch.full((1, 1, 4), 2.5 + 0j), atol=1e-6)
    assert float(nmse(image, LINE)) == pytest.approx(1 / 6, abs=1e-6)
    assert float(nmse(image.abs(), LINE)) == pytest.approx(1 / 6, abs=1e-6)
    assert float(psnr(image.abs(), LINE)) == pytest.approx(11.072, abs=5e-4)


def test_worked_line_from_two_columns():
    image = zero_filled(fft2c(LINE), columns(1, 2))
    expected = torch.tensor([2 - 0.5j, 2 + 0.5j, 3 + 0.5j, 3 - 0.5j])
    assert torch.allclose(image[0, 0], expected, atol=1e-6)
    assert float(nmse(image, LINE)) == pytest.approx(0.1, abs=1e-6)
    assert float(nmse(image.abs(), LINE)) == pytest.approx(0.06838, abs=5e-6)


def test_worked_line_from_three_columns_and_from_all():
    kspace = fft2c(LINE)
    image = zero_filled(kspace, columns(1, 2, 3))
    assert torch.allclose(image[0, 0], torch.tensor([1.5, 1.5, 3.5, 3.5]) + 0j, atol=1e-6)
    assert float(nmse(image, LINE)) == pytest.approx(1 / 30, abs=1e-6)
    assert torch.allclose(zero_filled(kspace, columns(0, 1, 2, 3)), LINE + 0j, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (5, 7), (8, 5), (7, 8), (1, 3), (32, 31)])
def test_transform_and_inverse_give_the_image_back_for_odd_sizes_too(shape):
    image = noise(3, *shape)
    assert float((ifft2c(fft2c(image)) - image).abs().max()) < 1e-5
    assert float((fft2c(ifft2c(image)) - image).abs().max()) < 1e-5
    energy = float(image.abs().square().sum())
    assert float(fft2c(image).abs().square().sum()) == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 6, 8), (5, 5, 5)])
def test_transform_of_volumes_is_unitary_and_invertible(shape):
    volume = noise(2, *shape)
    assert float((ifft3c(fft3c(volume)) - volume).abs().max()) < 1e-5
    assert float(fft3c(volume).abs().square().sum()) == pytest.approx(
        float(volume.abs().square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_dc_lies_at_half_of_each_size(shape):
    kspace = fft2c(torch.ones(1, *shape))[0]
    expected = torch.zeros(shape, dtype=torch.complex64)
    expected[shape[0] // 2, shape[1] // 2] = math.sqrt(shape[0] * shape[1])
    assert torch.allclose(kspace, expected, atol=1e-5)


def test_full_mask_gives_the_image_exactly():
    image = random_image(2, 16, 17)
    full = torch.ones(2, 17, dtype=torch.bool)
    assert float((zero_filled(fft2c(image), full) - image).abs().max()) < 1e-5


def test_an_image_rotated_to_the_corner_is_not_what_the_mask_takes_for_the_middle():
    """Plain uncentred fft2, as in the preprocessing of KSRO, puts the highest frequencies in the middle."""
    image = torch.zeros(1, 32, 32)
    image[:, 10:22, 9:23] = 1.0
    middle = columns(*range(12, 20), width=32)
    right, wrong = fft2c(image), torch.fft.fft2(image, norm="ortho")
    energy = image.square().sum()
    assert float((right * middle[:, None]).abs().square().sum() / energy) > 0.9
    assert float((wrong * middle[:, None]).abs().square().sum() / energy) < 0.1
    assert float(nmse(zero_filled(wrong, middle.new_ones(1, 32)), image)) > 1.0


def test_complex_error_is_the_energy_of_the_missing_columns_and_never_rises():
    image = noise(4, 16, 12)
    kspace = fft2c(image)
    energy = kspace.abs().square().sum(dim=1)
    order = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    last = torch.full((4,), 1.0 + 1e-6)
    for step in range(12):
        mask[torch.arange(4), order[:, step]] = True
        error = nmse(zero_filled(kspace, mask), image)
        missing = (energy * ~mask).sum(dim=1) / energy.sum(dim=1)
        assert torch.allclose(error, missing, atol=1e-6)
        assert (error <= last + 1e-6).all()
        last = error
    assert float(last.max()) < 1e-10


def test_columns_sorted_by_energy_are_the_optimum():
    """Every mask of 3 of 6 columns is tried."""
    from itertools import combinations

    image = noise(1, 8, 6)
    kspace = fft2c(image)
    best = kspace.abs().square().sum(dim=(0, 1)).argsort(descending=True)[:3].tolist()
    errors = {
        chosen: float(nmse(zero_filled(kspace, columns(*chosen, width=6)), image))
        for chosen in combinations(range(6), 3)
    }
    assert min(errors, key=lambda chosen: errors[chosen]) == tuple(sorted(best))


@pytest.mark.parametrize("shape", [(64, 64), (31, 55)])
def test_fifty_added_columns_equal_the_full_inverse_transform(shape):
    kspace = fft2c(random_image(3, *shape))
    whole = ColumnReconstruction(kspace)
    mask = torch.zeros(3, shape[1], dtype=torch.bool)
    images = whole.images(mask)
    order = torch.rand(3, shape[1], generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    for step in range(50):
        images = whole.add(images, order[:, step])
        mask[torch.arange(3), order[:, step]] = True
    assert float((images - zero_filled(kspace, mask)).abs().max()) < 1e-4
    assert float((whole.images(mask) - zero_filled(kspace, mask)).abs().max()) < 1e-5


def test_added_columns_equal_the_full_inverse_transform_with_coils_and_depth():
    kspace = fft3c(noise(2, 3, 4, 8, 10))
    whole = ColumnReconstruction(kspace, volume=True)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    images = whole.images(mask)
    for chosen in ([5, 4], [6, 5], [0, 9]):
        images = whole.add(images, torch.tensor(chosen))
        mask[torch.arange(2), torch.tensor(chosen)] = True
    assert float((images - zero_filled(kspace, mask, volume=True)).abs().max()) < 1e-5


def test_weights_leave_an_image_alone_or_take_a_column_out_again():
    whole = ColumnReconstruction(fft2c(random_image(3, 8, 8)))
    images = whole.images(columns(3, 4, width=8).expand(3, -1))
    before = images.clone()
    chosen = torch.tensor([5, 6, 4])
    whole.add(images, chosen, torch.tensor([1.0, 0.0, -1.0]))
    assert torch.equal(images[1], before[1])
    assert torch.allclose(images[2], whole.images(columns(3, width=8).expand(3, -1))[2], atol=1e-5)
    assert torch.allclose(images[0], whole.images(columns(3, 4, 5, width=8).expand(3, -1))[0], atol=1e-5)


def test_all_candidates_at_once_equal_one_after_the_other():
    kspace = fft2c(noise(2, 3, 8, 9))
    whole = ColumnReconstruction(kspace)
    mask = columns(4, width=9).expand(2, -1)
    images = whole.images(mask)
    before = images.clone()
    candidates = torch.tensor([[0, 5, 8], [3, 2, 1]])
    found = whole.with_each(images, candidates)
    assert found.shape == (2, 3, 3, 8, 9)
    assert torch.equal(images, before)
    for number in range(3):
        one = whole.add(images.clone(), candidates[:, number])
        assert torch.allclose(found[:, number], one, atol=1e-6)


def test_an_item_of_the_batch_can_be_replaced():
    kspace = fft2c(noise(3, 8, 8))
    other = fft2c(noise(1, 8, 8, seed=5))
    whole = ColumnReconstruction(kspace)
    whole.replace(torch.tensor([1]), other)
    full = torch.ones(3, 8, dtype=torch.bool)
    assert torch.allclose(whole.images(full)[1], ifft2c(other)[0], atol=1e-5)
    assert torch.allclose(whole.images(full)[0], ifft2c(kspace)[0], atol=1e-5)


@pytest.mark.parametrize("coils", [(), (2,)])
def test_points_of_a_volume_add_up_to_the_full_inverse_transform(coils):
    volume = noise(2, *coils, 4, 6, 5)
    kspace = fft3c(volume)
    whole = PointReconstruction(kspace)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    images = whole.images(mask)
    for number in torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist():
        depth, column = torch.full((2,), number // 5), torch.full((2,), number % 5)
        images = whole.add(images, depth, column)
        mask[:, number // 5, number % 5] = True
        if number == 7:
            assert float((images - whole.images(mask)).abs().max()) < 1e-5
    assert float((images - volume).abs().max()) < 1e-5


def test_transform_stays_in_single_precision_under_mixed_precision():
    image = random_image(1, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kspace = fft2c(image.bfloat16())
        exact = fft2c(image)
    assert kspace.dtype == exact.dtype == torch.complex64
    assert torch.allclose(exact, fft2c(image))
    assert fft2c(image.double()).dtype == torch.complex128
