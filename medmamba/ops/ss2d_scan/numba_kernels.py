"""The kernels of the numba backend: forward and hand-written backward, eight channels at a time.

numba does not guarantee that a loop is vectorized, so the kernels use `Lanes`: eight float32 in one CPU vector
register, with a polynomial exp. A block is eight channels; N is a multiple of four, D of eight (cpu_operator pads). For
each task (one image, in backward one slot of images, and one range of blocks), direction and chunk of CHUNK positions,
the small inputs are gathered once into scratch memory; then for every block four states n at a time stay in registers
over the entire chunk. The backward pass reads the states at each chunk's start from the forward pass and recomputes the
others.

Types and kernels share one file because numba's disk cache only detects changes in a kernel's own file.
Arrays are flat float32 in pixel order unless noted. Suffix _s (and s): scratch memory of one chunk.
"""

# Kernels are written in numba's subset of Python: numba infers their types, passes the typing context of an intrinsic
# itself, and llvmlite's builders are untyped.
# mypy: disable-error-code="call-arg, var-annotated, no-untyped-def, no-untyped-call"

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import float32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 8  # channels per block
GROUP = 4  # states per pass over a chunk
CHUNK = 32  # positions between stored states; 16 and 64 are equally fast, but 16 needs twice the memory
LOG2_E = 1.4426950408889634

_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
# 2^f - 1 = f·P(f) for |f| <= 1/2, relative error of 2^f 2e-9; 2·atanh(s) = s·P(s²) for 0 <= s <= 1/3, 4e-9.
_EXP2 = (
    *(0.6931472028550674, 0.24022647913629103, 0.05550332471124628),
    *(0.009618437357630634, 0.001339887441459584, 0.00015353361923066958),
)
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


def _in_all_lanes(builder, number):
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTEGERS, [0] * WIDTH))


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
    """Eight adjacent elements of a flat float32 array, from `index` on."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, signature, *arguments), align=4)

    return lanes(array, types.intp), generate


@intrinsic
def store(typing, array, index, value):
    """Writes eight lanes to a flat float32 array, from `index` on."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        builder.store(value, _pointer(context, builder, signature, array, index), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), generate


@intrinsic
def splat(typing, scalar):
    """The same number in all lanes."""

    def generate(context, builder, signature, arguments):
        return _in_all_lanes(builder, arguments[0])

    return lanes(float32), generate


@intrinsic
def spread(typing, array, index):
    """The number at `index` of a flat float32 array in all lanes; `index` must not be negative."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return _in_all_lanes(builder, builder.load(builder.gep(data, [arguments[1]])))

    return lanes(array, types.intp), generate


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
        least = _constant(-126.0)
        x = builder.select(builder.fcmp_ordered("<", arguments[0], least), least, arguments[0])  # a NaN stays
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
    """log(1 + e^x), with a relative error of a few roundings for all x."""
    small = _exp_of_minus_size(x)
    return _maximum(x, splat(_ZERO)) + _atanh_twice(small / (splat(_TWO) + small))


@njit(forceinline=True)
def sigmoid(x):
    """The derivative of softplus."""
    small = _exp_of_minus_size(x)
    return _where_negative(x, small, splat(_ONE)) / (splat(_ONE) + small)


# Offsets of rows in the scratch array s: lanes for each position of one block and chunk, and the position before.
_ROW = (CHUNK + 1) * WIDTH
_DELTA, _FED, _Y, _LIFTED, _G, _TO_DELTA, _TO_U, _H, _DECAY = (_ROW * row for row in (0, 1, 2, 3, 4, 5, 6, 7, 11))
_ROWS_FORWARD, _ROWS_BACKWARD = 3 * _ROW, 15 * _ROW


@njit(forceinline=True)
def _gather(image, k, start, count, size, states, dt, b, c, strides, pixels_s, dt_s, bc_s):
    """Reads dt, B, C and the pixel indices of `count` positions of direction k, from `start` on."""
    height, width = size
    rank = dt_s.size // CHUNK
    for i in range(count):
        position = start + i if k < 2 else height * width - 1 - start - i
        pixel = position if k % 2 == 0 else (position % height) * width + position // height
        pixels_s[i] = pixel
        of_dt = image * strides[0][0] + pixel * strides[0][1] + k * strides[0][2]
        of_b = image * strides[1][0] + pixel * strides[1][1] + k * strides[1][2]
        of_c = image * strides[2][0] + pixel * strides[2][1] + k * strides[2][2]
        for r in range(rank):
            dt_s[i * rank + r] = dt[of_dt + r]
        for n in range(states):
            bc_s[2 * (i * states + n)] = b[of_b + n]
            bc_s[2 * (i * states + n) + 1] = c[of_c + n]


@njit(forceinline=True)
def _lift(i, k, d, channels, dt_s, weight, bias):
    """dt_weight · dt + dt_bias of block d at the chunk's position i; weight is (K, R, D)."""
    rank = dt_s.size // CHUNK
    lifted = load(bias, k * channels + d)
    for r in range(rank):
        lifted = fma(spread(dt_s, i * rank + r), load(weight, (k * rank + r) * channels + d), lifted)
    return lifted


