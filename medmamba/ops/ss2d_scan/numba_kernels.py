"""The loops of the numba backend: forward and hand-written backward, eight channels at a time.

numba does not promise to vectorise a loop, so the kernels are written in `Lanes`: eight float32 side by side, one
CPU vector register, with a polynomial exp. A block is eight channels; N is a multiple of four, D of eight (numba_cpu
pads). Per task (one range of images, one range of blocks), direction and chunk of CHUNK positions the small inputs
are gathered once into scratch, then for every block four states n at a time stay in registers over the whole chunk.
The backward pass reads the states at each chunk's start from the forward pass and computes the others again.

This one file holds types and kernels because numba's cache on disk notices changes only in a kernel's own file.
Arrays are flat float32 in pixel order unless said otherwise. Suffix _s: scratch of one chunk.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import float32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 8  # channels per block
GROUP = 4  # states per pass over a chunk
CHUNK = 32  # positions between two stored states; 16 and 64 are slower: see the length of the scratch arrays
LOG2_E = 1.4426950408889634

_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
# 2^f - 1 = f·P(f) for |f| <= 1/2, relative error of 2^f 2e-9; 2·atanh(s) = s·P(s²) for 0 <= s <= 1/3, 4e-9.
_EXP2 = (0.6931472028550674, 0.24022647913629103, 0.05550332471124628, 0.009618437357630634, 0.001339887441459584)
_EXP2 = (*_EXP2, 0.00015353361923066958)
_LOG1P = (2.000000007917827, 0.6666631472059109, 0.4002490903185662, 0.2796061774962809, 0.2817827495238956)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes8xfloat32")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * WIDTH)


def _call(builder, name: str, *arguments):
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{WIDTH}f32")
    return builder.call(function, arguments)


def _polynomial(builder, coefficients, x):
    value = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = _call(builder, "llvm.fmuladd", value, x, _constant(coefficient))
    return value


def _pointer(context, builder, signature, array, index):
    data = context.make_array(signature.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


@intrinsic
def load(typing, array, index):
    """Eight neighbours of a flat float32 array, from `index` on."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, signature, *arguments), align=4)

    return lanes(array, types.intp), generate


@intrinsic
def store(typing, array, index, value):
    """Puts eight lanes at `index` of a flat float32 array."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        builder.store(value, _pointer(context, builder, signature, array, index), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), generate


@intrinsic
def splat(typing, scalar):
    """The same number in all lanes."""

    def generate(context, builder, signature, arguments):
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(_INTEGERS, [0] * WIDTH)
        return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return lanes(float32), generate


@intrinsic
def total(typing, value):
    """The sum over the lanes, in a fixed order."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{WIDTH}f32")
        return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), *arguments], fastmath=("reassoc",))

    return float32(lanes), generate


@intrinsic
def fma(typing, a, b, c):
    """a·b + c."""

    def generate(context, builder, signature, arguments):
        return _call(builder, "llvm.fmuladd", *arguments)

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def exp2(typing, exponent):
    """2^exponent for exponent <= 127; below -126 it stays 2^-126."""

    def generate(context, builder, signature, arguments):
        x = _call(builder, "llvm.maxnum", arguments[0], _constant(-126.0))
        magic = _constant(1.5 * 2**23)  # adding it rounds to an integer and leaves that in the low bits
        rounded = builder.fadd(x, magic)
        fraction = builder.fsub(x, builder.fsub(rounded, magic))
        power = _polynomial(builder, (1.0, *_EXP2), fraction)
        shift = builder.shl(builder.bitcast(rounded, _INTEGERS), ir.Constant(_INTEGERS, [23] * WIDTH))
        return builder.bitcast(builder.add(builder.bitcast(power, _INTEGERS), shift), _VECTOR)

    return lanes(lanes), generate


@intrinsic
def _atanh_twice(typing, s):
    def generate(context, builder, signature, arguments):
        (s,) = arguments
        return builder.fmul(s, _polynomial(builder, _LOG1P, builder.fmul(s, s)))

    return lanes(lanes), generate


