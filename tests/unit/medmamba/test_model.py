"""The network: published sizes, shapes, every parameter trained, drop-path, ablations."""

import pytest
import torch
from pydantic import ValidationError

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.model import MIN_SIDE, SS2D, PatchMerging, build_model, draw_kept
from medmamba.ops.ss2d_scan import backends, resolve_backend

TINY = MedMambaConfig(dims=(8, 16), depths=(1, 2), num_classes=3)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "num_classes", "expected"),
    [
        ("T", 6, 14_457_222),
        ("T", 1000, 15_221_608),
        ("S", 6, 18_625_158),
        ("S", 1000, 19_389_544),
        ("B", 6, 39_864_838),
        ("B", 1000, 40_883_688),
        ("nano", 2, 496_502),
    ],
)
def test_a_variant_has_the_published_number_of_parameters(variant, num_classes, expected):
    with torch.device("meta"):
        model = build_model(MedMambaConfig(variant=variant, num_classes=num_classes), device="meta")
    assert num_parameters(model) == expected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 33), (57, 57), (40, 33), (64, 36)])
def test_any_size_from_32_on_gives_scores_and_gradients(height, width):
    torch.manual_seed(0)
    model = build_model(MedMambaConfig(num_classes=2))
    scores = model(torch.randn(2, 3, height, width))
    assert scores.shape == (2, 2)
    scores.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "shape", [(1, 3, 31, 64), (1, 3, 64, 31), (1, 1, 64, 64), (3, 64, 64)], ids=lambda s: "x".join(map(str, s))
)
def test_too_small_or_not_rgb_images_are_refused_with_the_rule(shape):
    with pytest.raises(ValueError, match=f"H and W >= {MIN_SIDE}"):
        build_model(MedMambaConfig(num_classes=2))(torch.zeros(shape))


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.model_copy(update={"branches": "conv"}),
        TINY.model_copy(update={"branches": "scan"}),
        ConvNetConfig(num_classes=3, widths=(8, 16)),
    ],
    ids=["both", "conv", "scan", "convnet"],
)
def test_every_parameter_gets_a_gradient(config):
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize(("branches", "kept"), [("conv", slice(1, None, 2)), ("scan", slice(0, None, 2))])
def test_the_branch_left_out_passes_its_half_on_unchanged(branches, kept):
    block = build_model(TINY.model_copy(update={"branches": branches})).layers[0].blocks[0].eval()
    x = torch.randn(2, 16, 8)
    half = x[..., 4:] if branches == "conv" else x[..., :4]
    assert torch.equal((block(x, (4, 4)) - x)[..., kept], (half + x[..., kept]) - x[..., kept])


def scanned_one_sequence_at_a_time(branch, x_BHWC):
    """SS2D as upstream lays it out, in float64: four copies of the sequence, each with its own x_proj, then merged."""
    batch, height, width, _ = x_BHWC.shape
    x, z = branch.in_proj(x_BHWC).chunk(2, dim=-1)
    x = torch.nn.functional.silu(branch.conv2d(x.permute(0, 3, 1, 2)))
    inner, (rank, states, _) = x.shape[1], branch.split
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    merged = torch.zeros(batch, inner, height, width, dtype=x.dtype)
    for k, sequence in enumerate((rows, columns, rows.flip(-1), columns.flip(-1))):
        dt, b, c = (branch.x_proj_weight[k] @ sequence).split((rank, states, states), dim=1)
        delta = torch.log1p((branch.dt_projs_weight[k] @ dt + branch.dt_projs_bias[k][:, None]).exp())
        decay = -branch.A_logs.view(4, inner, states)[k].exp()
        h, outputs = torch.zeros(batch, inner, states, dtype=x.dtype), []
        for step in range(height * width):
            fed = (delta * sequence)[..., step, None] * b[:, None, :, step]
            h = (delta[..., step, None] * decay).exp() * h + fed
            outputs.append((h * c[:, None, :, step]).sum(-1) + branch.Ds.view(4, inner)[k] * sequence[..., step])
        y = torch.stack(outputs, -1)
        y = y.flip(-1) if k >= 2 else y
        merged += y.view(batch, inner, width, height).mT if k % 2 else y.view(batch, inner, height, width)
    return branch.out_proj(branch.out_norm(merged.permute(0, 2, 3, 1)) * torch.nn.functional.silu(z))