@njit(forceinline=True)
def _step(delta, fed, a, h, bc_s, j):
    """The next state: h ← 2^(delta·a)·h + B·fed."""
    return fma(exp2(delta * a), h, fed * spread(bc_s, j))


@njit(nogil=True, cache=True)
def forward(tasks, splits, shape, strides, u, dt, b, c, weight, bias, a, skip, keep, y, kept):
    """Writes y for the tasks [tasks[0], tasks[1]); a task is one image and one of `splits` ranges of blocks.

    shape = (images, height, width, channels, rank, states); strides = ((image, pixel, direction) of dt, of b, of c).
    weight (K,R,D), bias and skip (K,D), a = A·log2(e) (K,N,D).
    `keep`: also write the states at each chunk's start to kept (B, K, chunks, blocks, N, WIDTH).
    """
    _, height, width, channels, rank, states = shape
    size, length = (height, width), height * width
    blocks, chunks = channels // WIDTH, (length + CHUNK - 1) // CHUNK
    pixels_s, dt_s = np.empty(CHUNK, np.int64), np.empty(CHUNK * rank, np.float32)
    bc_s, s = np.empty(CHUNK * states * 2, np.float32), np.empty(_ROWS_FORWARD, np.float32)
    h = np.empty(blocks * states * WIDTH, np.float32)
    for task in range(tasks[0], tasks[1]):
        image, split = task // splits, task % splits
        for k in range(4):
            h[:] = 0
            for chunk in range(chunks):
                start = chunk * CHUNK
                count = min(CHUNK, length - start)
                _gather(image, k, start, count, size, states, dt, b, c, strides, pixels_s, dt_s, bc_s)
                for block in range(split * blocks // splits, (split + 1) * blocks // splits):
                    d, here = block * WIDTH, block * states * WIDTH
                    if keep:
                        there = ((image * 4 + k) * chunks + chunk) * channels * states
                        for n in range(states):
                            store(kept, there + here + n * WIDTH, load(h, here + n * WIDTH))
                    for i in range(count):
                        delta = softplus(_lift(i, k, d, channels, dt_s, weight, bias))
                        value = load(u, (image * length + pixels_s[i]) * channels + d)
                        store(s, _DELTA + i * WIDTH, delta)
                        store(s, _FED + i * WIDTH, delta * value)
                        store(s, _Y + i * WIDTH, load(skip, k * channels + d) * value)
                    for n in range(0, states, GROUP):
                        at, of = (k * states + n) * channels + d, here + n * WIDTH
                        a0, a1 = load(a, at), load(a, at + channels)
                        a2, a3 = load(a, at + 2 * channels), load(a, at + 3 * channels)
                        h0, h1 = load(h, of), load(h, of + WIDTH)
                        h2, h3 = load(h, of + 2 * WIDTH), load(h, of + 3 * WIDTH)
                        for i in range(count):
                            delta, fed, j = load(s, _DELTA + i * WIDTH), load(s, _FED + i * WIDTH), 2 * (i * states + n)
                            h0 = _step(delta, fed, a0, h0, bc_s, j)
                            h1 = _step(delta, fed, a1, h1, bc_s, j + 2)
                            h2 = _step(delta, fed, a2, h2, bc_s, j + 4)
                            h3 = _step(delta, fed, a3, h3, bc_s, j + 6)
                            sum01 = fma(spread(bc_s, j + 1), h0, spread(bc_s, j + 3) * h1)
                            sum23 = fma(spread(bc_s, j + 5), h2, spread(bc_s, j + 7) * h3)
                            store(s, _Y + i * WIDTH, load(s, _Y + i * WIDTH) + (sum01 + sum23))
                        store(h, of, h0)
                        store(h, of + WIDTH, h1)
                        store(h, of + 2 * WIDTH, h2)
                        store(h, of + 3 * WIDTH, h3)
                    for i in range(count):
                        at = (image * length + pixels_s[i]) * channels + d
                        before = load(y, at) if k > 0 else splat(_ZERO)
                        store(y, at, before + load(s, _Y + i * WIDTH))


@njit(forceinline=True)
def _prepare(image, k, d, count, length, channels, dt_s, pixels_s, weight, bias, u, dy, s):
    """Fills the scratch memory that all states of a block share."""
    for i in range(count):
        lifted = _lift(i, k, d, channels, dt_s, weight, bias)
        delta = softplus(lifted)
        at = (image * length + pixels_s[i]) * channels + d
        store(s, _LIFTED + i * WIDTH, lifted)
        store(s, _DELTA + i * WIDTH, delta)
        store(s, _FED + i * WIDTH, delta * load(u, at))
        store(s, _G + i * WIDTH, load(dy, at))
        store(s, _TO_DELTA + i * WIDTH, splat(_ZERO))
        store(s, _TO_U + i * WIDTH, splat(_ZERO))


@njit(forceinline=True)
def _recompute(count, n, states, a0, a1, a2, a3, kept, of, bc_s, s):
    """Recomputes the states n to n+3 after every position of the chunk, and their decays."""
    h0, h1, h2, h3 = load(kept, of), load(kept, of + WIDTH), load(kept, of + 2 * WIDTH), load(kept, of + 3 * WIDTH)
    store(s, _H, h0)
    store(s, _H + _ROW, h1)
    store(s, _H + 2 * _ROW, h2)
    store(s, _H + 3 * _ROW, h3)
    for i in range(count):
        at, j = i * WIDTH, 2 * (i * states + n)
        delta, fed = load(s, _DELTA + at), load(s, _FED + at)
        decay0, decay1, decay2, decay3 = exp2(delta * a0), exp2(delta * a1), exp2(delta * a2), exp2(delta * a3)
        h0 = fma(decay0, h0, fed * spread(bc_s, j))
        h1 = fma(decay1, h1, fed * spread(bc_s, j + 2))
        h2 = fma(decay2, h2, fed * spread(bc_s, j + 4))
        h3 = fma(decay3, h3, fed * spread(bc_s, j + 6))
        store(s, _DECAY + at, decay0)
        store(s, _DECAY + _ROW + at, decay1)
        store(s, _DECAY + 2 * _ROW + at, decay2)
        store(s, _DECAY + 3 * _ROW + at, decay3)
        store(s, _H + WIDTH + at, h0)
        store(s, _H + _ROW + WIDTH + at, h1)
        store(s, _H + 2 * _ROW + WIDTH + at, h2)
        store(s, _H + 3 * _ROW + WIDTH + at, h3)


@njit(forceinline=True)
def _reverse(row, at, j, g, fed, delta, a, dh, da, to_delta, to_u, s, bc_s, dbc_s):
    """Backward step of one position (at = i·WIDTH) for the state in scratch row `row`; j: index of its B in bc_s.

    Returns dh for the position before, da, and the sums over n of dh·decay·h·a and dh·B including this n.
    """
    store(dbc_s, (j + 1) * WIDTH, fma(g, load(s, _H + row + WIDTH + at), load(dbc_s, (j + 1) * WIDTH)))
    dh = fma(g, spread(bc_s, j + 1), dh)
    store(dbc_s, j * WIDTH, fma(dh, fed, load(dbc_s, j * WIDTH)))
    to_u = fma(dh, spread(bc_s, j), to_u)
    dh = dh * load(s, _DECAY + row + at)
    through = dh * load(s, _H + row + at)
    return dh, fma(through, delta, da), fma(through, a, to_delta), to_u


@njit(nogil=True, cache=True)
def backward(tasks, slots, splits, shape, strides, dy, u, dt, b, c, weight, bias, a, skip, kept, gradients):
    """Writes the gradients of the tasks [tasks[0], tasks[1]); a task is one slot and one of `splits` ranges of blocks.

    A slot is every `slots`-th image. Gradients of parameters are only summed within a slot, and those of dt, b, c only
    within a split, so the result does not depend on which thread runs a task. Inputs as in `forward`;
    gradients = (u; dt (splits,B,L,K,R), b and c (splits,B,L,K,N); weight (slots,K,R,D), bias (slots,K,D), A itself
    (slots,K,N,D), skip (slots,K,D)), the last four initially zero.
    """
    du, ddt, db, dc, dweight, dbias, da, dskip = gradients
    images, height, width, channels, rank, states = shape
    size, length = (height, width), height * width
    blocks, chunks = channels // WIDTH, (length + CHUNK - 1) // CHUNK
    pixels_s, dt_s = np.empty(CHUNK, np.int64), np.empty(CHUNK * rank, np.float32)
    bc_s, s = np.empty(CHUNK * states * 2, np.float32), np.empty(_ROWS_BACKWARD, np.float32)
    ddt_s, dbc_s = np.empty(CHUNK * rank * WIDTH, np.float32), np.empty(CHUNK * states * 2 * WIDTH, np.float32)
    dh = np.empty(blocks * states * WIDTH, np.float32)
    for task in range(tasks[0], tasks[1]):
        slot, split = task // splits, task % splits
        for image in range(slot, images, slots):
            for k in range(4):
                dh[:] = 0
                for chunk in range(chunks - 1, -1, -1):
                    start = chunk * CHUNK
                    count = min(CHUNK, length - start)
                    _gather(image, k, start, count, size, states, dt, b, c, strides, pixels_s, dt_s, bc_s)
                    ddt_s[: count * rank * WIDTH] = 0
                    dbc_s[: count * states * 2 * WIDTH] = 0
                    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
                        d, here = block * WIDTH, block * states * WIDTH
                        there = ((image * 4 + k) * chunks + chunk) * channels * states + here
                        _prepare(image, k, d, count, length, channels, dt_s, pixels_s, weight, bias, u, dy, s)
                        for n in range(0, states, GROUP):
                            at, of = (k * states + n) * channels + d, here + n * WIDTH
                            a0, a1 = load(a, at), load(a, at + channels)
                            a2, a3 = load(a, at + 2 * channels), load(a, at + 3 * channels)
                            _recompute(count, n, states, a0, a1, a2, a3, kept, there + n * WIDTH, bc_s, s)
                            dh0, dh1 = load(dh, of), load(dh, of + WIDTH)
                            dh2, dh3 = load(dh, of + 2 * WIDTH), load(dh, of + 3 * WIDTH)
                            at += slot * 4 * states * channels
                            da0, da1 = load(da, at), load(da, at + channels)
                            da2, da3 = load(da, at + 2 * channels), load(da, at + 3 * channels)
                            for i in range(count - 1, -1, -1):
                                i8, j = i * WIDTH, 2 * (i * states + n)
                                g, delta, fed = load(s, _G + i8), load(s, _DELTA + i8), load(s, _FED + i8)
                                td, tu = load(s, _TO_DELTA + i8), load(s, _TO_U + i8)
                                dh0, da0, td, tu = _reverse(
                                    0, i8, j, g, fed, delta, a0, dh0, da0, td, tu, s, bc_s, dbc_s
                                )
                                dh1, da1, td, tu = _reverse(
                                    _ROW, i8, j + 2, g, fed, delta, a1, dh1, da1, td, tu, s, bc_s, dbc_s
                                )
                                dh2, da2, td, tu = _reverse(
                                    2 * _ROW, i8, j + 4, g, fed, delta, a2, dh2, da2, td, tu, s, bc_s, dbc_s
                                )
                                dh3, da3, td, tu = _reverse(
                                    3 * _ROW, i8, j + 6, g, fed, delta, a3, dh3, da3, td, tu, s, bc_s, dbc_s
                                )
                                store(s, _TO_DELTA + i8, td)
                                store(s, _TO_U + i8, tu)
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
                            g, value, tu = load(s, _G + i * WIDTH), load(u, at_pixel), load(s, _TO_U + i * WIDTH)
                            td = fma(load(s, _TO_DELTA + i * WIDTH), splat(_LN_2), value * tu)
                            dlifted = td * sigmoid(load(s, _LIFTED + i * WIDTH))
                            dbias_here = dbias_here + dlifted
                            dskip_here = fma(g, value, dskip_here)
                            before = load(du, at_pixel) if k > 0 else splat(_ZERO)
                            slope = fma(load(s, _DELTA + i * WIDTH), tu, load(skip, k * channels + d) * g)
                            store(du, at_pixel, before + slope)
                            for r in range(rank):
                                of, row = (i * rank + r) * WIDTH, (k * rank + r) * channels + d
                                store(ddt_s, of, fma(dlifted, load(weight, row), load(ddt_s, of)))
                                row += slot * 4 * rank * channels
                                store(dweight, row, fma(dlifted, spread(dt_s, i * rank + r), load(dweight, row)))
                        store(dbias, at, dbias_here)
                        store(dskip, at, dskip_here)
                    for i in range(count):
                        row = ((split * images + image) * length + pixels_s[i]) * 4 + k
                        for r in range(rank):
                            ddt[row * rank + r] = total(load(ddt_s, (i * rank + r) * WIDTH))
                        for n in range(states):
                            j = 2 * (i * states + n)
                            db[row * states + n] = total(load(dbc_s, j * WIDTH))
                            dc[row * states + n] = total(load(dbc_s, (j + 1) * WIDTH))
