// The four-direction selective scan on a GPU, forward and backward; matches reference.py.
//
// A block scans one image in one direction for WIDE channels, TILE positions at a time. In the scan itself a thread
// owns a 4 x NJ patch of (channel, state) pairs: lane = 4 * (quad of channels) + (group of states). Sums over channels
// (gradients of B and C) and sums over states (y, gradients of u and delta) are therefore half done inside a thread
// before any shuffle, and B, C, delta and u are read from shared memory as vectors that lanes share. After the
// shuffles a lane holds the sum of the channel with its own number, whose u and dt it loaded.
// Sums across blocks are written separately and added afterwards in a fixed order, so results are bit-identical.
//
// Set by the host: ACT (0 float, 1 bfloat16, 2 half), CHANNELS, RANK, STATES (a multiple of 4), WARPS, TILE, SUB (which
// divides TILE), VECTORS, UNROLL, RESIDENT (blocks of `backward` per multiprocessor, limited by registers).
// Shapes: K = 4 directions, L = H W positions, D = CHANNELS, N = STATES, R = RANK, G = GROUPS of WIDE channels.

#define WIDE (32 * WARPS)
#define GROUPS ((CHANNELS + WIDE - 1) / WIDE)
#define NJ (STATES / 4)
#define RANK4 ((RANK + 3) / 4 * 4)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define ALL 0xffffffffu

#if ACT == 0
typedef float act;
typedef float4 kept_t;  // one state of a thread's four channels, between forward and backward
#else
typedef unsigned short act;
typedef uint2 kept_t;  // bfloat16 for half, too: states may exceed the range of half
#endif

#if GROUPS == 1
typedef act part_t;  // ddt, dB and dC as written by a block: final,
#else
typedef float part_t;  // or to be summed over groups
#endif

extern __shared__ float4 shared[];

struct Small {  // dt, B or C: strides in elements from image to image, pixel to pixel, direction to direction
    const act* data;
    long long image;
    int pixel, way;
};

struct Shape {
    int images, height, width, length;
    int segments, segment_tiles, tiles;  // a sequence is split into segments that blocks scan in parallel
    unsigned by_height;                  // 2^32 / height, rounded up: turns a division into a product
};

static __device__ __forceinline__ float value(act x) {
#if ACT == 0
    return x;
#elif ACT == 1
    return __uint_as_float((unsigned)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

static __device__ __forceinline__ act rounded(float x) {
#if ACT == 0
    return x;
#else
    act y;
#if ACT == 1
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
#endif
}

static __device__ __forceinline__ part_t as_part(float x) {
#if GROUPS == 1
    return rounded(x);
#else
    return x;
#endif
}

static __device__ __forceinline__ kept_t pack(float a, float b, float c, float d) {
#if ACT == 0
    return make_float4(a, b, c, d);
#else
    kept_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.x) : "f"(b), "f"(a));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.y) : "f"(d), "f"(c));
    return y;
#endif
}

static __device__ __forceinline__ void unpack(kept_t x, float& a, float& b, float& c, float& d) {
#if ACT == 0
    a = x.x, b = x.y, c = x.z, d = x.w;
#else
    a = __uint_as_float(x.x << 16), b = __uint_as_float(x.x & 0xffff0000u);
    c = __uint_as_float(x.y << 16), d = __uint_as_float(x.y & 0xffff0000u);
#endif
}

static __device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + e^x). 2 atanh(s) = s P(s^2) for s <= 1/3 keeps the relative error at a few roundings where e^x is tiny.
static __device__ __forceinline__ float softplus(float x) {
    float e = ex2(-fabsf(x) * LOG2_E), s = __fdividef(e, 2.f + e), t = s * s;
    float p = 0.2817827495238956f;
    p = fmaf(p, t, 0.2796061774962809f);
    p = fmaf(p, t, 0.4002490903185662f);
    p = fmaf(p, t, 0.6666631472059109f);
    p = fmaf(p, t, 2.000000007917827f);
    return fmaf(s, p, x > 0.f ? x : (x <= 0.f ? 0.f : x));  // the last branch lets a NaN through
}

// The derivative of softplus, 1 - e^-delta; a series where the difference would cancel.
static __device__ __forceinline__ float slope(float delta) {
    float series = delta * fmaf(delta, fmaf(delta, fmaf(delta, -1.f / 24, 1.f / 6), -0.5f), 1.f);
    return delta < 0.0625f ? series : 1.f - ex2(-delta * LOG2_E);
}

// Pixel index of position p in direction k.
static __device__ __forceinline__ int pixel_of(int way, int position, const Shape& shape) {
    int p = way < 2 ? position : shape.length - 1 - position;
    if (way % 2 == 0) return p;
    int column = shape.height == 1 ? p : __umulhi(p, shape.by_height);
    return (p - column * shape.height) * shape.width + column;
}

