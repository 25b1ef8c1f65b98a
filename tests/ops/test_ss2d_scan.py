"""The scan: its definition against a loop over single pixels, and every backend against its definition."""

import re
import threading
import time

import numpy as np
import pytest
import torch

from medmamba.ops import ss2d_scan
from medmamba.ops.ss2d_scan import backend_scan, backends, resolve_backend, scan
from medmamba.ops.ss2d_scan.cpu_operator import spread
from pipelines.bench.measure import NotMeasured, checked

NAMES = ("u", "dt", "B", "C", "dt_weight", "dt_bias", "A_log", "D")
# (batch, height, width, channels, rank, states): L = 1, less and more than a chunk, not square, channels and states
# that fill no block, few and many images.
SHAPES = [
    (1, 1, 1, 8, 1, 16),
    (2, 1, 2, 24, 1, 16),
    (3, 7, 7, 16, 2, 16),
    (1, 9, 7, 40, 3, 16),
    (2, 4, 9, 24, 1, 16),
    (2, 14, 14, 8, 1, 4),
    (2, 5, 3, 13, 2, 7),
    (33, 3, 2, 8, 1, 16),
    (1, 28, 28, 8, 1, 16),
]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
    for name, reason in backends("cpu").items()
    if name in ("numba", "cpp")
]
needs_a_compiler = pytest.mark.skipif(backends("cpu")["cpp"] is not None, reason=str(backends("cpu")["cpp"]))


def inputs(shape, *, dtype=torch.float32, seed=0):
    """Asymmetric in every axis and direction; step sizes from 1e-4 to 10."""
    batch, height, width, channels, rank, states = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    u = normal(batch, height, width, channels)
    projected = normal(batch, height, width, 4, rank + 2 * states)  # cut into views, as the model does
    dt, b, c = projected.to(dtype).split((rank, states, states), dim=-1)
    a_log = torch.arange(1, states + 1).log() + 0.3 * normal(4, channels, states)
    rest = (normal(4, channels, rank), 3 * normal(4, channels) - 2, a_log, normal(4, channels))
    return [x.to(dtype).detach().requires_grad_() for x in (u, dt, b, c, *rest)]


def by_single_pixels(u, dt, b, c, dt_weight, dt_bias, a_log, skip):
    """The equation with loops, in float64: what the definition itself is held to."""
    images, height, width, channels = u.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    y = np.zeros(u.shape)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        for image in range(images):
            h = np.zeros((channels, b.shape[-1]))
            for i, j in order:
                here = (image, i, j)
                delta = np.log1p(np.exp(dt_weight[k] @ dt[(*here, k)] + dt_bias[k]))
                decay = np.exp(-delta[:, None] * np.exp(a_log[k]))
                h = decay * h + (delta * u[here])[:, None] * b[(*here, k)]
                y[here] += h @ c[(*here, k)] + skip[k] * u[here]
    return y


