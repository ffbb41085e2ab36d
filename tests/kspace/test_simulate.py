import math

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.core.phantoms.cardiac import Anatomy, draw
from medrl.plugins.kspace.fourier import fft2c, ifft2c, zero_filled
from medrl.plugins.kspace.masks import (
    apply_order,
    equispaced_columns,
    initial_mask,
    low_to_high_order,
    random_order,
)
from medrl.plugins.kspace.quality import nmse
from medrl.plugins.kspace.simulate import (
    Simulation,
    caveats,
    shifted,
    simulate,
    simulate_scan,
    smooth_phase,
)

PLAIN = Simulation(phase="none")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape):
    return torch.rand(*shape, generator=generator(9))


def mirrored(kspace):
    """k[-u, -v] beside k[u, v]."""
    turned = kspace.flip((-2, -1))
    return torch.roll(turned, [1 - kspace.shape[-2] % 2, 1 - kspace.shape[-1] % 2], dims=(-2, -1))


def column_energy(kspace):
    return kspace.abs().square().sum(dim=-2)


@pytest.fixture
def canonical():
    return torch.from_numpy(draw(Anatomy())[0])[None]


def nmse_of(kspace, mask):
    return float(nmse(zero_filled(kspace, mask), ifft2c(kspace)))


def test_canonical_phantom_has_the_energy_of_the_specification_in_its_columns(canonical):
    energy = column_energy(simulate(canonical, PLAIN, generator()))[0]
    for count, share in ((4, 0.8106), (8, 0.8778), (16, 0.9495)):
        first = (64 - count + 1) // 2
        found = float(energy[first : first + count].sum() / energy.sum())
        assert found == pytest.approx(share, abs=5e-5)


def test_canonical_phantom_errors_of_the_fixed_orders_at_sixteen_lines(canonical):
    kspace = simulate(canonical, PLAIN, generator())
    mask = initial_mask(64, 4)
    outwards = apply_order(mask, low_to_high_order(~mask, 4), 12)
    assert nmse_of(kspace, outwards) == pytest.approx(0.0505, abs=5e-5)
    spread = apply_order(mask, equispaced_columns(~mask, 12), 12)
    assert nmse_of(kspace, spread) == pytest.approx(0.136, abs=5e-4)
    energy = column_energy(kspace).masked_fill(mask, -1.0)
    best = apply_order(mask, energy.argsort(dim=1, descending=True), 12)
    assert int(best.sum()) == 16
    assert nmse_of(kspace, best) == pytest.approx(0.0463, abs=5e-5)


def test_canonical_phantom_errors_of_random_columns_at_sixteen_lines(canonical):
    kspace = simulate(canonical, PLAIN, generator()).expand(2000, -1, -1)
    mask = initial_mask(64, 4, batch=2000)
    chosen = apply_order(mask, random_order(~mask, generator()), 12)
    energy = column_energy(kspace[:1])
    errors = 1.0 - (energy * chosen).sum(dim=1) / energy.sum()
    # In the mean 48 of the 60 other columns are missing, and so is that share of their energy, .1515.
    expected = float((1.0 - energy[:, 30:34].sum() / energy.sum()) * 48 / 60)
    assert expected == pytest.approx(0.1515, abs=5e-5)
    assert float(errors.mean()) == pytest.approx(expected, abs=4 * float(errors.std()) / math.sqrt(2000))
    # The specification's .150 is a mean of 50 draws.
    assert abs(expected - 0.150) < 2 * float(errors.std()) / math.sqrt(50)


@pytest.mark.parametrize("phase", ["none", "smooth"])
def test_a_circular_shift_of_the_image_changes_only_phases(phase):
    images = ifft2c(simulate(random_images(2, 20, 24), Simulation(phase=phase), generator()))
    kspace, moved = fft2c(images), fft2c(torch.roll(images, (3, 7), dims=(-2, -1)))
    assert torch.allclose(column_energy(moved), column_energy(kspace), rtol=1e-5, atol=1e-5)
    assert torch.allclose(moved.abs(), kspace.abs(), atol=1e-5)
    assert float((moved - kspace).abs().max()) > 0.1


@pytest.mark.parametrize("shape", [(16, 16), (15, 18), (9, 9)])
def test_without_phase_kspace_is_hermitian_and_with_one_it_is_not(shape):
    images = random_images(3, *shape)
    real = simulate(images, PLAIN, generator())
    assert torch.allclose(mirrored(real).abs(), real.abs(), atol=1e-5)
    phased = simulate(images, Simulation(), generator())
    assert float((mirrored(phased).abs() - phased.abs()).abs().max()) > 0.05