@intrinsic
def _where_negative(typing, x, yes, no):
    def generate(context, builder, signature, arguments):
        x, yes, no = arguments
        return builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), yes, no)

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def _maximum(typing, a, b):
    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), b, a)  # a NaN in `a` stays

    return lanes(lanes, lanes), generate


def _operator(symbol, instruction: str) -> None:
    @intrinsic
    def operation(typing, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return lanes(lanes, lanes), generate

    @overload(symbol, inline="always")
    def overloaded(a, b):
        if a is lanes and b is lanes:
            return lambda a, b: operation(a, b)
        return None


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _instruction)

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LOG2_E, _LN_2 = np.float32(LOG2_E), np.float32(1 / LOG2_E)


@njit(forceinline=True)
def _exp_of_minus_size(x):
    return exp2(_maximum(x, splat(_ZERO) - x) * splat(-_LOG2_E))


@njit(forceinline=True)
def softplus(x):
    """log(1 + e^x), relative error of a few roundings also where it is tiny or large."""
    small = _exp_of_minus_size(x)
    return _maximum(x, splat(_ZERO)) + _atanh_twice(small / (splat(_TWO) + small))


@njit(forceinline=True)
def sigmoid(x):
    """The slope of softplus."""
    small = _exp_of_minus_size(x)
    return _where_negative(x, small, splat(_ONE)) / (splat(_ONE) + small)


@njit(forceinline=True)
def _scratch():
    """One block of a chunk, and of the position before it."""
    return np.empty((CHUNK + 1) * WIDTH, np.float32)


@njit(forceinline=True)
def _gather(image, k, start, count, height, width, dt, b, c, pixels_s, dt_s, b_s, c_s):
    """Reads dt, B, C of `count` positions of direction k from `start` on, and where their pixels lie."""
    for i in range(count):
        position = start + i if k < 2 else height * width - 1 - start - i
        pixel = position if k % 2 == 0 else (position % height) * width + position // height
        pixels_s[i] = pixel
        for r in range(dt.shape[3]):
            dt_s[i * dt.shape[3] + r] = dt[image, pixel, k, r]
        for n in range(b.shape[3]):
            b_s[i * b.shape[3] + n] = b[image, pixel, k, n]
            c_s[i * b.shape[3] + n] = c[image, pixel, k, n]


@njit(forceinline=True)
def _lift(i, k, d, num_channels, rank, dt_s, weight, bias):
    """dt_weight · dt + dt_bias of block d at the chunk's position i; weight is (K, R, D)."""
    lifted = load(bias, k * num_channels + d)
    for r in range(rank):
        lifted = fma(splat(dt_s[i * rank + r]), load(weight, (k * rank + r) * num_channels + d), lifted)
    return lifted


