from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from data_shards.augment import augment
from data_shards.augment_config import AugmentConfig

NOTHING = AugmentConfig(hflip=0, vflip=0, translate=0, scale=0, rotate=0, brightness=0, contrast=0, erase=0)
ALL = AugmentConfig(hflip=0.5, vflip=0.5, rot90=True, rotate=30, erase=0.5)


def only(**changes) -> AugmentConfig:
    return NOTHING.model_copy(update=changes)


def noise_BCHW(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (16, 3, 24, 24), generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_with_everything_off_the_images_stay_as_they_are():
    images = noise_BCHW()
    assert torch.equal(augment(images, NOTHING, seeded()), images)


def test_the_same_generator_state_gives_the_same_images_and_another_gives_others():
    images = noise_BCHW()
    first, again, other = (augment(images, ALL, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (5, 3, 20, 33)], ids=str)
def test_shape_and_range_are_kept_and_every_image_changes(shape):
    images = noise_BCHW(*shape)
    found = augment(images, ALL, seeded())
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - images).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize(("change", "axis"), [("hflip", 3), ("vflip", 2)])
def test_a_certain_flip_is_the_exact_mirror_image(change, axis):
    images = noise_BCHW(4, 3, 20, 33)
    assert_close(augment(images, only(**{change: 1.0}), seeded()), images.flip(axis), rtol=0, atol=1e-5)


def test_an_even_chance_flips_about_half():
    images = noise_BCHW(400, 1, 8, 8)
    unchanged = (augment(images, only(hflip=0.5), seeded()) - images).abs().amax((1, 2, 3)) < 1e-4
    assert 160 < unchanged.sum() < 240


def test_quarter_turns_are_exact_and_each_comes():
    images = noise_BCHW(64, 1, 16, 16)
    found = augment(images, only(rot90=True), seeded())
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
    y, x = centre_of_mass(augment(bar_B1HW(), only(translate=0.1), seeded()))
    for found, centre, most in ((y, 19.5, 4), (x, 29.5, 6)):
        assert -most - 0.1 <= (found - centre).min() < -0.8 * most
        assert 0.8 * most < (found - centre).max() <= most + 0.1


def test_a_turn_keeps_place_and_area_also_where_the_image_is_not_square():
    images = bar_B1HW()
    found = augment(images, only(rotate=90), seeded())
    y, x = centre_of_mass(found)
    assert_close(y, torch.full_like(y, 19.5), rtol=0, atol=0.2)
    assert_close(x, torch.full_like(x, 29.5), rtol=0, atol=0.2)
    assert_close(found.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=0.1, atol=0)


def test_a_zoom_scales_areas_up_to_the_square_of_the_factor():
    images = bar_B1HW()
    ratio = augment(images, only(scale=0.25), seeded()).sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 1 / 1.25**2 - 0.08 < ratio.min() < 0.75
    assert 1.35 < ratio.max() < 1.25**2 + 0.08


def test_brightness_shifts_and_contrast_stretches_about_the_mean():
    images = 0.4 + 0.2 * noise_BCHW(100, 1, 16, 16)
    bright = augment(images, only(brightness=0.1), seeded())
    shift = (bright - images).mean((1, 2, 3))
    assert_close(bright - images, shift[:, None, None, None].expand_as(images), rtol=0, atol=1e-6)
    assert -0.1 <= shift.min() < -0.08
    assert 0.08 < shift.max() <= 0.1
    stretched = augment(images, only(contrast=0.5), seeded())
    assert_close(stretched.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=1e-5)
    factor = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 1 / 1.51 < factor.min() < 0.75
    assert 1.35 < factor.max() < 1.51


def test_a_certain_erasure_paints_one_rectangle_with_the_mean():
    images = noise_BCHW(50, 3, 40, 40)
    found = augment(images, only(erase=1.0), seeded())
    share = (found != images).all(1).float().mean((1, 2))
    assert (share > 0.03).all()
    assert (share < 0.18).all()
    assert_close(found[0][found[0] != images[0]].unique(), images[0].mean()[None], rtol=0, atol=1e-6)


def test_switching_one_change_off_leaves_the_others_as_they_were():
    images = noise_BCHW()
    both = augment(images, only(hflip=0.5, translate=0.2, brightness=0.0), seeded())
    with_light = augment(images, only(hflip=0.5, translate=0.2, brightness=1e-6), seeded())
    assert_close(both, with_light, rtol=0, atol=1e-5)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"torch\.uint8.*floats"):
        augment(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ALL, seeded())


@pytest.mark.gpu
def test_a_gpu_draws_the_same_changes_as_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    images = noise_BCHW()
    on_gpu = augment(images.cuda(), ALL, seeded()).cpu()
    assert_close(on_gpu, augment(images, ALL, seeded()), rtol=0, atol=1e-4)
