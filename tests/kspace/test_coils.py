import pytest
import torch

from medrl.plugins.kspace.coils import (
    cg_sense,
    combine,
    estimate_sensitivities,
    expand,
    root_sum_of_squares,
)
from medrl.plugins.kspace.fourier import fft2c, fft3c, ifft2c, zero_filled
from medrl.plugins.kspace.masks import initial_mask
from medrl.plugins.kspace.quality import nmse


def smooth_coils(coils, size):
    """Complex Gaussian bumps around the object."""
    place = (torch.arange(size) - size / 2) / size
    y, x = torch.meshgrid(place, place, indexing="ij")
    found = []
    for number in range(coils):
        angle = torch.tensor(2 * torch.pi * number / coils)
        u, v = 0.5 * angle.cos(), 0.5 * angle.sin()
        found.append(torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.3) * torch.exp(1j * (number + x + 2 * y)))
    return torch.stack(found)[None]


def disc(size):
    place = (torch.arange(size) - size / 2) / size
    y, x = torch.meshgrid(place, place, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    image = (radius < 0.4).float() + 0.5 * (((x - 0.1) ** 2 + y**2).sqrt() < 0.15)
    return (image * torch.exp(1j * (x + y)))[None]


def test_one_coil_of_sensitivity_one_is_the_single_coil_reconstruction():
    image = disc(32)
    kspace = fft2c(image)
    mask = initial_mask(32, 9)
    one = torch.ones(1, 1, 32, 32, dtype=torch.complex64)
    single = zero_filled(kspace, mask)
    coils = zero_filled(fft2c(expand(image, one)), mask)
    assert float((combine(coils, one) - single).abs().max()) < 1e-5
    assert float((combine(coils) - single.abs()).abs().max()) < 1e-5
    exact = cg_sense(fft2c(expand(image, one)), mask, one, l2=0.0)
    assert float((exact - single).abs().max()) < 1e-5


def test_full_mask_gives_the_image_back_with_given_sensitivities():
    image, coils = disc(32), smooth_coils(4, 32)
    kspace = fft2c(expand(image, coils))
    assert float((combine(ifft2c(kspace), coils) - image).abs().max()) < 1e-5
    full = torch.ones(1, 32, dtype=torch.bool)
    assert float((cg_sense(kspace, full, coils, iterations=40, l2=0.0) - image).abs().max()) < 1e-4


def test_without_sensitivities_the_coils_are_combined_by_their_root_sum_of_squares():
    image, coils = disc(16), smooth_coils(3, 16)
    seen = expand(image, coils)
    assert torch.equal(combine(seen), root_sum_of_squares(seen))
    assert torch.allclose(combine(seen), image.abs() * root_sum_of_squares(coils), atol=1e-5)


def test_pixels_that_no_coil_sees_are_zero_and_finite():
    coils = smooth_coils(2, 8)
    coils[..., :3] = 0
    image = combine(expand(disc(8), coils), coils)
    assert torch.isfinite(torch.view_as_real(image)).all()
    assert (image[..., :3] == 0).all()


def test_sensitivities_from_centre_lines_have_the_true_relations_of_the_coils():
    image, coils = disc(48), smooth_coils(4, 48)
    found = estimate_sensitivities(fft2c(expand(image, coils)), 16)
    inside = image.abs()[0] > 0
    total = found.abs().square().sum(dim=1)[0]
    assert torch.allclose(total[inside], torch.ones_like(total[inside]), atol=1e-4)
    # Up to a common phase and scale: compare the products of pairs of coils, away from the edge.
    middle = (slice(None), slice(16, 32), slice(16, 32))
    true = coils / root_sum_of_squares(coils).unsqueeze(1)
    for first, second in ((0, 1), (1, 3), (2, 0)):
        ours = (found[:, first] * found[:, second].conj())[middle]
        theirs = (true[:, first] * true[:, second].conj())[middle]
        assert float((ours - theirs).abs().max()) < 0.03


def test_sensitivities_read_the_centre_block_alone():
    kspace = fft2c(expand(disc(32), smooth_coils(3, 32)))
    outside = kspace.clone()
    outside[..., :11] = 99.0
    outside[..., 20:] = -7.0
    assert torch.equal(estimate_sensitivities(kspace, 8), estimate_sensitivities(outside, 8))


def test_estimated_sensitivities_recover_the_image_from_all_columns():
    image, coils = disc(48), smooth_coils(4, 48)
    kspace = fft2c(expand(image, coils))
    found = combine(ifft2c(kspace), estimate_sensitivities(kspace, 16))
    expected = image.abs() * root_sum_of_squares(coils)
    assert float(nmse(found.abs(), expected)) < 2e-3


@pytest.mark.parametrize("factor", [2, 3])
def test_sense_unfolds_what_zero_filling_leaves_folded(factor):
    image, coils = disc(48), smooth_coils(6, 48)
    kspace = fft2c(expand(image, coils))
    mask = torch.zeros(1, 48, dtype=torch.bool)
    mask[:, ::factor] = True
    folded = combine(zero_filled(kspace, mask), coils)
    unfolded = cg_sense(kspace, mask, coils, iterations=10, l2=1e-3)
    assert float(nmse(folded, image)) > 0.2
    assert float(nmse(unfolded, image)) < 0.02
    assert float(nmse(unfolded, image)) < 0.1 * float(nmse(folded, image))


def test_sense_solves_its_normal_equations():
    """On a tiny problem the matrix is built and solved directly."""
    size, l2 = 4, 0.05
    coils = torch.randn(1, 2, size, size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, True]])
    kspace = torch.randn(1, 2, size, size, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    unit = torch.eye(size * size, dtype=torch.complex64).view(-1, size, size)
    forward = (fft2c(expand(unit, coils)) * mask.view(1, 1, 1, -1)).flatten(1).T
    data = (kspace * mask.view(1, 1, 1, -1)).flatten()
    matrix = forward.mH @ forward + l2 * torch.eye(size * size)
    expected = torch.linalg.solve(matrix, forward.mH @ data).view(1, size, size)
    found = cg_sense(kspace, mask, coils, iterations=40, l2=l2)
    assert torch.allclose(found, expected, atol=1e-4)


def test_each_item_is_solved_alone():
    coils = smooth_coils(4, 24)
    images = torch.cat([disc(24), 5.0 * disc(24).flip(2), torch.zeros(1, 24, 24)])
    kspace = fft2c(expand(images, coils.expand(3, -1, -1, -1)))
    mask = initial_mask(24, 12, batch=3)
    together = cg_sense(kspace, mask, coils.expand(3, -1, -1, -1))
    for item in range(3):
        alone = cg_sense(kspace[item : item + 1], mask[:1], coils)
        assert torch.allclose(together[item : item + 1], alone, atol=1e-5)
    assert (together[2] == 0).all()


def test_volumes_are_combined_and_solved_like_slices():
    volume = torch.stack([disc(12)[0], disc(12)[0].flip(0)])[None]
    coils = smooth_coils(3, 12).unsqueeze(2).expand(-1, -1, 2, -1, -1)
    kspace = fft3c(expand(volume, coils))
    full = torch.ones(1, 12, dtype=torch.bool)
    found = combine(zero_filled(kspace, full, volume=True), coils)
    assert float((found - volume).abs().max()) < 1e-5
    solved = cg_sense(kspace, full, coils, iterations=30, l2=0.0, volume=True)
    assert float((solved - volume).abs().max()) < 1e-3
    assert estimate_sensitivities(kspace, 6, volume=True).shape == kspace.shape
