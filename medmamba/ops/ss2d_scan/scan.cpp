// The scan on a CPU, forward and backward; cpp.py calls it, cxx.py builds it. See reference.py for the equation.
//
// A vector holds adjacent channels of one position. A task is one image (in backward: one slot of images) and one range
// of channels, in all four directions. Sequences are split into chunks: the small inputs of a chunk are gathered once,
// then for every vector of channels GROUP states at a time stay in registers over the entire chunk. In backward the
// states at each chunk's start come from the forward pass, and the others are recomputed.
//
// Arrays are float32. Layouts: u, y (B,L,D); weight (K,R,D), bias and skip (K,D), a (K,N,D) = A·log2(e); kept
// (B,K,chunks,D·N), a block of W channels as (N,W). D is a multiple of NARROW, N of GROUP (cpu_operator.py pads).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) && !defined(PORTABLE)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int WAYS = 4;  // NARROW, GROUP and CHUNK are settings of the build
constexpr float LN_2 = 0.693147180559945f, LOG2_E = 1.44269504088896f;

using Index = int64_t;

template <int W>
struct Lanes {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));
};
template <int W>
using Vec = typename Lanes<W>::F;

struct alignas(64) Line {
    float lanes[16];
};

template <int W>
INLINE Vec<W> load(const float* from) {
    Vec<W> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <int W>
INLINE void store(float* to, Vec<W> x) {
    std::memcpy(to, &x, sizeof x);
}

template <int W>
INLINE Vec<W> splat(float x) {
    return x - Vec<W>{};
}

// 2^x for x <= 127, relative error 1e-7; preserves NaN.
template <int W>
INLINE Vec<W> exp2_of(Vec<W> x) {
    // 2^f for |f| <= 1/2
    const auto power = [](Vec<W> f) __attribute__((always_inline)) {
        Vec<W> p = f * 1.326472719e-3f + 9.671512666e-3f;
        p = p * f + 5.550733744e-2f;
        p = p * f + 2.402224208e-1f;
        p = p * f + 6.931469776e-1f;
        return p * f + 1.0f;
    };
#if defined(__AVX512F__) && !defined(PORTABLE)
    if constexpr (W == 16) {
        const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_scalef_ps(power(x - whole), whole);
    }
#endif
    x = x < -126.0f ? splat<W>(-126.0f) : x;
    constexpr float MAGIC = 12582912.0f + 127.0f;  // adding it rounds and puts the biased exponent into the low bits
    const Vec<W> rounded = x + MAGIC;
    typename Lanes<W>::I bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= 23;
    Vec<W> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power(x - (rounded - MAGIC)) * scale;
}

template <int W>
INLINE Vec<W> exp_of_minus_size(Vec<W> x) {
    return exp2_of<W>((x < 0.0f ? x : -x) * LOG2_E);
}

// log(1 + e^x), accurate to a few roundings for all x; 2·atanh(s) = s·P(s²) for 0 <= s <= 1/3.
template <int W>
INLINE Vec<W> softplus(Vec<W> x) {
    const Vec<W> small = exp_of_minus_size<W>(x), s = small / (2.0f + small), t = s * s;
    Vec<W> p = t * 0.2817827495f + 0.2796061775f;
    p = p * t + 0.4002490903f;
    p = p * t + 0.6666631472f;
    p = p * t + 2.0000000079f;
    return (x < 0.0f ? Vec<W>{} : x) + p * s;
}

template <int W>
INLINE Vec<W> sigmoid(Vec<W> x) {
    const Vec<W> small = exp_of_minus_size<W>(x);
    return (x < 0.0f ? small : splat<W>(1.0f)) / (1.0f + small);
}

struct Rows {  // dt, B or C: a view whose last axis is contiguous
    const float* data;
    Index image, pixel, way;

    const float* at(Index i, Index p, Index k) const { return data + i * image + p * pixel + k * way; }
};

struct Problem {
    Index images, height, width, channels, rank, states, splits, slots;
    Rows dt, b, c;
    const float *u, *weight, *bias, *a, *skip;

    Index length() const { return height * width; }
    Index chunks() const { return (length() + CHUNK - 1) / CHUNK; }
    Index first_channel(Index split) const {
        const Index blocks = (channels + WIDE - 1) / WIDE;
        return std::min(channels, split * blocks / splits * WIDE);
    }
    Index kept_at(Index image, Index k, Index chunk, Index d) const {
        return ((image * WAYS + k) * chunks() + chunk) * channels * states + d * states;
    }
};

struct Gradients {  // dt (splits,B,L,K,R), b and c (splits,B,L,K,N); weight (slots,K,R,D), bias, a, skip: initially 0
    float *u, *dt, *b, *c, *weight, *bias, *a, *skip;
};

// Calls block(std::integral_constant<int, W>, d) for the channels [d, end), W at a time.
template <class Block>
INLINE void by_blocks(Index d, Index end, Block block) {
    for (; d + WIDE <= end; d += WIDE) block(std::integral_constant<int, WIDE>(), d);
    for (; d < end; d += NARROW) block(std::integral_constant<int, NARROW>(), d);
}

// The small inputs of one chunk of one direction, in the order of its positions.
struct Chunk {
    Index image, k, number;
    int count;
    Index pixels[CHUNK];
    std::vector<float> dt, b, c;

    explicit Chunk(const Problem& p) : dt(CHUNK * p.rank), b(CHUNK * p.states), c(CHUNK * p.states) {}

    void gather(const Problem& p, Index image_, Index k_, Index number_) {
        image = image_, k = k_, number = number_;
        const Index length = p.length(), start = number * CHUNK;
        count = static_cast<int>(std::min<Index>(CHUNK, length - start));
        for (int i = 0; i < count; ++i) {
            const Index position = k < 2 ? start + i : length - 1 - start - i;
            const Index pixel = k % 2 ? position % p.height * p.width + position / p.height : position;
            pixels[i] = pixel;
            std::copy_n(p.dt.at(image, pixel, k), p.rank, &dt[i * p.rank]);
            std::copy_n(p.b.at(image, pixel, k), p.states, &b[i * p.states]);
            std::copy_n(p.c.at(image, pixel, k), p.states, &c[i * p.states]);
        }
    }
};

template <int W>
INLINE Vec<W> lifted_at(const Problem& p, const Chunk& chunk, int i, Index d) {
    Vec<W> x = load<W>(p.bias + chunk.k * p.channels + d);
    for (Index r = 0; r < p.rank; ++r)
        x += chunk.dt[i * p.rank + r] * load<W>(p.weight + (chunk.k * p.rank + r) * p.channels + d);
    return x;
}

template <int W>
INLINE void forward_block(const Problem& p, const Chunk& chunk, Index d, float* h, float* y, float* kept) {
    typedef Vec<W> V;
    V delta_s[CHUNK], fed_s[CHUNK], y_s[CHUNK];
    const Index row = chunk.k * p.channels + d, states = p.states, image_at = chunk.image * p.length();
    if (kept) std::copy_n(h, W * states, kept + p.kept_at(chunk.image, chunk.k, chunk.number, d));
    const V skip = load<W>(p.skip + row);
    for (int i = 0; i < chunk.count; ++i) {
        const V delta = softplus<W>(lifted_at<W>(p, chunk, i, d));
        const V value = load<W>(p.u + (image_at + chunk.pixels[i]) * p.channels + d);
        delta_s[i] = delta;
        fed_s[i] = delta * value;
        y_s[i] = skip * value;
    }
    for (Index n = 0; n < states; n += GROUP) {
        V a[GROUP], state[GROUP];
        UNROLL for (int g = 0; g < GROUP; ++g) {
            a[g] = load<W>(p.a + (chunk.k * states + n + g) * p.channels + d);
            state[g] = load<W>(h + (n + g) * W);
        }
        for (int i = 0; i < chunk.count; ++i) {
            const float *b = &chunk.b[i * states + n], *c = &chunk.c[i * states + n];
            V sum = y_s[i];
            UNROLL for (int g = 0; g < GROUP; ++g) {
                state[g] = exp2_of<W>(delta_s[i] * a[g]) * state[g] + fed_s[i] * b[g];
                sum += state[g] * c[g];
            }
            y_s[i] = sum;
        }
        UNROLL for (int g = 0; g < GROUP; ++g) store<W>(h + (n + g) * W, state[g]);
    }
    for (int i = 0; i < chunk.count; ++i) {
        float* to = y + (image_at + chunk.pixels[i]) * p.channels + d;
        store<W>(to, chunk.k ? load<W>(to) + y_s[i] : y_s[i]);
    }
}

void forward_task(const Problem& p, Index task, float* y, float* kept) {
    const Index image = task / p.splits, split = task % p.splits;
    const Index from = p.first_channel(split), to = p.first_channel(split + 1);
    Chunk chunk(p);
    std::vector<Line> h((p.channels * p.states + 15) / 16);
    for (Index k = 0; k < WAYS; ++k) {
        std::fill(h.begin(), h.end(), Line{});
        for (Index number = 0; number < p.chunks(); ++number) {
            chunk.gather(p, image, k, number);
            by_blocks(from, to, [&](auto wide, Index d) __attribute__((always_inline)) {
                forward_block<wide>(p, chunk, d, h[0].lanes + d * p.states, y, kept);
            });
        }
    }
}

// Sums over the channels so far, one vector per element: of dt (i, r), of B and C (i, n).
struct Sums {
    std::vector<Line> dt, b, c;

    explicit Sums(const Problem& p) : dt(CHUNK * p.rank), b(CHUNK * p.states), c(CHUNK * p.states) {}

    void clear() {
        for (auto* lines : {&dt, &b, &c}) std::fill(lines->begin(), lines->end(), Line{});
    }
};

INLINE float total(const Line& line) {
    Vec<8> x = load<8>(line.lanes) + load<8>(line.lanes + 8);
    Vec<4> y = load<4>(reinterpret_cast<const float*>(&x)) + load<4>(reinterpret_cast<const float*>(&x) + 4);
    return (y[0] + y[2]) + (y[1] + y[3]);
}

template <int W>
INLINE void backward_block(
    const Problem& p, const Chunk& chunk, Index d, Index slot, const float* dy, const float* kept, float* dh_of_block,
    Sums& sums, const Gradients& grad
) {
    typedef Vec<W> V;
    V delta_s[CHUNK], fed_s[CHUNK], lifted_s[CHUNK], g_s[CHUNK], to_delta_s[CHUNK], to_u_s[CHUNK];
    V h_s[CHUNK + 1][GROUP], decay_s[CHUNK][GROUP];
    const Index states = p.states, rank = p.rank, row = chunk.k * p.channels + d;
    const Index image_at = chunk.image * p.length(), slot_row = slot * WAYS * p.channels + row;
    const int count = chunk.count;
    for (int i = 0; i < count; ++i) {
        const Index at = (image_at + chunk.pixels[i]) * p.channels + d;
        lifted_s[i] = lifted_at<W>(p, chunk, i, d);
        delta_s[i] = softplus<W>(lifted_s[i]);
        fed_s[i] = delta_s[i] * load<W>(p.u + at);
        g_s[i] = load<W>(dy + at);
        to_delta_s[i] = to_u_s[i] = V{};
    }
    kept += p.kept_at(chunk.image, chunk.k, chunk.number, d);
    for (Index n = 0; n < states; n += GROUP) {
        V a[GROUP], h[GROUP], dh[GROUP], da[GROUP];
        float* da_at = grad.a + ((slot * WAYS + chunk.k) * states + n) * p.channels + d;
        UNROLL for (int g = 0; g < GROUP; ++g) {
            a[g] = load<W>(p.a + (chunk.k * states + n + g) * p.channels + d);
            h_s[0][g] = h[g] = load<W>(kept + (n + g) * W);
        }
        for (int i = 0; i < count; ++i) {
            const float* b = &chunk.b[i * states + n];
            UNROLL for (int g = 0; g < GROUP; ++g) {
                const V decay = exp2_of<W>(delta_s[i] * a[g]);
                h[g] = decay * h[g] + fed_s[i] * b[g];
                decay_s[i][g] = decay;
                h_s[i + 1][g] = h[g];
            }
        }
        UNROLL for (int g = 0; g < GROUP; ++g) {
            dh[g] = load<W>(dh_of_block + (n + g) * W);
            da[g] = load<W>(da_at + g * p.channels);
        }
        for (int i = count - 1; i >= 0; --i) {
            const float *b = &chunk.b[i * states + n], *c = &chunk.c[i * states + n];
            Line *db = &sums.b[i * states + n], *dc = &sums.c[i * states + n];
            const V delta = delta_s[i], fed = fed_s[i], gradient = g_s[i];
            V to_delta = to_delta_s[i], to_u = to_u_s[i];
            UNROLL for (int g = 0; g < GROUP; ++g) {
                store<W>(dc[g].lanes, load<W>(dc[g].lanes) + gradient * h_s[i + 1][g]);
                dh[g] += gradient * c[g];
                store<W>(db[g].lanes, load<W>(db[g].lanes) + dh[g] * fed);
                to_u += dh[g] * b[g];
                dh[g] *= decay_s[i][g];
                const V through = dh[g] * h_s[i][g];
                da[g] += through * delta;
                to_delta += through * a[g];
            }
            to_delta_s[i] = to_delta;
            to_u_s[i] = to_u;
        }
        UNROLL for (int g = 0; g < GROUP; ++g) {
            store<W>(dh_of_block + (n + g) * W, dh[g]);
            store<W>(da_at + g * p.channels, da[g]);
        }
    }
    V dbias = load<W>(grad.bias + slot_row), dskip = load<W>(grad.skip + slot_row);
    const V skip = load<W>(p.skip + row);
    V* dlifted_s = to_delta_s;
    for (int i = 0; i < count; ++i) {
        const Index at = (image_at + chunk.pixels[i]) * p.channels + d;
        const V value = load<W>(p.u + at);
        const V dlifted = (to_delta_s[i] * LN_2 + value * to_u_s[i]) * sigmoid<W>(lifted_s[i]);
        dbias += dlifted;
        dskip += g_s[i] * value;
        const V du = delta_s[i] * to_u_s[i] + skip * g_s[i];
        store<W>(grad.u + at, chunk.k ? load<W>(grad.u + at) + du : du);
        dlifted_s[i] = dlifted;
    }
    store<W>(grad.bias + slot_row, dbias);
    store<W>(grad.skip + slot_row, dskip);
    for (Index r = 0; r < rank; ++r) {
        const V weight = load<W>(p.weight + (chunk.k * rank + r) * p.channels + d);
        float* to = grad.weight + ((slot * WAYS + chunk.k) * rank + r) * p.channels + d;
        V dweight = load<W>(to);
        for (int i = 0; i < count; ++i) {
            float* lanes = sums.dt[i * rank + r].lanes;
            store<W>(lanes, load<W>(lanes) + dlifted_s[i] * weight);
            dweight += dlifted_s[i] * chunk.dt[i * rank + r];
        }
        store<W>(to, dweight);
    }
}

void backward_task(const Problem& p, Index task, const float* dy, const float* kept, const Gradients& grad) {
    const Index slot = task / p.splits, split = task % p.splits;
    const Index from = p.first_channel(split), to = p.first_channel(split + 1);
    Chunk chunk(p);
    Sums sums(p);
    std::vector<Line> dh((p.channels * p.states + 15) / 16);
    for (Index image = slot; image < p.images; image += p.slots) {
        for (Index k = 0; k < WAYS; ++k) {
            std::fill(dh.begin(), dh.end(), Line{});
            for (Index number = p.chunks() - 1; number >= 0; --number) {
                chunk.gather(p, image, k, number);
                sums.clear();
                by_blocks(from, to, [&](auto wide, Index d) __attribute__((always_inline)) {
                    backward_block<wide>(p, chunk, d, slot, dy, kept, dh[0].lanes + d * p.states, sums, grad);
                });
                for (int i = 0; i < chunk.count; ++i) {
                    const Index at = ((split * p.images + image) * p.length() + chunk.pixels[i]) * WAYS + k;
                    for (Index r = 0; r < p.rank; ++r) grad.dt[at * p.rank + r] = total(sums.dt[i * p.rank + r]);
                    for (Index n = 0; n < p.states; ++n) {
                        grad.b[at * p.states + n] = total(sums.b[i * p.states + n]);
                        grad.c[at * p.states + n] = total(sums.c[i * p.states + n]);
                    }
                }
            }
        }
    }
}

}  // namespace

// Runs tasks [first, last). Tasks write disjoint outputs, so the result does not depend on the threads.
extern "C" {

void scan_forward(Index first, Index last, const Problem* p, float* y, float* kept) {
    for (Index task = first; task < last; ++task) forward_task(*p, task, y, kept);
}

void scan_backward(
    Index first, Index last, const Problem* p, const float* dy, const float* kept, const Gradients* grad
) {
    for (Index task = first; task < last; ++task) backward_task(*p, task, dy, kept, *grad);
}

}
