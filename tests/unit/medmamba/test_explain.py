"""Maps: where the evidence was planted, what the formula says, and others when the weights are random."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.explain import MOST_AGREEMENT, finest_block, grad_cam, occlusion, randomized, sanity_check
from medmamba.model import build_model
from medmamba.preprocess import preprocess

SIDE = 64
CONFIGS = {
    "medmamba": MedMambaConfig(num_classes=2, dims=(12, 24, 48), depths=(1, 1, 1)),
    "convnet": ConvNetConfig(num_classes=2, widths=(12, 24, 48)),
}
METHODS = {
    "conv": functools.partial(grad_cam, branch="conv"),
    "conv, one block earlier": functools.partial(grad_cam, branch="conv", block=-2),
    "scan": functools.partial(grad_cam, branch="scan"),
    "scan, one block earlier": functools.partial(grad_cam, branch="scan", block=-2),
    "occlusion": functools.partial(occlusion, patch=16),
}
CASES = [(name, method) for name in CONFIGS for method in METHODS if name == "medmamba" or "scan" not in method]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """All tests of this file."""


def noise_with_blob(number: int, seed: int, *, corner: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Gray images, and whether each has a bright square: half of them, anywhere; or all of them, near one corner."""
    draw = np.random.default_rng(seed)
    pixels = draw.normal(110, 35, (number, SIDE, SIDE, 1))
    labels = draw.integers(0, 2, number) if corner is None else np.ones(number, int)
    for image, label in zip(pixels, labels, strict=True):
        top, left = draw.integers(0, SIDE - 12, 2) if corner is None else draw.integers(corner, corner + 6, 2)
        image[top : top + 12, left : left + 12] += 70 * label
    return pixels.clip(0, 255).astype(np.uint8), labels


