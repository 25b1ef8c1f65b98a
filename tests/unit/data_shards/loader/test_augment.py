from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data_shards.loader.augment import augment
from data_shards.loader.augment_config import AugmentConfig

NOTHING = AugmentConfig(hflip=0, vflip=0, translate=0, scale=0, rotate=0, brightness=0, contrast=0, erase=0)
ALL = AugmentConfig(
    hflip=0.5, vflip=0.5, rot90=True, rotate=30, erase=0.5, pad_crop=2, saturation=0.3, hue=20, augmix=0.5
)  # fmt: skip


def only(**changes) -> AugmentConfig:
    return NOTHING.model_copy(update=changes)


def noise_BCHW(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (16, 3, 24, 24), generator=torch.Generator().manual_seed(1))


def augmented(images: torch.Tensor, config: AugmentConfig, seed: int = 0, first: int = 0) -> torch.Tensor:
    return augment(images, config, seed=seed, epoch=3, sample=np.arange(first, first + len(images)))


def test_with_everything_off_the_images_stay_as_they_are():
    images = noise_BCHW()
    assert torch.equal(augmented(images, NOTHING), images)


def test_an_address_gives_the_same_images_and_another_others():
    images = noise_BCHW()
    first, again, other = (augmented(images, ALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (5, 3, 20, 33)], ids=str)
def test_shape_and_range_are_kept_and_every_image_changes(shape):
    images = noise_BCHW(*shape)
    found = augmented(images, ALL)
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - images).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize(("change", "axis"), [("hflip", 3), ("vflip", 2)])
def test_a_certain_flip_is_the_exact_mirror_image(change, axis):
    images = noise_BCHW(4, 3, 20, 33)
    assert_close(augmented(images, only(**{change: 1.0})), images.flip(axis), rtol=0, atol=1e-5)


def test_an_even_chance_flips_about_half():
    images = noise_BCHW(400, 1, 8, 8)
    unchanged = (augmented(images, only(hflip=0.5)) - images).abs().amax((1, 2, 3)) < 1e-4
    assert 160 < unchanged.sum() < 240


def test_quarter_turns_are_exact_and_each_comes():
    images = noise_BCHW(64, 1, 16, 16)
    found = augmented(images, only(rot90=True))
    errors = torch.stack([(found - torch.rot90(images, turn, (2, 3))).abs().amax((1, 2, 3)) for turn in range(4)])
    assert (errors.min(0).values < 1e-4).all()
    assert set(errors.argmin(0).tolist()) == {0, 1, 2, 3}


def centre_of_mass(images_B1HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mass = images_B1HW.sum((1, 2, 3))
    y, x = (torch.arange(n, dtype=torch.float32) for n in images_B1HW.shape[-2:])
    return (images_B1HW.sum((1, 3)) * y).sum(1) / mass, (images_B1HW.sum((1, 2)) * x).sum(1) / mass


def bar_B1HW(num: int = 200, height: int = 40, width: int = 60) -> torch.Tensor:
    images = torch.zeros(num, 1, height, width)
    images[:, :, 19:21, 24:36] = 1
    return images


def test_a_shift_moves_both_ways_up_to_the_given_fraction():
    y, x = centre_of_mass(augmented(bar_B1HW(), only(translate=0.1)))
    for found, centre, most in ((y, 19.5, 4), (x, 29.5, 6)):
        assert -most - 0.1 <= (found - centre).min() < -0.8 * most
        assert 0.8 * most < (found - centre).max() <= most + 0.1


def test_a_turn_keeps_place_and_area_in_non_square_images():
    images = bar_B1HW()
    found = augmented(images, only(rotate=90))
    y, x = centre_of_mass(found)
    assert_close(y, torch.full_like(y, 19.5), rtol=0, atol=0.2)
    assert_close(x, torch.full_like(x, 29.5), rtol=0, atol=0.2)
    assert_close(found.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=0.1, atol=0)


def test_a_zoom_scales_areas_up_to_the_square_of_the_factor():
    images = bar_B1HW()
    ratio = augmented(images, only(scale=0.25)).sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 1 / 1.25**2 - 0.08 < ratio.min() < 0.75
    assert 1.35 < ratio.max() < 1.25**2 + 0.08


def test_brightness_shifts_and_contrast_stretches_about_the_mean():
    images = 0.4 + 0.2 * noise_BCHW(100, 1, 16, 16)
    bright = augmented(images, only(brightness=0.1))
    shift = (bright - images).mean((1, 2, 3))
    assert_close(bright - images, shift[:, None, None, None].expand_as(images), rtol=0, atol=1e-6)
    assert -0.1 <= shift.min() < -0.08
    assert 0.08 < shift.max() <= 0.1
    stretched = augmented(images, only(contrast=0.5))
    assert_close(stretched.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=1e-5)
    factor = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 1 / 1.51 < factor.min() < 0.75
    assert 1.35 < factor.max() < 1.51


def test_a_certain_erasure_paints_one_rectangle_with_the_mean():
    images = noise_BCHW(50, 3, 40, 40)
    found = augmented(images, only(erase=1.0))
    share = (found != images).all(1).float().mean((1, 2))
    assert (share > 0.03).all()
    assert (share < 0.18).all()
    assert_close(found[0][found[0] != images[0]].unique(), images[0].mean()[None], rtol=0, atol=1e-6)


def test_switching_one_change_off_leaves_the_others_as_they_were():
    images = noise_BCHW()
    both = augmented(images, only(hflip=0.5, translate=0.2, brightness=0.0))
    with_light = augmented(images, only(hflip=0.5, translate=0.2, brightness=1e-6))
    assert_close(both, with_light, rtol=0, atol=1e-5)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"torch\.uint8.*floats"):
        augmented(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ALL)


