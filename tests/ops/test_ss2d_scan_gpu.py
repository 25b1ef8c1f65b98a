"""The scan on a GPU against its definition in float64 on the same GPU: values, gradients, graphs, the whole network."""

from __future__ import annotations

import pytest
import torch
from test_ss2d_scan import NAMES, inputs, worst
from torch._inductor.utils import run_and_get_code

from medmamba.config import MedMambaConfig
from medmamba.model import SSConvSSM, build_model
from medmamba.ops.ss2d_scan import (
    backends,
    build_ahead,
    cuda,
    mamba_ssm,
    resolve_backend,
    scan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device"),
]
COMPARED = ("cuda", "mamba_ssm")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# (batch, height, width, channels, rank, states): L = 1, 2, 49, 63, 196, 784, 3136; not square; channels and states
# that fill no block and no vector; every stage of the published variants.
SHAPES = [
    (1, 1, 1, 8, 1, 16),
    (2, 1, 2, 24, 1, 16),
    (3, 7, 7, 16, 2, 16),
    (1, 9, 7, 40, 3, 16),
    (2, 5, 3, 13, 2, 7),
    (2, 14, 14, 8, 1, 4),
    (2, 14, 14, 384, 12, 16),
    (2, 28, 28, 192, 6, 16),
    (2, 7, 7, 768, 24, 16),
    (1, 56, 56, 96, 3, 16),
    (2, 20, 31, 128, 4, 16),
    (600, 1, 3, 24, 1, 16),
]


@pytest.fixture(params=COMPARED)
def backend(request):
    if reason := backends("cuda")[request.param]:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def on_gpu(shape, dtype, *, aligned=False, seed=0):
    """The inputs as the network has them: dt, B and C views of one product, whose rows are aligned or not."""
    u, dt, b, c, *parameters = (x.detach() for x in inputs(shape, seed=seed))
    parts = [x.to(dtype) for x in ((b, c, dt) if aligned else (dt, b, c))]
    rows = torch.cat(parts, -1)
    if aligned:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 8))
    sizes = [x.shape[-1] for x in parts]
    cut = rows.cuda()[..., : sum(sizes)].split(sizes, -1)
    b, c, dt = cut if aligned else (*cut[1:], cut[0])
    return [u.to(dtype).cuda(), dt, b, c, *(x.cuda() for x in parameters)]


def outputs(tensors, backend, weight):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = scan(*leaves, backend=backend)
    y.backward(weight.to(y.dtype))
    return {"y": y.detach()} | {f"grad of {n}": x.grad for n, x in zip(NAMES, leaves, strict=True)}


def weight_for(tensors):
    return torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).cuda()


def errors(tensors, backend):
    weight = weight_for(tensors).to(tensors[0].dtype)
    found = outputs(tensors, backend, weight)
    assert all(torch.isfinite(value).all() for value in found.values())
    return worst(found, outputs([x.double() for x in tensors], "reference", weight.double()))


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_all_gradients_equal_the_definition(shape, dtype, aligned, backend):
    found = errors(on_gpu(shape, dtype, aligned=aligned), backend)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize(("bias", "a_shift"), [(-12.0, 0.0), (12.0, 0.0), (20.0, 0.0), (60.0, 0.0), (-2.0, 6.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_steps_and_decays_stay_finite_and_exact(dtype, bias, a_shift, backend):
    tensors = on_gpu((2, 6, 7, 24, 1, 16), dtype)
    tensors[5].fill_(bias)
    tensors[6].add_(a_shift)
    weight = weight_for(tensors).to(dtype)
    found = outputs(tensors, backend, weight)
    assert all(torch.isfinite(value).all() for value in found.values())
    expected = outputs([x.double() for x in tensors], "reference", weight.double())
    compared = {n: e for n, e in worst(found, expected).items() if expected[n].abs().max() > 1e-20}
    tolerance = TOLERANCE[dtype]
    if backend == "mamba_ssm":
        # It takes decay · h for the state minus its input: of a state that decays within a step, rounding is left.
        compared.pop("grad of A_log", None)
        # Small steps are no small dt: what its 16-bit lift rounds off is as large as they vary.
        tolerance *= 1 if dtype == torch.float32 else 3
    assert {name: error for name, error in compared.items() if not error <= tolerance} == {}


def test_results_are_bit_equal_between_runs_in_fresh_memory(monkeypatch):
    tensors = on_gpu((3, 28, 28, 192, 6, 16), torch.bfloat16, aligned=True)
    weight = weight_for(tensors)
    first = outputs(tensors, "cuda", weight)
    again = outputs(tensors, "cuda", weight)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *size, **how: new_empty(*size, **how).fill_(float("nan")))
    in_dirt = outputs(tensors, "cuda", weight)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], in_dirt[name]) for name in first)