struct Place {  // which part of the work this block does, and which this thread
    int image, way, group, segment, channel, quad, states;
    bool real;  // the thread's channel exists
    __device__ Place(int first_segment = 0) {
        group = blockIdx.x % GROUPS;
        way = blockIdx.x / GROUPS % 4;
        image = blockIdx.x / GROUPS / 4;
        segment = first_segment + blockIdx.y;
        channel = group * WIDE + threadIdx.x;
        quad = threadIdx.x / 4 * 4;            // first of the four channels, within the block
        states = threadIdx.x % 4 * NJ;         // first of the NJ states
        real = channel < CHANNELS;
    }
};

// The thread's patch of A = -exp(A_log), to the base 2; zero for padded channels.
static __device__ __forceinline__ void load_decay(const float* A_log, const Place& at, float a2[4][NJ]) {
    for (int i = 0; i < 4; i++) {
        int channel = at.group * WIDE + at.quad + i;
        for (int j = 0; j < NJ; j++)
            a2[i][j] = channel < CHANNELS
                ? -__expf(A_log[((size_t)at.way * CHANNELS + channel) * STATES + at.states + j]) * LOG2_E : 0.f;
    }
}

// A tile's inputs are fetched into registers while the previous tile is scanned, then written to shared memory.
// VECTORS: rows are aligned and read 16 bytes at a time; otherwise element by element without prefetching.
#define PER_VECTOR (16 / (int)sizeof(act))
#define CHANNEL_VECTORS (TILE / PER_VECTOR)
#define STATE_VECTORS ((TILE * (STATES / PER_VECTOR) + WIDE - 1) / WIDE)
#define RANK_LOADS ((TILE * RANK + WIDE - 1) / WIDE)

static __device__ __forceinline__ void spread(uint4 from, float* to_s) {
    union { uint4 whole; act part[PER_VECTOR]; } x;
    x.whole = from;
#pragma unroll
    for (int v = 0; v < PER_VECTOR; v += 4)
        *(float4*)(to_s + v) = make_float4(value(x.part[v]), value(x.part[v + 1]), value(x.part[v + 2]), value(x.part[v + 3]));
}

// The block's channels of a (B,L,D) tensor, into rows of WIDE.
struct ChannelRows {
    uint4 ahead[VECTORS ? CHANNEL_VECTORS : 1];
    __device__ __forceinline__ void fetch(const act* from, const Place& at, const Shape& shape, int start) {
        if (!VECTORS) return;
#pragma unroll
        for (int i = 0; i < CHANNEL_VECTORS; i++) {
            int e = threadIdx.x + i * WIDE, p = e / (WIDE / PER_VECTOR), c = e % (WIDE / PER_VECTOR) * PER_VECTOR;
            int position = start + p, channel = at.group * WIDE + c;
            ahead[i] = make_uint4(0, 0, 0, 0);
            if (position < shape.length && channel < CHANNELS)
                ahead[i] = *(const uint4*)(from
                    + ((size_t)at.image * shape.length + pixel_of(at.way, position, shape)) * CHANNELS + channel);
        }
    }
    __device__ __forceinline__ void place(const act* from, const Place& at, const Shape& shape, int start, float* to_s) {
        if (VECTORS) {
#pragma unroll
            for (int i = 0; i < CHANNEL_VECTORS; i++) spread(ahead[i], to_s + (threadIdx.x + i * WIDE) * PER_VECTOR);
        } else {
            for (int p = 0; p < TILE; p++) {
                bool there = at.real && start + p < shape.length;
                size_t row = (size_t)at.image * shape.length + pixel_of(at.way, there ? start + p : 0, shape);
                to_s[p * WIDE + threadIdx.x] = there ? value(from[row * CHANNELS + at.channel]) : 0.f;
            }
        }
    }
};

// B or C of the block's direction, into rows of STATES.
struct StateRows {
    uint4 ahead[VECTORS ? STATE_VECTORS : 1];
    __device__ __forceinline__ void fetch(const Small& from, const Place& at, const Shape& shape, int start) {
        if (!VECTORS) return;
        const act* data = from.data + at.image * from.image + at.way * from.way;
#pragma unroll
        for (int i = 0; i < STATE_VECTORS; i++) {
            int e = threadIdx.x + i * WIDE, p = e / (STATES / PER_VECTOR), n = e % (STATES / PER_VECTOR) * PER_VECTOR;
            ahead[i] = make_uint4(0, 0, 0, 0);
            if (p < TILE && start + p < shape.length)
                ahead[i] = *(const uint4*)(data + (size_t)pixel_of(at.way, start + p, shape) * from.pixel + n);
        }
    }
    __device__ __forceinline__ void place(const Small& from, const Place& at, const Shape& shape, int start, float* to_s) {
        if (VECTORS) {
#pragma unroll
            for (int i = 0; i < STATE_VECTORS; i++) {
                int e = threadIdx.x + i * WIDE;
                if (e < TILE * STATES / PER_VECTOR) spread(ahead[i], to_s + e * PER_VECTOR);
            }
        } else {
            const act* data = from.data + at.image * from.image + at.way * from.way;
            for (int e = threadIdx.x; e < TILE * STATES; e += WIDE) {
                int position = start + e / STATES;
                to_s[e] = position < shape.length
                    ? value(data[(size_t)pixel_of(at.way, position, shape) * from.pixel + e % STATES]) : 0.f;
            }
        }
    }
};