@torch.no_grad()
@pytest.mark.parametrize("backend", [name for name, why_not in backends("cpu").items() if why_not is None])
def test_the_scan_branch_equals_four_scans_of_copied_sequences(backend):
    torch.manual_seed(0)
    branch = SS2D(8, 4, backend)
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 5, 8)
    y = branch(x.flatten(1, 2), (3, 5)).unflatten(1, (3, 5))
    expected = scanned_one_sequence_at_a_time(branch.double(), x.double())
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_patch_merging_goes_by_column_and_drops_an_odd_row():
    merging = PatchMerging(1).eval()
    merging.norm = torch.nn.Identity()
    torch.nn.init.eye_(merging.reduction.weight)
    pixels = torch.arange(12.0).view(1, 12, 1)  # 3 rows of 4: the first cell holds 0 1 above 4 5
    assert merging(pixels, (3, 4))[0].tolist() == [[0, 4], [2, 6]]


def test_drop_path_grows_linearly_to_the_configured_value():
    model = build_model(MedMambaConfig(dims=(8, 16, 32), depths=(1, 2, 2), num_classes=2, drop_path=0.2))
    chances = [block.drop_path for layer in model.layers for block in layer.blocks]
    assert chances == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    images = torch.ones(4000, 4, 3)
    dropped = (images * draw_kept(images, 0.25)).flatten(1)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped.amin(1), dropped.amax(1))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


def test_evaluation_is_deterministic_and_training_drops_paths():
    torch.manual_seed(0)
    model, x = build_model(TINY.model_copy(update={"drop_path": 0.9})), torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_the_initialisation_is_upstreams():
    torch.manual_seed(0)
    model = build_model(MedMambaConfig(variant="nano", num_classes=4))
    block = model.layers[3].blocks[0]
    scan = block.self_attention
    assert scan.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert scan.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.bias.abs().max() == 0
    assert scan.conv2d.weight.std().item() == pytest.approx((2 / (9 * 192)) ** 0.5, rel=0.1)
    assert block.conv33conv33conv11[1].weight.std().item() == pytest.approx((2 / (9 * 96)) ** 0.5, rel=0.05)
    assert block.conv33conv33conv11[1].bias.abs().max() > 0
    assert scan.x_proj_weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    assert scan.dt_projs_weight.abs().max().item() == pytest.approx(6**-0.5, rel=0.01)
    assert torch.equal(scan.A_logs[7], torch.arange(1.0, 17.0).log())
    assert (scan.Ds == 1).all()
    dt = torch.nn.functional.softplus(scan.dt_projs_bias.double())
    assert 0.9e-3 < dt.min() < 2e-3
    assert 0.08 < dt.max() < 0.101


def test_the_model_says_which_scan_backend_it_runs_on():
    assert build_model(TINY, scan="reference").scan_backend == "reference"
    assert build_model(TINY).scan_backend == resolve_backend("auto", "cpu") != "reference"
    assert build_model(ConvNetConfig(num_classes=2)).scan_backend == "none"
    with pytest.raises(ValueError, match="unknown scan backend 'cuda-magic'; available: auto"):
        build_model(TINY, scan="cuda-magic")


def test_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes is 0"):
        build_model(MedMambaConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": (8, 16)}, "must have the same length"),
        ({"dims": (7, 14), "depths": (1, 1)}, "make the first number even"),
        ({"dims": (8, 24), "depths": (1, 1)}, "make each twice the one before"),
        ({"drop_path": 1.0}, "less than 1"),
        ({"layers": 3}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_network_is_refused_with_the_rule(fields, message):
    with pytest.raises(ValidationError, match=message):
        MedMambaConfig(**fields)


@pytest.mark.parametrize("variant", ["T", "nano"])
def test_the_sizes_of_the_scans_are_those_of_the_network(variant):
    config = MedMambaConfig(variant=variant, num_classes=2)
    scans = [module for module in build_model(config).modules() if isinstance(module, SS2D)]
    found = [(scan.dt_projs_bias.shape[1], scan.dt_projs_weight.shape[2], scan.A_logs.shape[1]) for scan in scans]
    assert tuple(dict.fromkeys(found)) == config.scan_sizes
