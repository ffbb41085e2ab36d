import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.quality import SsimTarget, nmse, psnr, ssim


def pair(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(*shape, generator=generator, dtype=dtype)
    return (target + 0.1 * torch.randn(*shape, generator=generator, dtype=dtype)), target


@pytest.mark.parametrize("shape", [(16, 16), (9, 20), (7, 7)])
def test_ssim_equals_that_of_scikit_image(shape):
    images, target = pair(3, *shape)
    expected = [
        structural_similarity(x.numpy(), y.numpy(), win_size=7, data_range=float(y.max()))
        for x, y in zip(images, target, strict=True)
    ]
    assert ssim(images, target).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(images.float(), target.float()).tolist() == pytest.approx(expected, abs=2e-5)


def test_ssim_of_a_volume_is_the_mean_of_its_slices_with_the_range_of_the_volume():
    images, target = pair(2, 3, 10, 12)
    target[0, 1] *= 0.2
    for item in range(2):
        expected = np.mean(
            [
                structural_similarity(
                    images[item, z].numpy(), target[item, z].numpy(), win_size=7,
                    data_range=float(target[item].max()),
                )
                for z in range(3)
            ]
        )  # fmt: skip
        assert float(ssim(images, target)[item]) == pytest.approx(expected, abs=1e-10)
    each = ssim(images[0], target[0])
    assert float(each.mean()) != pytest.approx(float(ssim(images, target)[0]), abs=1e-4)


def test_the_data_range_can_be_given():
    images, target = pair(2, 9, 9)
    expected = structural_similarity(images[1].numpy(), target[1].numpy(), win_size=7, data_range=2.0)
    assert float(ssim(images, target, 2.0)[1]) == pytest.approx(expected, abs=1e-10)
    assert float(ssim(images, target, torch.tensor([1.0, 2.0]))[1]) == pytest.approx(expected, abs=1e-10)


def test_equal_images_have_ssim_one_and_no_error():
    _, target = pair(2, 12, 12)
    assert ssim(target, target).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert nmse(target, target).tolist() == [0.0, 0.0]
    assert torch.isposinf(psnr(target, target)).all()
    empty = torch.zeros(1, 8, 8)
    assert ssim(empty, empty).tolist() == [1.0]


def test_error_and_peak_signal_to_noise_of_a_worked_example():
    target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    images = target + torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])
    assert float(nmse(images, target)) == pytest.approx(4 / 30, abs=1e-7)
    assert float(psnr(images, target)) == pytest.approx(10 * np.log10(16 / 1.0), abs=1e-5)
    assert float(psnr(images, target, 1.0)) == pytest.approx(0.0, abs=1e-5)


def test_metrics_of_an_item_do_not_depend_on_the_batch():
    images, target = pair(8, 10, 11)
    for metric in (nmse, psnr, ssim):
        assert float(metric(images[3:4], target[3:4])) == pytest.approx(
            float(metric(images, target)[3]), abs=1e-12
        )


def test_prepared_targets_score_like_ssim_in_any_choice():
    images, target = pair(4, 10, 9)
    prepared = SsimTarget(target)
    assert torch.equal(prepared.score(images), ssim(images, target))
    chosen = torch.tensor([2, 0, 2])
    assert torch.allclose(prepared.select(chosen).score(images[:3]), ssim(images[:3], target[chosen]))
    candidates = torch.stack([images, images.flip(1), target], dim=1)
    each = prepared.score_each(candidates)
    assert each.shape == (4, 3)
    for number in range(3):
        assert torch.allclose(each[:, number], ssim(candidates[:, number], target), atol=1e-12)


def test_gradients_agree_with_finite_differences():
    images, target = pair(2, 8, 8)
    images.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: ssim(x, target), images)
    assert torch.autograd.gradcheck(lambda x: nmse(x, target), images)
    assert torch.autograd.gradcheck(lambda x: psnr(x, target), images)


def test_complex_error_differs_from_that_of_the_magnitude():
    target = torch.ones(1, 4, 4) + 0j
    turned = target * torch.exp(torch.tensor(1j * np.pi / 2))
    assert float(nmse(turned, target)) == pytest.approx(2.0, abs=1e-6)
    assert float(nmse(turned.abs(), target.abs())) == pytest.approx(0.0, abs=1e-12)


def test_ssim_of_images_below_the_window_is_refused():
    with pytest.raises(ConfigError, match="smaller than 7×7"):
        ssim(torch.zeros(1, 6, 9), torch.zeros(1, 6, 9))