// dt of the block's direction, into rows of RANK4; the rows are short and need not be aligned.
struct RankRows {
    act ahead[RANK_LOADS];
    __device__ __forceinline__ void fetch(const Small& from, const Place& at, const Shape& shape, int start) {
        const act* data = from.data + at.image * from.image + at.way * from.way;
#pragma unroll
        for (int i = 0; i < RANK_LOADS; i++) {
            int e = threadIdx.x + i * WIDE, position = start + e / RANK;
            ahead[i] = 0;
            if (e < TILE * RANK && position < shape.length)
                ahead[i] = data[(size_t)pixel_of(at.way, position, shape) * from.pixel + e % RANK];
        }
    }
    __device__ __forceinline__ void place(float* to_s) {
#pragma unroll
        for (int i = 0; i < RANK_LOADS; i++) {
            int e = threadIdx.x + i * WIDE;
            if (e < TILE * RANK) to_s[e / RANK * RANK4 + e % RANK] = value(ahead[i]);
        }
        constexpr int LACKING = RANK4 - RANK, ROW = LACKING ? LACKING : 1;
        for (int e = threadIdx.x; e < TILE * LACKING; e += WIDE)  // sums read complete rows
            to_s[e / ROW * RANK4 + RANK + e % ROW] = 0.f;
    }
};

static __device__ __forceinline__ void place_pixels(const Place& at, const Shape& shape, int start, int* pixel_s) {
    for (int p = threadIdx.x; p < TILE; p += WIDE)
        pixel_s[p] = pixel_of(at.way, min(start + p, shape.length - 1), shape);
}

// delta = softplus(dt_weight . dt + dt_bias) of the thread's channel; zero after the end of the sequence.
static __device__ __forceinline__ float lift(
    const float* dt_s, const float weight[RANK], float bias, int count, float* delta_s) {
    float sum = 0.f;
#pragma unroll 4
    for (int p = 0; p < TILE; p++) {
        float x = bias;
#pragma unroll
        for (int r = 0; r < RANK; r++) x = fmaf(dt_s[p * RANK4 + r], weight[r], x);
        float delta = p < count ? softplus(x) : 0.f;
        delta_s[p * WIDE + threadIdx.x] = delta;
        sum += delta;
    }
    return sum;
}

static __device__ __forceinline__ void load4(const float* from, float x[4]) {
    float4 v = *(const float4*)from;
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

static __device__ __forceinline__ void load_states(const float* from, float x[NJ]) {
    if (NJ % 4 == 0)
        for (int j = 0; j < NJ; j += 4) load4(from + j, x + j);
    else
        for (int j = 0; j < NJ; j++) x[j] = from[j];
}

// Sums four values over the four lanes of a quad; lane i of the quad gets the sum of value i.
static __device__ __forceinline__ float across_states(const float x[4]) {
    bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
    float k0 = high ? x[2] : x[0], k1 = high ? x[3] : x[1];
    k0 += __shfl_xor_sync(ALL, high ? x[0] : x[2], 2);
    k1 += __shfl_xor_sync(ALL, high ? x[1] : x[3], 2);
    float kept = odd ? k1 : k0;
    return kept + __shfl_xor_sync(ALL, odd ? k0 : k1, 1);
}

// The initial state of a segment, from the final states of earlier segments (computed with zero initial states) and
// their decay: the product of e^(delta A) is e^(A sum of delta). `step` is 1 in forward and -1 in backward.
static __device__ __forceinline__ void enter(
    const float4* ends, const float* sums, const Place& at, const Shape& shape, int step, const float a2[4][NJ],
    float h[4][NJ]) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < NJ; j++) h[i][j] = 0.f;
    if (shape.segments == 1) return;
    for (int s = step > 0 ? 0 : shape.segments - 1; s != at.segment; s += step) {
        size_t part = (size_t)s * gridDim.x + blockIdx.x;
        float sum[4], end[4];
        load4(sums + part * WIDE + at.quad, sum);
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            load4((const float*)&ends[(part * NJ + j) * WIDE + threadIdx.x], end);
#pragma unroll
            for (int i = 0; i < 4; i++) h[i][j] = fmaf(ex2(sum[i] * a2[i][j]), h[i][j], end[i]);
        }
    }
}