def test_phase_is_smooth_and_no_larger_than_asked_for():
    phase = smooth_phase(200, (32, 32), 1.5, generator())
    largest = phase.abs().flatten(1).amax(dim=1)
    assert 1.4 < float(largest.max()) <= 1.5 + 1e-5
    assert float(largest.min()) >= 0.75 - 1e-5
    # A quadratic polynomial has no third difference.
    third = phase.diff(dim=1).diff(dim=1).diff(dim=1)
    assert float(third.abs().max()) < 1e-4
    assert float(phase.diff(dim=1).abs().max()) > 0.01


def test_phase_leaves_the_magnitude_as_it_is():
    images = random_images(3, 12, 12)
    assert torch.allclose(ifft2c(simulate(images, Simulation(), generator())).abs(), images, atol=1e-5)


def test_noise_has_the_deviation_asked_for_in_both_parts_of_the_image():
    images = torch.zeros(4, 64, 64)
    noisy = ifft2c(simulate(images, Simulation(phase="none", noise_std=0.02), generator()))
    for part in (noisy.real, noisy.imag):
        assert float(part.std()) == pytest.approx(0.02, rel=0.02)


def test_a_displaced_centre_moves_columns_and_leaves_the_magnitude():
    images = random_images(2, 16, 32)
    kspace = fft2c(images)
    moved = fft2c(shifted(images, torch.tensor([3.0, -5.0])))
    assert torch.allclose(moved[0], torch.roll(kspace[0], 3, dims=-1), atol=1e-4)
    assert torch.allclose(moved[1], torch.roll(kspace[1], -5, dims=-1), atol=1e-4)
    assert torch.allclose(ifft2c(moved).abs(), images, atol=1e-5)


def test_displacements_are_drawn_evenly_within_their_range():
    images = random_images(1, 8, 32).expand(400, -1, -1)
    kspace = simulate(images, Simulation(phase="none", shift_k=4.0), generator())
    peaks = column_energy(kspace).argmax(dim=1) - 16
    assert int(peaks.min()) == -4
    assert int(peaks.max()) == 4
    assert abs(float(peaks.double().mean())) < 4 * 8 / math.sqrt(12 * 400)


def scan(images, simulation, **changes):
    settings = {"seed": 1, "case": "p1", "frames": ["ED", "ED", "ES"], "slices": [0, 1, 0], **changes}
    return simulate_scan(images, simulation, **settings)


@pytest.mark.parametrize("scope", ["slice", "scan"])
def test_a_scan_is_the_same_every_time_and_depends_on_its_own_name_alone(scope):
    images = random_images(3, 12, 12)
    simulation = Simulation(noise_std=0.05, shift_k=2.0, scope=scope)
    state = torch.get_rng_state()
    first = scan(images, simulation)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, scan(images, simulation))
    part = simulate_scan(images[1:2], simulation, seed=1, case="p1", frames=["ED"], slices=[1])
    assert torch.equal(part[0], first[1])
    for other in ({"case": "p2"}, {"seed": 2}):
        assert not torch.equal(first, scan(images, simulation, **other))


def test_slices_of_a_scan_share_phase_and_displacement_where_asked_for():
    images = random_images(1, 12, 12).expand(3, -1, -1)
    shared = scan(images, Simulation(scope="scan", shift_k=2.0))
    assert torch.equal(shared[0], shared[1])
    assert not torch.allclose(shared[0], shared[2])
    own = scan(images, Simulation(scope="slice"))
    assert not torch.allclose(own[0], own[1])


def test_a_displacement_of_the_dataset_is_added():
    images = random_images(3, 12, 16)
    plain = scan(images, PLAIN)
    assert torch.allclose(scan(images, PLAIN, shift=2.0), torch.roll(plain, 2, dims=-1), atol=1e-4)


def test_reports_are_told_what_was_simulated():
    assert "same energy" in " ".join(caveats(PLAIN))
    assert "1.5 rad" in " ".join(caveats(Simulation()))
    assert "inverse crime" in caveats(Simulation())[0]
    assert "±4 columns" in " ".join(caveats(Simulation(shift_k=4.0)))
    assert "measured" in caveats(None)[0]


@pytest.mark.parametrize("wrong", [{"phase": "rough"}, {"scope": "all"}, {"noise_std": -1.0}])
def test_unknown_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="simulation"):
        Simulation(**wrong)