@functools.cache
def trained(name: str) -> torch.nn.Module:
    """A network that tells whether there is a bright square in the noise."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name]).train()
    images, labels = noise_with_blob(400, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=4 * 12)
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(len(images))[: 12 * 32].reshape(12, 32)
        for chosen in order:
            scores = model(preprocess(torch.from_numpy(images[chosen])))
            optimizer.zero_grad()
            cross_entropy(scores, torch.from_numpy(labels[chosen])).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.cache
def fresh(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trained_network_has_learned_its_task(name):
    model, (images, labels) = trained(name), noise_with_blob(100, 1)
    with torch.inference_mode():
        assert (model(preprocess(torch.from_numpy(images))).argmax(1).numpy() == labels).mean() > 0.9


@pytest.mark.parametrize("corner", [2, 44], ids=["top left", "bottom right"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_map_lies_in_the_corner_where_the_evidence_is(name, method, corner):
    images, _ = noise_with_blob(6, 5, corner=corner)
    half = slice(0, SIDE // 2) if corner < SIDE // 2 else slice(SIDE // 2, SIDE)
    maps = [METHODS[method](trained(name), image[None], 1) for image in images]
    shares = [found[half, half].sum() / found.sum() for found in maps]
    assert np.mean(shares) > 0.5  # a map that knows nothing has a quarter there
    for found in maps:
        assert (found.shape, found.dtype, found.min() >= 0, found.max()) == ((SIDE, SIDE), np.float32, True, 1)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_map_is_another_one_once_the_weights_are_random(name, method):
    images, labels = noise_with_blob(24, 1)
    shown = images[labels == 1][:6]
    check = sanity_check(trained(name), shown, [1] * len(shown), METHODS[method])
    assert check.passed
    assert check.layers[0] == "head"
    assert check.layers[-1] == ("patch_embed" if name == "medmamba" else "stem")
    assert all(-1 <= each <= 1 for each in check.agreement)


def test_a_map_independent_of_the_network_fails_the_check():
    def edges(_model, image_1HWC, _target):
        down, right = np.gradient(image_1HWC[0, ..., 0].astype(float))
        return np.hypot(down, right)

    images, _ = noise_with_blob(2, 1)
    check = sanity_check(fresh("medmamba"), images, [1, 1], edges)
    assert check.agreement == pytest.approx([1.0] * 5)
    assert not check.passed
    assert MOST_AGREEMENT < 1


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_become_random_from_the_head_on(name):
    model = fresh(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed_at_step = []
    for layer, changed in randomized(model, seed=1):
        state = changed.state_dict()
        changed_at_step.append({key.split(".")[0] for key in before if not torch.equal(state[key], before[key])})
        assert any(key.startswith(layer) and not torch.equal(state[key], before[key]) for key in before) or (
            layer == "norm"  # a fresh BatchNorm is as fresh as the one before
        )
    assert all(a <= b for a, b in itertools.pairwise(changed_at_step))
    assert changed_at_step[0] == {"head"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("branch", "first"), [("conv", 0), ("scan", 1)])
def test_the_last_map_is_the_channels_weighted_by_the_head(branch, first):
    model = fresh("medmamba")
    block = model.layers[-1].blocks[-1]
    image = noise_with_blob(1, 2)[0]
    kept = []
    site = block.conv33conv33conv11 if branch == "conv" else block.self_attention
    hook = site.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        model(preprocess(torch.from_numpy(image)))
        hook.remove()
        active_CL = kept[0][0].flatten(1) if branch == "conv" else kept[0][0].T
        weights_KC = model.head.weight[:, first::2]  # the shuffle puts conv at even channels, scan at odd ones
        maps_khw = (weights_KC @ active_CL).relu().reshape(1, 2, 4, 4)
        wanted_KHW = torch.nn.functional.interpolate(maps_khw, (SIDE, SIDE), mode="bilinear")[0]
    assert wanted_KHW.max() > 0
    for target, wanted in enumerate(wanted_KHW):
        expected = wanted / wanted.max() if wanted.max() > 0 else wanted
        np.testing.assert_allclose(grad_cam(model, image, target, branch), expected.numpy(), atol=1e-5)


def test_occlusion_finds_the_patch_that_a_network_looks_at():
    class Corner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 2)
            self.head.weight.data = torch.tensor([[0.0], [1.0]])

        def forward(self, images_B3HW):
            return self.head(images_B3HW[:, :1, 8:16, 40:48].mean((2, 3)))

    image = np.full((1, 48, 64, 3), 20, np.uint8)
    image[:, 8:16, 40:48] = 250
    found = occlusion(Corner().eval(), image, 1, patch=8)
    assert found[8:16, 40:48].min() > 0.2
    assert found[10:14, 42:46].mean() > 0.9
    found[4:20, 36:52] = 0
    assert found.max() == 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_batches_of_occlusion_change_nothing(task):
    image = noise_with_blob(1, 2)[0]
    maps = [occlusion(fresh("convnet"), image, 0, patch=20, batch_size=size, task=task) for size in (1, 7, 100)]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4)
    np.testing.assert_allclose(maps[0], maps[2], atol=1e-4)


def test_images_that_are_not_square_have_maps_of_their_own_size():
    image = np.random.default_rng(0).integers(0, 255, (1, 70, 41, 3), dtype=np.uint8)
    for name, branch in (("medmamba", "conv"), ("medmamba", "scan"), ("convnet", "conv")):
        for block in (0, 1, 2):
            assert grad_cam(fresh(name), image, 0, branch, block=block).shape == (70, 41)
    assert occlusion(fresh("convnet"), image, 0, patch=30).shape == (70, 41)


def test_the_finest_block_is_the_last_one_with_enough_positions():
    nano = build_model(MedMambaConfig(num_classes=2))
    assert [finest_block(nano, (side, side)) for side in (224, 112, 64, 32)] == [3, 2, 1, 0]
    assert finest_block(nano, (224, 64)) == 1
    assert finest_block(fresh("convnet"), (64, 64), least=4) == 2


def test_a_map_leaves_no_gradient_and_no_hook_behind():
    model = fresh("medmamba")
    grad_cam(model, noise_with_blob(1, 2)[0], 0, "scan")
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert grad_cam(model, noise_with_blob(1, 2)[0], 0, "scan").max() == 1
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda image: grad_cam(fresh("convnet"), image, 0, "scan"), "branch 'scan'"),
        (lambda image: grad_cam(fresh("convnet"), image, 2), "class 2 does not exist"),
        (lambda image: grad_cam(fresh("convnet"), image, 0, block=3), "block 3 does not exist: the network has 3"),
        (lambda image: grad_cam(fresh("convnet"), image[0], 0), "one at a time"),
        (lambda image: grad_cam(build_model(CONFIGS["convnet"]), image, 0), "call model.eval"),
        (lambda image: occlusion(fresh("convnet"), image, -1), "class -1 does not exist"),
        (lambda image: grad_cam(torch.nn.Flatten(), image, 0), "a Flatten has no blocks"),
        (lambda image: sanity_check(fresh("convnet"), image[:0], [], grad_cam), "0 images"),
    ],
)
def test_what_cannot_be_explained_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(noise_with_blob(1, 2)[0])