static __device__ __forceinline__ void leave(
    float4* ends, float* sums, const Place& at, const float h[4][NJ], float sum) {
    size_t part = (size_t)at.segment * gridDim.x + blockIdx.x;
    sums[part * WIDE + threadIdx.x] = sum;
#pragma unroll
    for (int j = 0; j < NJ; j++)
        ends[(part * NJ + j) * WIDE + threadIdx.x] = make_float4(h[0][j], h[1][j], h[2][j], h[3][j]);
}

// One segment in forward. CARRY: computes only its final state from a zero initial state; otherwise y of this
// direction and the states at the start of each tile.
template <bool CARRY>
static __device__ __forceinline__ void scan_forward(
    const act* u, Small dt, Small B, Small C, const float* weight, const float* bias, const float* A_log,
    const float* skip, act* y, kept_t* kept, float4* ends, float* sums, Shape shape) {
    float* delta_s = (float*)shared;
    float* u_s = delta_s + TILE * WIDE;
    float* b_s = u_s + TILE * WIDE;
    float* c_s = b_s + TILE * STATES;
    float* dt_s = c_s + TILE * STATES;
    int* pixel_s = (int*)(dt_s + TILE * RANK4);
    const Place at;
    const size_t row = (size_t)at.way * CHANNELS + at.channel;

    float own_weight[RANK], a2[4][NJ], h[4][NJ];
    for (int r = 0; r < RANK; r++) own_weight[r] = at.real ? weight[row * RANK + r] : 0.f;
    const float own_bias = at.real ? bias[row] : 0.f, own_skip = at.real ? skip[row] : 0.f;
    load_decay(A_log, at, a2);
    if (CARRY) {
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < NJ; j++) h[i][j] = 0.f;
    } else {
        enter(ends, sums, at, shape, 1, a2, h);
        y += ((size_t)at.way * shape.images + at.image) * shape.length * CHANNELS + at.channel;
    }
    float sum = 0.f;
    ChannelRows u_rows;
    StateRows b_rows, c_rows;
    RankRows dt_rows;
    auto fetch = [&](int tile) {
        u_rows.fetch(u, at, shape, tile * TILE);
        b_rows.fetch(B, at, shape, tile * TILE);
        if (!CARRY) c_rows.fetch(C, at, shape, tile * TILE);
        dt_rows.fetch(dt, at, shape, tile * TILE);
    };
    const int first = at.segment * shape.segment_tiles, last = min(first + shape.segment_tiles, shape.tiles);
    fetch(first);
    for (int tile = first; tile < last; tile++) {
        const int start = tile * TILE, count = min(TILE, shape.length - start);
        __syncthreads();
        u_rows.place(u, at, shape, start, u_s);
        b_rows.place(B, at, shape, start, b_s);
        if (!CARRY) c_rows.place(C, at, shape, start, c_s);
        dt_rows.place(dt_s);
        place_pixels(at, shape, start, pixel_s);
        __syncthreads();
        fetch(tile + 1);
        sum += lift(dt_s, own_weight, own_bias, count, delta_s);
        __syncwarp();  // a warp scans the channels whose delta it computed
        if (!CARRY && kept) {
            kept_t* to = kept + ((size_t)blockIdx.x * shape.tiles + tile) * NJ * WIDE + threadIdx.x;
#pragma unroll
            for (int j = 0; j < NJ; j++) to[j * WIDE] = pack(h[0][j], h[1][j], h[2][j], h[3][j]);
        }
#pragma unroll 4
        for (int p = 0; p < TILE; p++) {
            float delta[4], fed[4], b[NJ], c[NJ], out[4];
            load4(delta_s + p * WIDE + at.quad, delta);
            load4(u_s + p * WIDE + at.quad, fed);
            load_states(b_s + p * STATES + at.states, b);
            if (!CARRY) load_states(c_s + p * STATES + at.states, c);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                fed[i] *= delta[i];
                out[i] = 0.f;
#pragma unroll
                for (int j = 0; j < NJ; j++) {
                    h[i][j] = fmaf(ex2(delta[i] * a2[i][j]), h[i][j], fed[i] * b[j]);
                    if (!CARRY) out[i] = fmaf(c[j], h[i][j], out[i]);
                }
            }
            if (!CARRY) {
                float total = fmaf(own_skip, u_s[p * WIDE + threadIdx.x], across_states(out));
                if (at.real && p < count) y[(size_t)pixel_s[p] * CHANNELS] = rounded(total);
            }
        }
    }
    if (CARRY) leave(ends, sums, at, h, sum);
}

extern "C" __global__ void __launch_bounds__(WIDE) forward_carry(
    const act* u, Small dt, Small B, Small C, const float* weight, const float* bias, const float* A_log,
    const float* skip, act* y, kept_t* kept, float4* ends, float* sums, Shape shape) {
    scan_forward<true>(u, dt, B, C, weight, bias, A_log, skip, y, kept, ends, sums, shape);
}