def outputs(tensors, backend, *, weight=None):
    """y and the gradient of every input for a random weighting of y."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    y = scan(*leaves, backend=backend)
    if weight is None:
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weight.to(y.dtype))
    return {"y": y.detach()} | {f"grad of {n}": x.grad for n, x in zip(NAMES, leaves, strict=True)}


def worst(found, expected):
    """The largest error of each tensor, relative to that tensor's largest value."""
    return {
        n: ((found[n].double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for n, e in expected.items()
    }


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8, 2, 4), (1, 4, 1, 3, 1, 2), (2, 7, 6, 16, 1, 16)], ids=str)
def test_the_scan_equals_the_equation_pixel_by_pixel(shape, backend):
    tensors = inputs(shape, dtype=torch.float64)
    expected = by_single_pixels(*(x.detach().numpy() for x in tensors))
    dtype = torch.float64 if backend == "reference" else torch.float32
    y = scan(*(x.detach().to(dtype) for x in tensors), backend=backend)
    assert (
        np.abs(y.double().numpy() - expected).max()
        <= (1e-12 if dtype == torch.float64 else 1e-5) * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    "way", range(4), ids=["row-major", "column-major", "row-major reversed", "column-major reversed"]
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_direction_passes_a_pixel_on_in_its_own_order_only(backend, way):
    """One bright pixel, B and C of one direction alone: y is bright exactly where that direction has still to go."""
    height, width = 3, 4
    u, dt, b, c, dt_weight, dt_bias, a_log, skip = (x.detach() for x in inputs((1, height, width, 8, 1, 4)))
    only = torch.zeros(4, 1).index_fill_(0, torch.tensor(way), 1.0)
    u = torch.zeros_like(u)
    u[0, 1, 2] = 1
    y = scan(
        u, dt, only.expand_as(b).contiguous(), torch.ones_like(c), dt_weight, dt_bias, a_log, 0 * skip, backend=backend
    )
    position = torch.arange(height * width).view(height, width)
    if way % 2:
        position = torch.arange(height * width).view(width, height).T
    reached = position <= position[1, 2] if way >= 2 else position >= position[1, 2]
    assert torch.equal((y[0] > 0).all(-1), reached)
    assert torch.equal((y[0] != 0).any(-1), reached)


def test_gradients_of_the_definition_match_finite_differences():
    tensors = inputs((1, 2, 3, 2, 1, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: scan(*x, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_backend_equals_the_float64_definition_both_ways(shape, backend):
    tensors = inputs(shape)
    expected = outputs([x.double() for x in tensors], "reference")
    errors = worst(outputs(tensors, backend), expected)
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bias", "a_shift"), [(-12.0, 0.0), (12.0, 0.0), (60.0, 0.0), (-2.0, 6.0), (-30.0, -6.0)])
def test_extreme_steps_and_decays_stay_exact_and_finite(bias, a_shift, backend):
    tensors = inputs((2, 6, 7, 16, 1, 16))
    with torch.no_grad():
        tensors[5].fill_(bias)
        tensors[6].add_(a_shift)
    expected = outputs([x.double() for x in tensors], "reference")
    found = outputs(tensors, backend)
    assert all(torch.isfinite(value).all() for value in found.values())
    # Where every state decays within a step the gradients through the decay are only rounding: nothing to compare.
    errors = {n: e for n, e in worst(found, expected).items() if expected[n].abs().max() > 1e-20}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_returned_half(dtype, backend):
    tensors = [
        x.detach().to(dtype) if n in ("u", "dt", "B", "C") else x
        for n, x in zip(NAMES, inputs((2, 5, 6, 16, 1, 16)), strict=True)
    ]
    found = outputs(tensors, backend)
    assert found["y"].dtype == found["grad of u"].dtype == dtype
    assert found["grad of A_log"].dtype == torch.float32
    expected = outputs([x.double() for x in tensors], "reference")
    assert {n: e for n, e in worst(found, expected).items() if e > 2e-2} == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_memory_full_of_nan_does_not_matter(backend, monkeypatch):
    tensors = inputs((2, 5, 7, 24, 2, 16))
    expected = outputs(tensors, backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(float("nan")))
    found = outputs(tensors, backend)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 6, 7, 40, 2, 16), (5, 6, 7, 24, 1, 16)], ids=str)
def test_the_result_is_bit_equal_on_any_number_of_threads(shape, backend):
    tensors, threads = inputs(shape), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(outputs(tensors, backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_concurrent_calls_from_threads_do_not_disturb_each_other(backend):
    cases = [inputs((3, 6, 7, 16, 1, 16), seed=seed) for seed in range(4)]
    expected, found = [outputs(case, backend) for case in cases], {}
    workers = [threading.Thread(target=lambda i=i: found.update({i: outputs(cases[i], backend)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i][name], value) for i in range(4) for name, value in expected[i].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_lie_anyhow_in_memory_give_the_same_result(backend):
    tensors = inputs((2, 4, 5, 16, 2, 8))
    expected = outputs(tensors, backend)
    turned = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    weight = torch.randn(turned[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = outputs(turned, backend, weight=weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "dt_bias", "A_log"])
def test_a_nan_reaches_every_gradient_as_in_the_definition(name, backend):
    tensors = inputs((1, 5, 6, 8, 1, 4))
    with torch.no_grad():
        spoilt = tensors[NAMES.index(name)]
        spoilt[(0,) * spoilt.ndim] = float("nan")
    expected, found = (outputs(tensors, n) for n in ("reference", backend))
    wrong = [n for n, value in expected.items() if (value.isnan() & ~found[n].isnan()).any()]
    assert expected["y"].isnan().any()
    assert wrong == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_torchs_own_checks(backend):
    backend_scan(backend)
    *front, a_log, skip = inputs((2, 3, 4, 8, 1, 4))
    arguments = (*front, -a_log.detach().exp(), skip, True)
    operator = getattr(torch.ops.medmamba, f"ss2d_scan_{backend}").default
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("loss", ["sum", "weighted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_backends_raise_on_second_order_gradients(backend, loss):
    tensors = inputs((2, 5, 4, 8, 1, 16))
    y = scan(*tensors, backend=backend)
    total = y.sum() if loss == "sum" else (y * y).sum()
    found = torch.autograd.grad(total, tensors, create_graph=True)
    expected = scan(*tensors, backend="reference")
    wanted = torch.autograd.grad(expected.sum() if loss == "sum" else (expected * expected).sum(), tensors)
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for gradient in found:
        with pytest.raises(NotImplementedError, match=f"{backend}.*second-order.*scan='reference'"):
            gradient.pow(2).sum().backward(retain_graph=True)


def test_the_definition_has_second_order_gradients():
    tensors = [x.double().detach().requires_grad_() for x in inputs((1, 2, 3, 2, 1, 2))]
    assert torch.autograd.gradgradcheck(lambda *x: scan(*x, backend="reference"), tensors)


def test_an_unavailable_backend_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="unknown scan backend 'magic'; available: auto, reference, numba"):
        resolve_backend("magic")
    with pytest.raises(ValueError, match="'numba' cannot run on cuda: it requires the CPU"):
        resolve_backend("numba", "cuda")
    assert backends("cuda")["reference"] is None
    assert "requires the CPU" in backends("cuda")["numba"]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing chosen, nothing built: a cache of this test's own."""
    from medmamba.ops import cxx

    def forget():
        for cached in (resolve_backend, ss2d_scan._unusable, cxx._build):
            cached.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield forget
    monkeypatch.undo()
    forget()


@needs_a_compiler
def test_auto_builds_cpp_on_the_cpu_and_says_so_once(fresh, caplog, tmp_path):
    with caplog.at_level("INFO", logger="medmamba.ops"):
        assert [resolve_backend("auto", "cpu") for _ in range(3)] == ["cpp"] * 3
    first, second, last = (record.message for record in caplog.records)
    assert first == "compiling scan.cpp"
    assert second.startswith("compiled scan.cpp in ")
    assert second.endswith(f"cached in {tmp_path}/cache/medmamba/cpp")
    assert last == "scan backend on cpu: cpp"
    assert resolve_backend("auto", "cuda") == "reference"


@needs_a_compiler
def test_a_build_is_reused_only_for_equal_code_and_options(fresh, tmp_path, monkeypatch):
    from medmamba.ops import cxx

    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return ONE; }')

    def built():
        return sorted((tmp_path / "cache" / "medmamba" / "cpp").iterdir())

    assert cxx.build(source, {"ONE": 1}).one() == 1
    (first,) = built()
    made = first.stat().st_mtime_ns
    fresh()
    assert cxx.build(source, {"ONE": 1}).one() == 1
    assert built() == [first]
    assert first.stat().st_mtime_ns == made
    assert cxx.build(source, {"ONE": 2}).one() == 2
    monkeypatch.setattr(cxx, "_target", lambda: "another CPU")
    fresh()
    assert cxx.build(source, {"ONE": 1}).one() == 1
    assert len(built()) == 3


def test_a_failing_compiler_leaves_auto_the_next_backend(fresh, tmp_path, monkeypatch, caplog):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no space left >&2\nexit 4\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert resolve_backend("auto", "cpu") == "numba"
    assert re.search(r"cpp cannot be built here.* exited with 4:\nno space left", caplog.text, re.DOTALL)
    with pytest.raises(ValueError, match=r"'cpp' cannot run on cpu: .* exited with 4:\nno space left"):
        resolve_backend("cpp", "cpu")
    with pytest.raises(NotMeasured, match="no space left"):
        checked.__wrapped__("cpp", "cpu", "float32")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CXX", "no-such-compiler -v", "CXX=no-such-compiler not found"), ("PATH", "", "no C\\+\\+ compiler")],
)
def test_without_a_compiler_auto_takes_numba(fresh, monkeypatch, variable, value, reason):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    assert resolve_backend("auto", "cpu") == "numba"
    with pytest.raises(ValueError, match=f"'cpp' cannot run on cpu: {reason}"):
        resolve_backend("cpp", "cpu")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("u", lambda x: x[0], r"u of shape \(3, 5, 8\) must be \(B, H, W, D\)"),
        ("u", lambda x: x[:0], r"u of shape \(0, 3, 5, 8\) .* all of them positive"),
        ("dt", lambda x: x[:1], r"dt of shape \(1, .* with K = 4, B = 2, H = 3, W = 5"),
        ("dt", lambda x: x.transpose(1, 2), r"dt of shape \(2, 5, 3, 4, 2\)"),
        ("C", lambda x: x[..., :3], r"C of shape .* N = 4"),
        ("dt_weight", lambda x: x[..., :1], r"dt_weight of shape \(4, 8, 1\) .* R = 2"),
        ("A_log", lambda x: x[:2], r"A_log of shape \(2, 8, 4\) .* with K = 4"),
        ("D", lambda x: torch.cat((x, x), 1), r"D of shape \(4, 16\) .* D = 8"),
        ("B", lambda x: x.to("meta"), r"B is torch.float32 on meta, but must .* on cpu like u"),
        ("dt_bias", lambda x: x.long(), r"dt_bias is torch.int64 on cpu, but must be floating-point"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(name, changed, reason, backend):
    tensors = [x.detach() for x in inputs((2, 3, 5, 8, 2, 4))]
    tensors[NAMES.index(name)] = changed(tensors[NAMES.index(name)])
    with pytest.raises(ValueError, match=reason):
        scan(*tensors, backend=backend)


def test_an_interrupted_call_ends_when_all_its_threads_have():
    threads, done = torch.get_num_threads(), []

    def run(tasks):
        if tasks[0] == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        done.append(tasks)

    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            spread(4, run)
    finally:
        torch.set_num_threads(threads)
    assert done == [(2, 4)]


def test_a_library_that_does_not_load_is_named_with_what_to_do(fresh, tmp_path, monkeypatch):
    careless = tmp_path / "c++"
    careless.write_text('#!/bin/sh\nfor last; do :; done\necho half of it > "$last"\n')
    careless.chmod(0o755)
    monkeypatch.setenv("CXX", str(careless))
    assert resolve_backend("auto", "cpu") == "numba"
    with pytest.raises(ValueError, match=rf"{tmp_path}/cache/medmamba/cpp/\w+.so cannot be loaded .*: delete it"):
        resolve_backend("cpp", "cpu")