def test_augmentation_does_not_depend_on_the_batch():
    images = noise_BCHW(12, 3, 20, 24)
    together = augmented(images, ALL)
    apart = torch.cat([augmented(images[n : n + 3], ALL, first=n) for n in range(0, 12, 3)])
    assert_close(apart, together, rtol=0, atol=1e-6)
    assert not torch.equal(augmented(images, ALL, first=1), together)


@pytest.mark.parametrize("padding", ["reflection", "zeros"])
def test_a_crop_of_the_padded_image_moves_whole_pixels(padding):
    images = noise_BCHW(200, 1, 8, 10)
    found = augmented(images, only(pad_crop=2, padding=padding))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), "constant" if padding == "zeros" else "replicate")
    if padding == "reflection":
        padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), "symmetric"))
    crops = torch.stack([padded[:, :, y : y + 8, x : x + 10] for y in range(5) for x in range(5)])
    errors = (crops - found).abs().amax((2, 3, 4))
    assert errors.amin(0).max() < 1e-4
    assert set(errors.argmin(0).tolist()) == set(range(25))


def test_colors_turn_and_stretch_while_grays_and_brightness_stay():
    images = 0.3 + 0.4 * noise_BCHW(100, 3, 6, 6)
    luma = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    for change in ({"hue": 40.0}, {"saturation": 0.5}):
        found = augmented(images, only(**change))
        inside = ((found > 0) & (found < 1)).all(1)
        assert inside.float().mean() > 0.8
        assert (((found - images) * luma).sum(1).abs()[inside] < 2e-4).all()
        assert ((found - images).abs().amax((1, 2, 3)) > 1e-3).float().mean() > 0.95
        assert_close(
            augmented(images[:, :1].expand(-1, 3, -1, -1), only(**change)), images[:, :1].expand(-1, 3, -1, -1)
        )
        assert torch.equal(augmented(images[:, :1], only(**change)), images[:, :1])
    spread = (augmented(images, only(saturation=0.5)) - images.mean(1, keepdim=True)).std((1, 2, 3))
    ratio = spread / (images - images.mean(1, keepdim=True)).std((1, 2, 3))
    assert ratio.min() < 0.75
    assert ratio.max() > 1.3


def test_augmix_is_nothing_at_severity_0_and_grows_with_it():
    images = noise_BCHW(60, 3, 16, 16)
    low, high = ((augmented(images, only(augmix=s)) - images).abs().mean((1, 2, 3)) for s in (0.05, 1.0))
    assert torch.equal(augmented(images, only(augmix=0.0)), images)
    assert low.median() < high.median() / 2
    assert high.max() > 0.1


@pytest.mark.gpu
def test_a_gpu_draws_the_same_changes_as_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    images = noise_BCHW()
    on_gpu = augmented(images.cuda(), ALL).cpu()
    assert_close(on_gpu, augmented(images, ALL), rtol=0, atol=1e-4)