extern "C" __global__ void __launch_bounds__(WIDE) forward(
    const act* u, Small dt, Small B, Small C, const float* weight, const float* bias, const float* A_log,
    const float* skip, act* y, kept_t* kept, float4* ends, float* sums, Shape shape) {
    scan_forward<false>(u, dt, B, C, weight, bias, A_log, skip, y, kept, ends, sums, shape);
}

// The gradient at a segment's start, if the gradient at its end is zero.
extern "C" __global__ void __launch_bounds__(WIDE) backward_carry(
    const act* dy, Small dt, Small C, const float* weight, const float* bias, const float* A_log, float4* ends,
    float* sums, Shape shape) {
    float* delta_s = (float*)shared;
    float* dy_s = delta_s + TILE * WIDE;
    float* c_s = dy_s + TILE * WIDE;
    float* dt_s = c_s + TILE * STATES;
    const Place at(1);  // the first segment's is not needed
    const size_t row = (size_t)at.way * CHANNELS + at.channel;

    float own_weight[RANK], a2[4][NJ], dh[4][NJ] = {};
    for (int r = 0; r < RANK; r++) own_weight[r] = at.real ? weight[row * RANK + r] : 0.f;
    const float own_bias = at.real ? bias[row] : 0.f;
    load_decay(A_log, at, a2);
    float sum = 0.f;
    ChannelRows dy_rows;
    StateRows c_rows;
    RankRows dt_rows;
    auto fetch = [&](int tile) {
        dy_rows.fetch(dy, at, shape, tile * TILE);
        c_rows.fetch(C, at, shape, tile * TILE);
        dt_rows.fetch(dt, at, shape, tile * TILE);
    };
    const int first = at.segment * shape.segment_tiles, last = min(first + shape.segment_tiles, shape.tiles);
    fetch(last - 1);
    for (int tile = last - 1; tile >= first; tile--) {
        const int start = tile * TILE, count = min(TILE, shape.length - start);
        __syncthreads();
        dy_rows.place(dy, at, shape, start, dy_s);
        c_rows.place(C, at, shape, start, c_s);
        dt_rows.place(dt_s);
        __syncthreads();
        fetch(max(tile - 1, 0));
        sum += lift(dt_s, own_weight, own_bias, count, delta_s);
        __syncwarp();
#pragma unroll 4
        for (int p = TILE - 1; p >= 0; p--) {
            float delta[4], g[4], c[NJ];
            load4(delta_s + p * WIDE + at.quad, delta);
            load4(dy_s + p * WIDE + at.quad, g);
            load_states(c_s + p * STATES + at.states, c);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < NJ; j++) dh[i][j] = fmaf(g[i], c[j], dh[i][j]) * ex2(delta[i] * a2[i][j]);
        }
    }
    leave(ends, sums, at, dh, sum);
}

// The states after position p from those before it; KEEP stores the latter in shared memory.
template <bool KEEP>
static __device__ __forceinline__ void step_forward(
    int p, const Place& at, const float* delta_s, const float* u_s, const float* b_s, const float a2[4][NJ],
    float h[4][NJ], kept_t* keep_s) {
    float delta[4], fed[4], b[NJ];
    load4(delta_s + p * WIDE + at.quad, delta);
    load4(u_s + p * WIDE + at.quad, fed);
    load_states(b_s + p * STATES + at.states, b);
#pragma unroll
    for (int i = 0; i < 4; i++) fed[i] *= delta[i];
#pragma unroll
    for (int j = 0; j < NJ; j++) {
        if (KEEP) keep_s[j * WIDE + threadIdx.x] = pack(h[0][j], h[1][j], h[2][j], h[3][j]);
#pragma unroll
        for (int i = 0; i < 4; i++) h[i][j] = fmaf(ex2(delta[i] * a2[i][j]), h[i][j], fed[i] * b[j]);
    }
}

// Backward step of position q of the tile; p is the index of its states in h_s. On entry h is the state after it, on
// return the state before it; dh likewise. Still to be summed over lanes: dB and dC over channels, the gradients of
// delta·u and of delta (to the base 2) over states.
static __device__ __forceinline__ void step_backward(
    int p, int q, const Place& at, const float* delta_s, const float* u_s, const float* dy_s, const float* b_s,
    const float* c_s, const kept_t* h_s, const float a2[4][NJ], float h[4][NJ], float dh[4][NJ], float da[4][NJ],
    float to_small[2 * NJ], float to_fed[4], float to_delta[4]) {
    float delta[4], value_u[4], g[4], b[NJ], c[NJ], before[4][NJ];
    load4(delta_s + q * WIDE + at.quad, delta);
    load4(u_s + q * WIDE + at.quad, value_u);
    load4(dy_s + q * WIDE + at.quad, g);
    load_states(b_s + q * STATES + at.states, b);
    load_states(c_s + q * STATES + at.states, c);
#pragma unroll
    for (int j = 0; j < NJ; j++)
        unpack(h_s[(p * NJ + j) * WIDE + threadIdx.x], before[0][j], before[1][j], before[2][j], before[3][j]);
#pragma unroll
    for (int j = 0; j < 2 * NJ; j++) to_small[j] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float fed = delta[i] * value_u[i];
        to_fed[i] = to_delta[i] = 0.f;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            to_small[NJ + j] = fmaf(g[i], h[i][j], to_small[NJ + j]);
            float d = fmaf(g[i], c[j], dh[i][j]);
            to_small[j] = fmaf(d, fed, to_small[j]);
            to_fed[i] = fmaf(d, b[j], to_fed[i]);
            d *= ex2(delta[i] * a2[i][j]);
            float through = d * before[i][j];
            da[i][j] = fmaf(through, delta[i], da[i][j]);
            to_delta[i] = fmaf(through, a2[i][j], to_delta[i]);
            dh[i][j] = d;
            h[i][j] = before[i][j];
        }
    }
}