def test_segments_side_by_side_give_what_one_sequence_gives(monkeypatch):
    tensors = on_gpu((1, 28, 31, 96, 3, 16), torch.float32, aligned=True)
    weight = weight_for(tensors)
    in_parts = outputs(tensors, "cuda", weight)
    assert cuda._plan_of(tensors[0].flatten(1, 2), tensors[1], tensors[6]).segments > 1
    monkeypatch.setattr(cuda, "_WARPS_TO_FILL", 1)
    whole = outputs(tensors, "cuda", weight)
    assert {n: e for n, e in worst(in_parts, {k: v.double() for k, v in whole.items()}).items() if e > 1e-5} == {}


def test_cuda_raises_on_second_order_gradients(backend):
    tensors = [x.requires_grad_() for x in on_gpu((2, 6, 7, 24, 1, 16), torch.float32)]
    gradients = torch.autograd.grad(scan(*tensors, backend=backend).sum(), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match="second-order"):
            gradient.pow(2).sum().backward(retain_graph=True)


def test_it_can_be_captured_in_a_cuda_graph_both_ways(backend):
    tensors = [x.detach().requires_grad_() for x in on_gpu((2, 14, 14, 96, 3, 16), torch.bfloat16, aligned=True)]
    weight = weight_for(tensors).to(torch.bfloat16)

    def step():
        return torch.autograd.grad(scan(*tensors, backend=backend), tensors, weight)

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    if backend == "cuda":
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found, expected = dict(zip(NAMES, found, strict=True)), dict(zip(NAMES, expected, strict=True))
    assert {n: e for n, e in worst(found, {k: v.double() for k, v in expected.items()}).items() if not e <= 2e-2} == {}


def test_the_operator_passes_torchs_own_checks(backend):
    if backend == "cuda":
        operator, extra = cuda._forward, (True,)
        arguments = on_gpu((2, 5, 6, 24, 2, 16), torch.float32)
        arguments[0] = arguments[0].flatten(1, 2)
    else:
        operator, extra = mamba_ssm._forward, ()
        sizes = (2, 96, 30), (2, 96, 30), (96, 16), (2, 4, 16, 30), (2, 4, 16, 30), (96,), (96,)
        arguments = [torch.randn(*size, device="cuda") for size in sizes]
        arguments[2] = -arguments[2].exp()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*(x.detach().requires_grad_() for x in arguments), *extra), test_utils=tests)


def test_the_network_compiles_whole_and_equals_reference(backend):
    torch.manual_seed(0)
    config = MedMambaConfig(variant="nano", num_classes=3)
    model, slow = (build_model(config, scan=name, device="cuda").eval() for name in (backend, "reference"))
    slow.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 72, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
        expected = slow(images)
    assert (compiled - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_compiled_training_keeps_the_map_once_in_operator_order():
    batch, height, width, dim = 2, 12, 20, 192
    config = MedMambaConfig(variant="nano", num_classes=3)
    first, second = (SSConvSSM(dim, config, drop_path=0.0, backend="cuda").cuda() for _ in range(2))
    x = torch.randn(batch, height * width, dim, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda x: second(first(x, (height, width)), (height, width)), dynamic=False)
    _, codes = run_and_get_code(lambda: compiled(x).sum().backward())
    code = "\n".join(codes)
    assert "ss2d_scan_cuda_backward" in code
    # What the compiler writes for u where it takes it for a BCHW map on its way to a convolution: H innermost.
    assert f"({batch}, {height}, {width}, {dim}), ({height * width * dim}, 1, " not in code


def test_auto_takes_it():
    assert backends("cuda")["cuda"] is None
    assert resolve_backend("auto", "cuda") == "cuda"


def test_what_was_built_ahead_is_found_by_the_network(tmp_path, monkeypatch):
    if reason := backends("cuda")["cuda"]:
        pytest.skip(f"backend cuda: {reason}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = MedMambaConfig(dims=(40, 80), depths=(1, 1), num_classes=2)  # widths that no other test builds
    build_ahead("cuda", config.scan_sizes, torch.bfloat16)
    built = set(tmp_path.rglob("*.cubin"))
    model = build_model(config, scan="cuda", device="cuda").train()
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
    assert len(built) == 2
    assert set(tmp_path.rglob("*.cubin")) == built