@njit(nogil=True, cache=True)
def forward(tasks, splits, size, u, dt, b, c, weight, bias, a, skip, keep, y, kept):
    """Writes y for the tasks [tasks[0], tasks[1]); a task is one image and one of `splits` ranges of blocks.

    size = (height, width). dt, b, c: (B, L, K, R or N). weight (K,R,D), bias and skip (K,D), a = A·log2(e) (K,N,D).
    `keep`: also write the states at each chunk's start to kept (B, K, chunks, blocks, N, WIDTH).
    """
    height, width = size
    length, rank, states = height * width, dt.shape[3], b.shape[3]
    channels = u.size // (dt.shape[0] * length)
    blocks, chunks = channels // WIDTH, (length + CHUNK - 1) // CHUNK
    pixels_s = np.empty(CHUNK, np.int64)
    dt_s = np.empty(CHUNK * rank, np.float32)
    b_s, c_s = np.empty(CHUNK * states, np.float32), np.empty(CHUNK * states, np.float32)
    delta_s, in_s, y_s = _scratch(), _scratch(), _scratch()
    h = np.empty(blocks * states * WIDTH, np.float32)
    for task in range(tasks[0], tasks[1]):
        image, split = task // splits, task % splits
        for k in range(4):
            h[:] = 0
            for chunk in range(chunks):
                start = chunk * CHUNK
                count = min(CHUNK, length - start)
                _gather(image, k, start, count, height, width, dt, b, c, pixels_s, dt_s, b_s, c_s)
                for block in range(split * blocks // splits, (split + 1) * blocks // splits):
                    d, here = block * WIDTH, block * states * WIDTH
                    if keep:
                        there = ((image * 4 + k) * chunks + chunk) * channels * states
                        for n in range(states):
                            store(kept, there + here + n * WIDTH, load(h, here + n * WIDTH))
                    for i in range(count):
                        delta = softplus(_lift(i, k, d, channels, rank, dt_s, weight, bias))
                        value = load(u, (image * length + pixels_s[i]) * channels + d)
                        store(delta_s, i * WIDTH, delta)
                        store(in_s, i * WIDTH, delta * value)
                        store(y_s, i * WIDTH, load(skip, k * channels + d) * value)
                    for n in range(0, states, GROUP):
                        at = (k * states + n) * channels + d
                        a0, a1 = load(a, at), load(a, at + channels)
                        a2, a3 = load(a, at + 2 * channels), load(a, at + 3 * channels)
                        of = here + n * WIDTH
                        h0, h1 = load(h, of), load(h, of + WIDTH)
                        h2, h3 = load(h, of + 2 * WIDTH), load(h, of + 3 * WIDTH)
                        for i in range(count):
                            delta, fed, j = load(delta_s, i * WIDTH), load(in_s, i * WIDTH), i * states + n
                            h0 = fma(exp2(delta * a0), h0, fed * splat(b_s[j]))
                            h1 = fma(exp2(delta * a1), h1, fed * splat(b_s[j + 1]))
                            h2 = fma(exp2(delta * a2), h2, fed * splat(b_s[j + 2]))
                            h3 = fma(exp2(delta * a3), h3, fed * splat(b_s[j + 3]))
                            sum01 = fma(splat(c_s[j]), h0, splat(c_s[j + 1]) * h1)
                            sum23 = fma(splat(c_s[j + 2]), h2, splat(c_s[j + 3]) * h3)
                            store(y_s, i * WIDTH, load(y_s, i * WIDTH) + (sum01 + sum23))
                        store(h, of, h0)
                        store(h, of + WIDTH, h1)
                        store(h, of + 2 * WIDTH, h2)
                        store(h, of + 3 * WIDTH, h3)
                    for i in range(count):
                        at = (image * length + pixels_s[i]) * channels + d
                        before = load(y, at) if k > 0 else splat(_ZERO)
                        store(y, at, before + load(y_s, i * WIDTH))


@njit(forceinline=True)
def _recompute(count, n, states, a, h, delta_s, in_s, b_s, h_s, decay_s):
    """The states of one n after every position of the chunk (behind the one before it), and their decays."""
    store(h_s, 0, h)
    for i in range(count):
        decay = exp2(load(delta_s, i * WIDTH) * a)
        h = fma(decay, h, load(in_s, i * WIDTH) * splat(b_s[i * states + n]))
        store(decay_s, i * WIDTH, decay)
        store(h_s, (i + 1) * WIDTH, h)


@njit(forceinline=True)
def _reverse(i, j, g, fed, delta, a, dh, da, to_delta, to_u, h_s, decay_s, b_s, c_s, db_s, dc_s):
    """One position backwards for one state; j = where this position and state lie in b_s (lanes in db_s, dc_s).

    Returns dh for the position before, da, and the sums over n of dh·decay·h·a and dh·B with this n added.
    """
    store(dc_s, j * WIDTH, fma(g, load(h_s, (i + 1) * WIDTH), load(dc_s, j * WIDTH)))
    dh = fma(g, splat(c_s[j]), dh)
    store(db_s, j * WIDTH, fma(dh, fed, load(db_s, j * WIDTH)))
    to_u = fma(dh, splat(b_s[j]), to_u)
    dh = dh * load(decay_s, i * WIDTH)
    through = dh * load(h_s, i * WIDTH)
    return dh, fma(through, delta, da), fma(through, a, to_delta), to_u


@njit(nogil=True, cache=True)
def backward(tasks, slots, splits, size, dy, u, dt, b, c, weight, bias, a, skip, kept, gradients):
    """Writes the gradients of the tasks [tasks[0], tasks[1]); a task is one slot and one of `splits` ranges of blocks.

    A slot is every `slots`-th image; parameters' gradients are summed within a slot only, and those of dt, b, c
    within a split only, so the result does not depend on who runs which task. Inputs as in `forward`;
    gradients = (du like u; dt (splits,B,L,K,R), b and c (splits,B,L,K,N); weight (slots,K,R,D), bias (slots,K,D),
    A itself (slots,K,N,D), skip (slots,K,D)), the last four filled with zeros.
    """
    du, ddt, db, dc, dweight, dbias, da, dskip = gradients
    height, width = size
    length, rank, states, images = height * width, dt.shape[3], b.shape[3], dt.shape[0]
    channels = u.size // (images * length)
    blocks, chunks = channels // WIDTH, (length + CHUNK - 1) // CHUNK
    pixels_s = np.empty(CHUNK, np.int64)
    dt_s = np.empty(CHUNK * rank, np.float32)
    b_s, c_s = np.empty(CHUNK * states, np.float32), np.empty(CHUNK * states, np.float32)
    lifted_s, delta_s, in_s, to_delta_s, to_u_s = _scratch(), _scratch(), _scratch(), _scratch(), _scratch()
    h0_s, h1_s, h2_s, h3_s = _scratch(), _scratch(), _scratch(), _scratch()
    decay0_s, decay1_s, decay2_s, decay3_s = _scratch(), _scratch(), _scratch(), _scratch()
    ddt_s = np.empty(CHUNK * rank * WIDTH, np.float32)
    db_s, dc_s = np.empty(CHUNK * states * WIDTH, np.float32), np.empty(CHUNK * states * WIDTH, np.float32)
    dh = np.empty(blocks * states * WIDTH, np.float32)
    for task in range(tasks[0], tasks[1]):
        slot, split = task // splits, task % splits
        for image in range(slot, images, slots):
            for k in range(4):
                dh[:] = 0
                for chunk in range(chunks - 1, -1, -1):
                    start = chunk * CHUNK
                    count = min(CHUNK, length - start)
                    _gather(image, k, start, count, height, width, dt, b, c, pixels_s, dt_s, b_s, c_s)
                    ddt_s[:] = 0
                    db_s[:] = 0
                    dc_s[:] = 0
                    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
                        d, here = block * WIDTH, block * states * WIDTH
                        there = ((image * 4 + k) * chunks + chunk) * channels * states + here
                        for i in range(count):
                            lifted = _lift(i, k, d, channels, rank, dt_s, weight, bias)
                            delta = softplus(lifted)
                            store(lifted_s, i * WIDTH, lifted)
                            store(delta_s, i * WIDTH, delta)
                            value = load(u, (image * length + pixels_s[i]) * channels + d)
                            store(in_s, i * WIDTH, delta * value)
                            store(to_delta_s, i * WIDTH, splat(_ZERO))
                            store(to_u_s, i * WIDTH, splat(_ZERO))
                        for n in range(0, states, GROUP):
                            at, of = (k * states + n) * channels + d, there + n * WIDTH
                            a0, a1 = load(a, at), load(a, at + channels)
                            a2, a3 = load(a, at + 2 * channels), load(a, at + 3 * channels)
                            _recompute(count, n, states, a0, load(kept, of), delta_s, in_s, b_s, h0_s, decay0_s)
                            of += WIDTH
                            _recompute(count, n + 1, states, a1, load(kept, of), delta_s, in_s, b_s, h1_s, decay1_s)
                            of += WIDTH
                            _recompute(count, n + 2, states, a2, load(kept, of), delta_s, in_s, b_s, h2_s, decay2_s)
                            of += WIDTH
                            _recompute(count, n + 3, states, a3, load(kept, of), delta_s, in_s, b_s, h3_s, decay3_s)
                            of = here + n * WIDTH
                            dh0, dh1 = load(dh, of), load(dh, of + WIDTH)
                            dh2, dh3 = load(dh, of + 2 * WIDTH), load(dh, of + 3 * WIDTH)
                            at += slot * 4 * states * channels
                            da0, da1 = load(da, at), load(da, at + channels)
                            da2, da3 = load(da, at + 2 * channels), load(da, at + 3 * channels)
                            for i in range(count - 1, -1, -1):
                                g = load(dy, (image * length + pixels_s[i]) * channels + d)
                                delta, fed, j = load(delta_s, i * WIDTH), load(in_s, i * WIDTH), i * states + n
                                s, t = load(to_delta_s, i * WIDTH), load(to_u_s, i * WIDTH)
                                dh0, da0, s, t = _reverse(
                                    i, j, g, fed, delta, a0, dh0, da0, s, t, h0_s, decay0_s, b_s, c_s, db_s, dc_s
                                )
                                dh1, da1, s, t = _reverse(
                                    i, j + 1, g, fed, delta, a1, dh1, da1, s, t, h1_s, decay1_s, b_s, c_s, db_s, dc_s
                                )
                                dh2, da2, s, t = _reverse(
                                    i, j + 2, g, fed, delta, a2, dh2, da2, s, t, h2_s, decay2_s, b_s, c_s, db_s, dc_s
                                )
                                dh3, da3, s, t = _reverse(
                                    i, j + 3, g, fed, delta, a3, dh3, da3, s, t, h3_s, decay3_s, b_s, c_s, db_s, dc_s
                                )
                                store(to_delta_s, i * WIDTH, s)
                                store(to_u_s, i * WIDTH, t)
                            store(dh, of, dh0)
                            store(dh, of + WIDTH, dh1)
                            store(dh, of + 2 * WIDTH, dh2)
                            store(dh, of + 3 * WIDTH, dh3)
                            store(da, at, da0)
                            store(da, at + channels, da1)
                            store(da, at + 2 * channels, da2)
                            store(da, at + 3 * channels, da3)
                        at = (slot * 4 + k) * channels + d
                        dbias_here, dskip_here = load(dbias, at), load(dskip, at)
                        for i in range(count):
                            at_pixel = (image * length + pixels_s[i]) * channels + d
                            g, value = load(dy, at_pixel), load(u, at_pixel)
                            to_u = load(to_u_s, i * WIDTH)
                            to_delta = fma(load(to_delta_s, i * WIDTH), splat(_LN_2), value * to_u)
                            dlifted = to_delta * sigmoid(load(lifted_s, i * WIDTH))
                            dbias_here = dbias_here + dlifted
                            dskip_here = fma(g, value, dskip_here)
                            before = load(du, at_pixel) if k > 0 else splat(_ZERO)
                            slope = fma(load(delta_s, i * WIDTH), to_u, load(skip, k * channels + d) * g)
                            store(du, at_pixel, before + slope)
                            for r in range(rank):
                                of, row = (i * rank + r) * WIDTH, (k * rank + r) * channels + d
                                store(ddt_s, of, fma(dlifted, load(weight, row), load(ddt_s, of)))
                                row += slot * 4 * rank * channels
                                slope = splat(dt_s[i * rank + r])
                                store(dweight, row, fma(dlifted, slope, load(dweight, row)))
                        store(dbias, at, dbias_here)
                        store(dskip, at, dskip_here)
                    for i in range(count):
                        for r in range(rank):
                            ddt[split, image, pixels_s[i], k, r] = total(load(ddt_s, (i * rank + r) * WIDTH))
                        for n in range(states):
                            j = i * states + n
                            db[split, image, pixels_s[i], k, n] = total(load(db_s, j * WIDTH))
                            dc[split, image, pixels_s[i], k, n] = total(load(dc_s, j * WIDTH))