// Sums 2 NJ values over the eight quads of a warp; lane (quad q, states s) gets the sums of values q, q + 8, ... of
// its states, at sums[q / 8 ...]: the values are dB (0..NJ-1) and dC (NJ..2 NJ-1).
static __device__ __forceinline__ void across_channels(float x[2 * NJ], float* to) {
    // Padded to a multiple of eight values; the compiler removes unused ones.
    constexpr int EIGHTS = (2 * NJ + 7) / 8;
    int quad = threadIdx.x / 4 % 8;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        float v[8];
#pragma unroll
        for (int m = 0; m < 8; m++) v[m] = e * 8 + m < 2 * NJ ? x[e * 8 + m] : 0.f;
#pragma unroll
        for (int half = 4; half >= 1; half /= 2) {
            bool high = quad & half;
#pragma unroll
            for (int m = 0; m < half; m++) {
                float keep = high ? v[m + half] : v[m], give = high ? v[m] : v[m + half];
                v[m] = keep + __shfl_xor_sync(ALL, give, 4 * half);
            }
        }
        int m = e * 8 + quad;
        if (m < 2 * NJ) to[(m / NJ) * STATES + threadIdx.x % 4 * NJ + m % NJ] = v[0];
    }
}

// One segment in backward. Writes du of this direction in pixel order; ddt, dB, dC of this group of channels (with more
// than one group, one after the other, group by group); and the parameters' gradients of this image and segment, a row
// (A_log (N), weight (R), bias, skip) per channel.
extern "C" __global__ void __launch_bounds__(WIDE, RESIDENT) backward(
    const act* dy, const act* u, Small dt, Small B, Small C, const float* weight, const float* bias,
    const float* A_log, const float* skip, const kept_t* kept, act* du, part_t* ddt, part_t* dB, part_t* dC,
    float* dparameters, const float4* ends, const float* sums, Shape shape) {
    kept_t* h_s = (kept_t*)shared;  // the states before each of SUB positions
    float* delta_s = (float*)(h_s + SUB * NJ * WIDE);
    float* u_s = delta_s + TILE * WIDE;
    float* dy_s = u_s + TILE * WIDE;
    float* b_s = dy_s + TILE * WIDE;
    float* c_s = b_s + TILE * STATES;
    float* dt_s = c_s + TILE * STATES;
    float* weight_s = dt_s + TILE * RANK4;  // (R, WIDE)
    float* dweight_s = weight_s + RANK4 * WIDE;
    float* small_s = dweight_s + RANK4 * WIDE;  // dB and dC of each warp
    float* lifted_s = u_s;                      // the lane's own channel, once the entire warp has read u there
    int* pixel_s = (int*)(small_s + TILE * WARPS * 2 * STATES);
    const Place at;
    const size_t row = (size_t)at.way * CHANNELS + at.channel;
    const int warp = threadIdx.x / 32;

    float a2[4][NJ], dh[4][NJ], da[4][NJ] = {}, dbias = 0.f, dskip = 0.f;
    for (int r = 0; r < RANK4; r++) {
        weight_s[r * WIDE + threadIdx.x] = at.real && r < RANK ? weight[row * RANK + r] : 0.f;
        dweight_s[r * WIDE + threadIdx.x] = 0.f;
    }
    const float own_bias = at.real ? bias[row] : 0.f, own_skip = at.real ? skip[row] : 0.f;
    load_decay(A_log, at, a2);
    enter(ends, sums, at, shape, -1, a2, dh);
    du += ((size_t)at.way * shape.images + at.image) * shape.length * CHANNELS + at.channel;
    const size_t group_at = (size_t)at.group * shape.images * shape.length * 4 * (RANK + 2 * STATES);
    ddt += group_at, dB += group_at, dC += group_at;

    ChannelRows u_rows, dy_rows;
    StateRows b_rows, c_rows;
    RankRows dt_rows;
    kept_t kept_ahead[NJ];
    auto fetch = [&](int tile) {
        u_rows.fetch(u, at, shape, tile * TILE);
        dy_rows.fetch(dy, at, shape, tile * TILE);
        b_rows.fetch(B, at, shape, tile * TILE);
        c_rows.fetch(C, at, shape, tile * TILE);
        dt_rows.fetch(dt, at, shape, tile * TILE);
        const kept_t* from = kept + ((size_t)blockIdx.x * shape.tiles + tile) * NJ * WIDE + threadIdx.x;
#pragma unroll
        for (int j = 0; j < NJ; j++) kept_ahead[j] = from[j * WIDE];
    };
    const int first = at.segment * shape.segment_tiles, last = min(first + shape.segment_tiles, shape.tiles);
    fetch(last - 1);
    for (int tile = last - 1; tile >= first; tile--) {
        const int start = tile * TILE, count = min(TILE, shape.length - start);
        __syncthreads();
        u_rows.place(u, at, shape, start, u_s);
        dy_rows.place(dy, at, shape, start, dy_s);
        b_rows.place(B, at, shape, start, b_s);
        c_rows.place(C, at, shape, start, c_s);
        dt_rows.place(dt_s);
        place_pixels(at, shape, start, pixel_s);
        float h[4][NJ], h_first[4][NJ];
#pragma unroll
        for (int j = 0; j < NJ; j++) unpack(kept_ahead[j], h_first[0][j], h_first[1][j], h_first[2][j], h_first[3][j]);
        __syncthreads();
        fetch(max(tile - 1, 0));
        {
            float own_weight[RANK];
#pragma unroll
            for (int r = 0; r < RANK; r++) own_weight[r] = weight_s[r * WIDE + threadIdx.x];
            lift(dt_s, own_weight, own_bias, count, delta_s);
        }
        __syncwarp();

        // States need the most memory, so shared memory only holds those of SUB positions at a time, last first.
#pragma unroll 1
        for (int sub = TILE - SUB; sub >= 0; sub -= SUB) {
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < NJ; j++) h[i][j] = h_first[i][j];
#pragma unroll 4
            for (int p = 0; p < sub; p++) step_forward<false>(p, at, delta_s, u_s, b_s, a2, h, nullptr);
#pragma unroll 4
            for (int p = 0; p < SUB; p++) step_forward<true>(sub + p, at, delta_s, u_s, b_s, a2, h, h_s + p * NJ * WIDE);
            // UNROLL positions at a time, so that the shuffles of one overlap with those of the other.
#pragma unroll 1
            for (int p = SUB - UNROLL; p >= 0; p -= UNROLL) {
                float to_small[UNROLL][2 * NJ], to_fed[UNROLL][4], to_delta[UNROLL][4];
#pragma unroll
                for (int m = UNROLL - 1; m >= 0; m--)
                    step_backward(p + m, sub + p + m, at, delta_s, u_s, dy_s, b_s, c_s, h_s, a2, h, dh, da, to_small[m],
                        to_fed[m], to_delta[m]);
                // From here on a lane works on the channel with its own number.
#pragma unroll
                for (int m = UNROLL - 1; m >= 0; m--) {
                    const int q = sub + p + m, own = q * WIDE + threadIdx.x;
                    float of_fed = across_states(to_fed[m]), of_delta = across_states(to_delta[m]) * LN_2;
                    float own_u = u_s[own], own_g = dy_s[own], own_delta = delta_s[own];
                    float dlifted = fmaf(own_u, of_fed, of_delta) * slope(own_delta);
                    if (at.real && q < count)
                        du[(size_t)pixel_s[q] * CHANNELS] = rounded(fmaf(own_delta, of_fed, own_skip * own_g));
                    dskip = fmaf(own_g, own_u, dskip);
                    dbias += dlifted;
                    lifted_s[own] = dlifted;
                    across_channels(to_small[m], small_s + (q * WARPS + warp) * 2 * STATES);
                }
            }
        }
        __syncthreads();
        for (int e = threadIdx.x; e < count * 2 * STATES; e += WIDE) {
            int p = e / (2 * STATES), n = e % (2 * STATES);
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += small_s[(p * WARPS + w) * 2 * STATES + n];
            size_t to = ((size_t)at.image * shape.length + pixel_s[p]) * 4 + at.way;
            (n < STATES ? dB : dC)[to * STATES + n % STATES] = as_part(total);
        }
        {
            float own[TILE];
#pragma unroll
            for (int p = 0; p < TILE; p++) own[p] = lifted_s[p * WIDE + threadIdx.x];
#pragma unroll 1
            for (int r = 0; r < RANK4; r += 4) {
                float total[4], x[4];
                for (int i = 0; i < 4; i++) total[i] = dweight_s[(r + i) * WIDE + threadIdx.x];
#pragma unroll
                for (int p = 0; p < TILE; p++) {
                    load4(dt_s + p * RANK4 + r, x);
                    for (int i = 0; i < 4; i++) total[i] = fmaf(own[p], x[i], total[i]);
                }
                for (int i = 0; i < 4; i++) dweight_s[(r + i) * WIDE + threadIdx.x] = total[i];
            }
        }
        // ddt = dlifted . dt_weight: a warp sums over the block's channels, four ranks r at once.
        for (int p = warp; p < count; p += WARPS) {
            size_t to = ((size_t)at.image * shape.length + pixel_s[p]) * 4 + at.way;
            float dl[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) dl[w] = lifted_s[p * WIDE + w * 32 + threadIdx.x % 32];
#pragma unroll
            for (int first = 0; first < RANK4; first += 4) {
                float v[4] = {};
#pragma unroll
                for (int w = 0; w < WARPS; w++)
#pragma unroll
                    for (int r = 0; r < 4; r++)
                        v[r] = fmaf(dl[w], weight_s[(first + r) * WIDE + w * 32 + threadIdx.x % 32], v[r]);
                float total = across_states(v);
                for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(ALL, total, other);
                int r = first + threadIdx.x % 32;
                if (threadIdx.x % 32 < 4 && r < RANK) ddt[to * RANK + r] = as_part(total);
            }
        }
    }

    const int width = STATES + RANK + 2;
    float* to = dparameters + ((size_t)at.segment * shape.images + at.image) * 4 * CHANNELS * width;
    for (int i = 0; i < 4; i++) {
        int channel = at.group * WIDE + at.quad + i;
        for (int j = 0; j < NJ && channel < CHANNELS; j++)  // dA_log = dA . A
            to[((size_t)at.way * CHANNELS + channel) * width + at.states + j] = da[i][j] * a2[i][j] * LN_2;
    }
    if (at.real) {
        to += row * width + STATES;
        for (int r = 0; r < RANK; r++) to[r] = dweight_s[r * WIDE + threadIdx.x];
        to[RANK] = dbias;
        to[RANK + 1] = dskip;
    }
}

// to[e] = the sum of four planes of `size` elements.
extern "C" __global__ void merge(const act* planes, act* to, long long size) {
    constexpr int VECTOR = 16 / sizeof(act);
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (size % VECTOR == 0) {
        if (index * VECTOR >= size) return;
        union { uint4 whole; act part[VECTOR]; } x[4], sum;
#pragma unroll
        for (int k = 0; k < 4; k++) x[k].whole = *(const uint4*)(planes + k * size + index * VECTOR);
#pragma unroll
        for (int v = 0; v < VECTOR; v++)
            sum.part[v] = rounded((value(x[0].part[v]) + value(x[2].part[v])) + (value(x[1].part[v]) + value(x[3].part[v])));
        *(uint4*)(to + index * VECTOR) = sum.whole;
    } else {
        for (long long e = index * VECTOR; e < min((index + 1) * VECTOR, size); e++)
            to[e] = rounded((value(planes[e]) + value(planes[2 * size + e]))
                + (value(planes[size + e]) + value(planes[3 * size + e])));
    }
}

// Sums ddt, dB and dC over the groups of channels: ddt (rows, R), dB and dC (rows, N) one after the other, in float32.
extern "C" __global__ void sum_groups(const float* parts, act* ddt, act* dB, act* dC, long long rows) {
    const long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4, size = rows * (RANK + 2 * STATES);
    if (e >= size) return;  // rows is a multiple of 4, and so are the offsets of the three
    float total[4] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float x[4];
        load4(parts + g * size + e, x);
        for (int i = 0; i < 4; i++) total[i] += x[i];
    }
    const long long of_B = e - rows * RANK, of_C = of_B - rows * STATES;
    act* to = of_B < 0 ? ddt + e : of_C < 0 ? dB + of_B : dC + of_C;
    union { act part[4]; kept_t whole; } sum;
    for (int i = 0; i < 4; i++) sum.part[i] = rounded(total[i]);
    *(kept_t*)to = sum.whole;
}

// Gradients of the parameters: sums `parts` rows into four separate tensors.
extern "C" __global__ void sum_parameters(
    const float* dparameters, float* dA_log, float* dweight, float* dbias, float* dskip, int parts) {
    constexpr int WIDTH = STATES + RANK + 2, SIZE = 4 * CHANNELS * WIDTH;
    const int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= SIZE) return;
    float total = 0.f;
#pragma unroll 8
    for (int part = 0; part < parts; part++) total += dparameters[(size_t)part * SIZE + e];
    const int row = e / WIDTH, n = e % WIDTH;
    if (n < STATES) dA_log[row * STATES + n] = total;
    else if (n < STATES + RANK) dweight[row * RANK + n - STATES] = total;
    else (n == STATES + RANK ? dbias : dskip)[row] = total;
}
