// What lies between a half's linears, in one pass over its maps: the compiled part of `fused.py`, for CPUs.
//
//     modulate(a, v) = (conv_dw(gelu(a)) + bias) * v
//     mix(u)         = g + gelu(conv_dw(g) + bias)  with  g = gelu(u)
//
// `compiled.py` calls the functions at this file's end. It takes a C++17 compiler that knows the vector types of GCC and
// Clang, and nothing else.
//
// Maps are (N, H, W, C), weights (C, k, k). A task is one image and as many channels as fit into a vector of LANE_BYTES,
// which are called lanes, or into a few. It goes down the rows and holds those that a convolution needs in a `Ring`, small
// enough for a cache: each map is read once and written once. A result may take the place of an argument where the
// functions at the end say so. Gradients of parameters are written for each image and summed up by the caller: the number
// of threads has no influence on a result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <utility>
#include <vector>

namespace {

using Index = std::int64_t;
using Floats = float __attribute__((vector_size(LANE_BYTES)));
using Doubles = double __attribute__((vector_size(LANE_BYTES)));
using Bits = std::uint32_t __attribute__((vector_size(LANE_BYTES)));
using UpperBits = std::uint16_t __attribute__((vector_size(LANE_BYTES / 2)));

struct Bfloat16 { std::uint16_t upper_bits; };  // of a float

// What numbers of a map are computed with.
template <class T> struct Compute { using Number = float; using Lanes = Floats; };
template <> struct Compute<double> { using Number = double; using Lanes = Doubles; };
template <class T> using NumberFor = typename Compute<T>::Number;
template <class T> using LanesFor = typename Compute<T>::Lanes;
template <class Lanes> constexpr int LANES = sizeof(Lanes) / sizeof(Lanes{}[0]);
template <class T> constexpr int IN_A_LINE = 64 / int(sizeof(T)) / LANES<LanesFor<T>>;  // vectors of a map in a cache line

// --------------------------------------------------------------------------------------------- single instructions

// For what compilers find them for only in part, in GCC's and Clang's vector types: the larger and the smaller of two
// numbers, or NaN if the second is; 16 bits in 32; the sum of all lanes, halves first.
#if LANE_BYTES == 64
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Bits widen(UpperBits x) { return (Bits)_mm512_cvtepu16_epi32((__m256i)x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
inline double sum_of(Doubles x) { return _mm512_reduce_add_pd((__m512d)x); }
#else
inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Bits widen(UpperBits x) { return (Bits)_mm256_cvtepu16_epi32((__m128i)x); }
inline float sum_of(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline double sum_of(Doubles x) { return x[0] + x[2] + (x[1] + x[3]); }
#endif

// ---------------------------------------------------------------------------------------------- loading and storing

template <class T> inline LanesFor<T> load_all(const T* from) {
    LanesFor<T> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Floats load_all(const Bfloat16* from) {
    UpperBits upper;
    std::memcpy(&upper, from, sizeof upper);
    return (Floats)(widen(upper) << 16);
}

template <class T> inline void store_all(T* to, LanesFor<T> x) { std::memcpy(to, &x, sizeof x); }

inline void store_all(Bfloat16* to, Floats x) {
#ifdef __AVX512BF16__
    __m256bh upper = _mm512_cvtneps_pbh((__m512)x);  // numbers below 2^-126 become 0
#else
    Bits bits = (Bits)x;
    Bits nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // ties to even
    UpperBits upper = __builtin_convertvector(x == x ? nearest : Bits{} + 0x7fc0, UpperBits);
#endif
    std::memcpy(to, &upper, sizeof upper);
}

// Fewer than all lanes: at the last channels, where their number is no multiple of the lanes. That it is one of half the
// lanes is common, and faster as a case of its own.
template <class T> inline LanesFor<T> load(const T* from, int count) {
    constexpr int all = LANES<LanesFor<T>>;
    if (count == all) return load_all(from);
    T some[all] = {};
    std::memcpy(some, from, count == all / 2 ? sizeof some / 2 : count * sizeof(T));
    return load_all(some);
}

template <class T> inline void store(T* to, LanesFor<T> x, int count) {
    constexpr int all = LANES<LanesFor<T>>;
    if (count == all) return store_all(to, x);
    T some[all];
    store_all(some, x);
    if (count == all / 2) std::memcpy(to, some, sizeof some / 2);
    else std::memcpy(to, some, count * sizeof(T));
}

// `size` parameters for each of `count` channels that lie one after the other.
template <class Lanes, class Number> inline void load_weights(const Number* from, Index size, int count, Lanes* to) {
    for (Index i = 0; i < size; i++) {
        to[i] = Lanes{};
        for (int lane = 0; lane < count; lane++) to[i][lane] = from[lane * size + i];
    }
}

// The `size` parameters of all channels, as many channels at a time as there are lanes.
template <class Lanes, class Number> std::vector<Lanes> in_lanes(const Number* from, Index size, Index channels) {
    std::vector<Lanes> result((channels + LANES<Lanes> - 1) / LANES<Lanes> * size);
    for (Index c = 0; c < channels; c += LANES<Lanes>)
        load_weights(from + c * size, size, int(std::min<Index>(LANES<Lanes>, channels - c)), &result[c / LANES<Lanes> * size]);
    return result;
}

template <class Lanes, class Number> inline void store_weights(Number* to, Index size, int count, const Lanes* from) {
    for (Index i = 0; i < size; i++)
        for (int lane = 0; lane < count; lane++) to[lane * size + i] = from[i][lane];
}

// ------------------------------------------------------------------------------------------------------------- GELU

// 2^y for y <= 0, within 1.3e-7 of the value; below -100 it stays 2^-100, since processors are slow with still less.
inline Floats exp2(Floats y) {
    y = larger(Floats{} - 100.0f, y);
    constexpr float rounding = 12582912.0f + 127.0f;  // from 2^23 on, floats are integers: the last bits are y's exponent
    Floats shifted = y + rounding;
    Floats rest = y - (shifted - rounding);
    Floats power = rest * 1.32765e-3f + 9.67555e-3f;
    power = power * rest + 5.550713e-2f;
    power = power * rest + 2.402212e-1f;
    power = power * rest + 6.9314697e-1f;
    power = power * rest + 1.0f;
    return power * (Floats)((Bits)shifted << 23);
}

// The standard normal distribution: its density at x and what lies below x.
struct Normal { Floats density, below; };

// The tail is the density's exponential times a polynomial of 1 / (1 + 0.28 |x|), fitted to it so that the error of GELU
// is at most 1.1e-8 before any rounding.
inline Normal normal(Floats x) {
    Floats z = (Floats)((Bits)x & 0x7fffffff);
    Floats decay = exp2(z * z * -0.72134752f);
    Floats t = 1.0f / (z * 0.28f + 1.0f);
    Floats tail = t * -0.1063285f + 0.3920669f;
    tail = tail * t - 0.24066941f;
    tail = tail * t + 0.27197242f;
    tail = tail * t + 0.06622943f;
    tail = tail * t + 0.11672915f;
    tail = tail * t * decay;
    return {decay * 0.39894228f, x < 0.0f ? tail : 1.0f - tail};
}

// GELU for a map of T. What lies in a map of bfloat16 has 8 bits, for which the polynomial is good enough: its error is at
// most 4e-5, and beyond |x| = 4.4 the result is 0 or x.
template <class T> inline Floats gelu(Floats x) { return x * normal(x).below; }

template <> inline Floats gelu<Bfloat16>(Floats x) {
    Floats square = x * x;
    Floats below = square * 3.57277595e-11f - 3.75676800e-9f;
    below = below * square + 1.74176193e-7f;
    below = below * square - 4.72651466e-6f;
    below = below * square + 8.43101302e-5f;
    below = below * square - 1.05509579e-3f;
    below = below * square + 9.64337261e-3f;
    below = below * square - 6.60769877e-2f;
    below = below * square + 3.98761914e-1f;
    below = below * x + 0.5f;
    return x * smaller(Floats{} + 1.0f, larger(Floats{}, below));
}

template <class Lanes> struct Gelu { Lanes value, slope; };

inline Gelu<Floats> gelu_and_slope(Floats x) {
    Normal n = normal(x);
    return {x * n.below, n.below + x * n.density};
}

// float64 is for checking gradients: exact, not fast.
inline Gelu<Doubles> gelu_and_slope(Doubles x) {
    Gelu<Doubles> y;
    for (int i = 0; i < LANES<Doubles>; i++) {
        double below = 0.5 * std::erfc(-x[i] * M_SQRT1_2), density = std::exp(-0.5 * x[i] * x[i]) * 0.3989422804014327;
        y.value[i] = x[i] * below;
        y.slope[i] = below + x[i] * density;
    }
    return y;
}

template <class T> inline Doubles gelu(Doubles x) { return gelu_and_slope(x).value; }

// ------------------------------------------------------------------------------------------------------ convolutions

constexpr int TILE = 14;  // results of a convolution that are computed together, in registers

// The last k rows of a map, with k / 2 columns of zeros on both sides; row y takes the place of row y - k. A column may have
// several vectors, one beside the other.
template <class Lanes, int VECTORS = 1> struct Ring {
    Index k, columns;
    std::vector<Lanes> rows;
    Ring(Index k, Index w) : k(k), columns(w + k - 1 + TILE), rows(k * columns * VECTORS) {}
    Lanes* with_border(Index y) { return &rows[(y + k) % k * columns * VECTORS]; }  // from column -(k / 2)
    Lanes* row(Index y) { return with_border(y) + k / 2 * VECTORS; }                // from column 0
};

// Keeps the compiler from holding what was read from there for the next round of a loop. AVX2's 16 registers are needed for
// the sums; AVX-512's 32 take both.
template <class Lanes> inline void read_anew([[maybe_unused]] const Lanes*& from) {
#if LANE_BYTES == 32
    asm("" : "+r"(from));
#endif
}

// sums[x] = sum over ky, kx of weight[ky][kx] * map[y + ky - k / 2][x + kx - k / 2], for COUNT columns from `first`
template <int COUNT, class Lanes>
inline void convolve(Ring<Lanes>& ring, Index h, Index y, Index first, const Lanes* weight, Lanes* sums) {
    Index k = ring.k, r = k / 2;
    Lanes total[COUNT] = {};
    for (Index ky = std::max<Index>(0, r - y); ky < std::min(k, h + r - y); ky++) {
        const Lanes* row = ring.with_border(y + ky - r) + first;
        for (Index kx = 0; kx < k; kx++, row++) {
            read_anew(row);
            Lanes w = weight[ky * k + kx];
            #pragma GCC unroll 16
            for (int i = 0; i < COUNT; i++) total[i] += w * row[i];
        }
    }
    #pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) sums[first + i] = total[i];
}

// A row of results; behind its w columns `sums` has room for TILE more.
template <class Lanes>
inline void convolve_row(Ring<Lanes>& ring, Index h, Index w, Index y, const Lanes* weight, Lanes* sums) {
    Index x = 0;
    for (; w - x > TILE / 2; x += TILE) convolve<TILE>(ring, h, y, x, weight, sums);
    if (x < w) convolve<TILE / 2>(ring, h, y, x, weight, sums);
}

// total[kx] += sum over x of grad[x] * row[x + kx], for COUNT columns of the weight
template <int COUNT, class Lanes>
inline void correlate(const Lanes* grad, const Lanes* row, Index w, Lanes* total) {
    Lanes sums[COUNT] = {};
    for (Index x = 0; x < w; x++, row++) {
        read_anew(row);
        Lanes d = grad[x];
        #pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) sums[i] += d * row[i];
    }
    #pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) total[i] += sums[i];
}

// The same for any number of columns; they are cut into parts for which there are registers.
template <class Lanes>
inline void correlate_row(const Lanes* grad, const Lanes* row, Index w, Index k, Lanes* total) {
    for (; k >= 11; k -= 11, row += 11, total += 11) correlate<11>(grad, row, w, total);
    for (; k >= 7; k -= 7, row += 7, total += 7) correlate<7>(grad, row, w, total);
    for (; k >= 3; k -= 3, row += 3, total += 3) correlate<3>(grad, row, w, total);
    for (; k >= 1; k -= 1, row += 1, total += 1) correlate<1>(grad, row, w, total);
}

// A row of a 3 x 3 convolution, of each column's vector of that number. It is a loop of its own, as are those of GELU and of
// the weight's gradient, because each needs nearly all registers. `convolve_row` would do it, too, with nine readings for
// each result and in 1.1 times the time.
template <class Lanes, int N>
inline void convolve3_row(Ring<Lanes, N>& ring, int number, Index w, Index y, const Lanes* weight, Lanes* sums) {
    const Lanes *above = ring.with_border(y - 1) + number, *here = ring.with_border(y) + number,
                *below = ring.with_border(y + 1) + number, w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3],
                w4 = weight[4], w5 = weight[5], w6 = weight[6], w7 = weight[7], w8 = weight[8];
    sums += number;
    for (Index x = 0; x < w; x++, above += N, here += N, below += N, sums += N)
        *sums = above[0] * w0 + above[N] * w1 + above[2 * N] * w2 + here[0] * w3 + here[N] * w4 + here[2 * N] * w5 +
                below[0] * w6 + below[N] * w7 + below[2 * N] * w8;
}

// What a row adds to the gradient of its weight: all nine sums at once, since three alone would wait for each other.
template <class Lanes, int N>
inline void correlate3_row(const Lanes* grad, Ring<Lanes, N>& ring, int number, Index w, Index y, Lanes* total) {
    const Lanes *above = ring.with_border(y - 1) + number, *here = ring.with_border(y) + number,
                *below = ring.with_border(y + 1) + number;
    grad += number;
    Lanes sums[9] = {};
    for (Index x = 0; x < w; x++, above += N, here += N, below += N, grad += N) {
        read_anew(above), read_anew(here), read_anew(below);
        Lanes d = *grad;
        #pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            sums[i] += d * above[i * N];
            sums[3 + i] += d * here[i * N];
            sums[6 + i] += d * below[i * N];
        }
    }
    for (int i = 0; i < 9; i++) total[i] += sums[i];
}

// -------------------------------------------------------------------------------------------------------- the tasks

struct Shape {
    Index n, h, w, c;
};

// The place of a task in its maps.
struct Place {
    Shape shape;
    Index image, channel;
    int count;  // of channels in a vector; if there are several vectors, all lanes
    Place vector(int number) const { return {shape, image, channel + number * count, count}; }
    Index at(Index y, Index x) const { return ((image * shape.h + y) * shape.w + x) * shape.c + channel; }
};

// p.count for a task with N vectors; of several a compiler then knows that it is all lanes.
template <class Lanes, int N> inline int channels_each(Place p) { return N > 1 ? LANES<Lanes> : p.count; }

// A number for each of the place's channels, or zeros if there are none.
template <class Lanes, class Number> inline Lanes load_or_0(const Number* from, Place p) {
    return from ? load(from + p.channel, p.count) : Lanes{};
}

// A processor foresees by itself what will be read or written only where it lies close together; neighbouring pixels do
// not.
template <class... T> inline void fetch(Index at, const T*... maps) { (__builtin_prefetch(maps + at), ...); }
template <class... T> inline void prepare(Index at, T*... maps) { (__builtin_prefetch(maps + at, 1), ...); }

// Calls task(place) for all images and the channels from `first` on, `width` at a time, on some threads. Each has its own
// task, made by make().
template <class Lanes, class Make>
void for_all(Shape shape, Index first, Index end, int width, Index threads, Make make) {
    Index tasks = (end - first + width - 1) / width;
    if (tasks == 0) return;
    #pragma omp parallel num_threads(int(threads))
    {
        auto task = make();
        #pragma omp for schedule(static)
        for (Index i = 0; i < shape.n * tasks; i++) {
            Index channel = first + i % tasks * width;
            task(Place{shape, i / tasks, channel, int(std::min<Index>(LANES<Lanes>, end - channel))});
        }
    }
}

template <class T> struct Modulate {
    using Lanes = LanesFor<T>;
    using Number = NumberFor<T>;
    Shape s;
    Index k;
    const T *a, *v;
    const Number *a_bias, *v_bias;  // what a and v still lack, or null
    const Lanes* weights;           // of all channels, see `in_lanes`
    const Number* bias;
    T *context, *out;  // context: the convolution's result, or null
    Ring<Lanes> gelus{k, s.w};
    std::vector<Lanes> sums = std::vector<Lanes>(s.w + TILE);

    void operator()(Place p) {
        const Lanes* w = weights + p.channel / LANES<Lanes> * k * k;
        Lanes b = load(bias + p.channel, p.count);
        Lanes to_a = load_or_0<Lanes>(a_bias, p), to_v = load_or_0<Lanes>(v_bias, p);
        Index loaded = 0;
        for (Index y = 0; y < s.h; y++) {
            for (; loaded < std::min(s.h, y + k / 2 + 1); loaded++) {
                Lanes* row = gelus.row(loaded);
                for (Index x = 0; x < s.w; x++) {
                    fetch(p.at(loaded + 1, x), a, v);
                    row[x] = gelu<T>(load(a + p.at(loaded, x), p.count) + to_a);
                }
            }
            convolve_row(gelus, s.h, s.w, y, w, sums.data());
            const Lanes* conv = sums.data();
            for (Index x = 0; x < s.w; x++) {
                Lanes sum = conv[x] + b;
                if (context) store(context + p.at(y, x), sum, p.count);
                store(out + p.at(y, x), sum * (load(v + p.at(y, x), p.count) + to_v), p.count);
            }
        }
    }
};

template <class T> struct ModulateBackward {
    using Lanes = LanesFor<T>;
    using Number = NumberFor<T>;
    Shape s;
    Index k;
    const T *dout, *a, *v;
    const Number *a_bias, *v_bias;  // what a and v still lack, or null
    const T* context;
    const Lanes* weights;  // of all channels, see `in_lanes`
    T *da, *dv, *out;
    Number *dweight, *sums;  // sums over an image's pixels: of the gradients of the convolution's result, a and v
    Ring<Lanes> gelus{k, s.w}, dcontexts{k, s.w};
    std::vector<Lanes> turned = std::vector<Lanes>(k * k), dw = turned, das = std::vector<Lanes>(s.w + TILE);

    void operator()(Place p) {
        const Lanes* w = weights + p.channel / LANES<Lanes> * k * k;
        std::reverse_copy(w, w + k * k, turned.begin());
        std::fill(dw.begin(), dw.end(), Lanes{});
        Lanes to_a = load_or_0<Lanes>(a_bias, p), to_v = load_or_0<Lanes>(v_bias, p);
        Lanes dcontext_sum{}, da_sum{}, dv_sum{};
        Index loaded = 0;
        for (Index y = 0; y < s.h; y++) {
            for (; loaded < std::min(s.h, y + k / 2 + 1); loaded++) {
                Lanes *row = gelus.row(loaded), *dcontext = dcontexts.row(loaded);
                for (Index x = 0; x < s.w; x++) {
                    fetch(p.at(loaded + 1, x), dout, a, v, context);
                    prepare(p.at(loaded + 1, x), dv, out);
                    Index at = p.at(loaded, x);
                    Lanes d = load(dout + at, p.count), value = load(v + at, p.count) + to_v;
                    Lanes sum = load(context + at, p.count);
                    row[x] = gelu<T>(load(a + at, p.count) + to_a);
                    dcontext[x] = d * value;
                    dcontext_sum += d * value;
                    dv_sum += d * sum;
                    store(dv + at, d * sum, p.count);
                    store(out + at, sum * value, p.count);
                }
            }
            for (Index ky = std::max<Index>(0, k / 2 - y); ky < std::min(k, s.h + k / 2 - y); ky++)
                correlate_row(dcontexts.row(y), gelus.with_border(y + ky - k / 2), s.w, k, &dw[ky * k]);
            convolve_row(dcontexts, s.h, s.w, y, turned.data(), das.data());
            const Lanes* dgelu = das.data();
            for (Index x = 0; x < s.w; x++) {
                Lanes d = dgelu[x] * gelu_and_slope(load(a + p.at(y, x), p.count) + to_a).slope;
                da_sum += d;
                store(da + p.at(y, x), d, p.count);
            }
        }
        store_weights(dweight + (p.image * s.c + p.channel) * k * k, k * k, p.count, dw.data());
        Number* to = sums + p.image * 3 * s.c + p.channel;
        store(to, dcontext_sum, p.count);
        store(to + s.c, da_sum, p.count);
        store(to + 2 * s.c, dv_sum, p.count);
    }
};

// Where there are as many channels, a task has the N vectors of them that share cache lines: else half of what a processor
// fetches would have been pushed out when its other half's turn comes, since pixels of many channels, the more so of a power
// of two, compete for a few places in a cache.
template <class T, int N> struct Mix {
    using Lanes = LanesFor<T>;
    using Number = NumberFor<T>;
    Shape s;
    const T* u;
    const Number* u_bias;  // what u still lacks, or null
    const Lanes* weights;  // of all channels, see `in_lanes`
    const Number* bias;
    T* out;
    Ring<Lanes, N> gelus{3, s.w};
    std::vector<Lanes> convs = std::vector<Lanes>(s.w * N);

    void fill(Place p, Index y) {
        const int count = channels_each<Lanes, N>(p);
        Lanes *row = gelus.row(y), to_u[N];
        if (y < 0 || y >= s.h) {
            std::fill_n(row, s.w * N, Lanes{});
            return;
        }
        for (int i = 0; i < N; i++) to_u[i] = load_or_0<Lanes>(u_bias, p.vector(i));
        for (Index x = 0; x < s.w; x++, row += N) {
            fetch(p.at(y + 1, x), u);
            prepare(p.at(y, x), out);
            #pragma GCC unroll 4
            for (int i = 0; i < N; i++) row[i] = gelu<T>(load(u + p.at(y, x) + i * count, count) + to_u[i]);
        }
    }

    void operator()(Place p) {
        const int count = channels_each<Lanes, N>(p);
        const Lanes* w = weights + p.channel / LANES<Lanes> * 9;
        Lanes b[N];
        for (int i = 0; i < N; i++) b[i] = load_or_0<Lanes>(bias, p.vector(i));
        fill(p, -1);
        fill(p, 0);
        for (Index y = 0; y < s.h; y++) {
            fill(p, y + 1);
            for (int i = 0; i < N; i++) convolve3_row(gelus, i, s.w, y, w + i * 9, convs.data());
            const Lanes *row = gelus.row(y), *conv = convs.data();
            for (Index x = 0; x < s.w; x++, row += N, conv += N) {
                #pragma GCC unroll 4
                for (int i = 0; i < N; i++)
                    store(out + p.at(y, x) + i * count, row[i] + gelu<T>(conv[i] + b[i]), count);
            }
        }
    }
};

template <class T, int N> struct MixBackward {
    using Lanes = LanesFor<T>;
    using Number = NumberFor<T>;
    Shape s;
    const T *dout, *u;
    const Number* u_bias;  // what u still lacks, or null
    const Lanes* weights;  // of all channels, see `in_lanes`
    const Number* bias;
    T *du, *out;
    Number *dweight, *sums;  // sums over an image's pixels: of the gradients of the convolution's result and of u
    Ring<Lanes, N> gelus{3, s.w}, slopes{3, s.w}, dconvs{3, s.w};
    std::vector<Lanes> convs = std::vector<Lanes>(s.w * N);

    // Row y of the convolution's result, and its gradient.
    void conv_row(Place p, Index y, const Lanes* w, const Lanes* b, Lanes* dw, Lanes* dconv_sum) {
        const int count = channels_each<Lanes, N>(p);
        for (int i = 0; i < N; i++) convolve3_row(gelus, i, s.w, y, w + i * 9, convs.data());
        const Lanes *row = gelus.row(y), *conv = convs.data();
        Lanes *dconv = dconvs.row(y), sum[N] = {};
        for (Index x = 0; x < s.w; x++, row += N, conv += N, dconv += N) {
            fetch(p.at(y + 1, x), dout);
            prepare(p.at(y + 1, x), out);
            #pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                Gelu<Lanes> g = gelu_and_slope(conv[i] + b[i]);
                store(out + p.at(y, x) + i * count, row[i] + g.value, count);
                Lanes d = load(dout + p.at(y, x) + i * count, count) * g.slope;
                dconv[i] = d;
                sum[i] += d;
            }
        }
        for (int i = 0; i < N; i++) {
            dconv_sum[i] += sum[i];
            correlate3_row(dconvs.row(y), gelus, i, s.w, y, dw + i * 9);
        }
    }

    void fill(Place p, Index y) {
        const int count = channels_each<Lanes, N>(p);
        Lanes *row = gelus.row(y), *slope = slopes.row(y), to_u[N];
        if (y < 0 || y >= s.h) {
            std::fill_n(row, s.w * N, Lanes{});
            return;
        }
        for (int i = 0; i < N; i++) to_u[i] = load_or_0<Lanes>(u_bias, p.vector(i));
        for (Index x = 0; x < s.w; x++, row += N, slope += N) {
            fetch(p.at(y + 1, x), u);
            #pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                Gelu<Lanes> g = gelu_and_slope(load(u + p.at(y, x) + i * count, count) + to_u[i]);
                row[i] = g.value;
                slope[i] = g.slope;
            }
        }
    }

    void operator()(Place p) {
        const int count = channels_each<Lanes, N>(p);
        const Lanes* w = weights + p.channel / LANES<Lanes> * 9;
        Lanes turned[N * 9], dw[N * 9] = {}, dconv_sum[N] = {}, du_sum[N] = {}, b[N];
        for (int i = 0; i < N; i++) {
            std::reverse_copy(w + i * 9, w + (i + 1) * 9, turned + i * 9);
            b[i] = load_or_0<Lanes>(bias, p.vector(i));
        }
        fill(p, -1);
        fill(p, 0);
        std::fill_n(dconvs.row(-1), s.w * N, Lanes{});
        for (Index y = 0; y <= s.h; y++) {
            fill(p, y + 1);
            if (y < s.h) conv_row(p, y, w, b, dw, dconv_sum);
            else std::fill_n(dconvs.row(y), s.w * N, Lanes{});
            if (y == 0) continue;
            for (int i = 0; i < N; i++) convolve3_row(dconvs, i, s.w, y - 1, turned + i * 9, convs.data());
            const Lanes *slope = slopes.row(y - 1), *conv = convs.data();
            for (Index x = 0; x < s.w; x++, slope += N, conv += N) {  // row y - 1 of the gradient
                #pragma GCC unroll 4
                for (int i = 0; i < N; i++) {
                    Lanes d = (load(dout + p.at(y - 1, x) + i * count, count) + conv[i]) * slope[i];
                    du_sum[i] += d;
                    store(du + p.at(y - 1, x) + i * count, d, count);
                }
            }
        }
        for (int i = 0; i < N; i++) {
            Index channel = p.vector(i).channel;
            store_weights(dweight + (p.image * s.c + channel) * 9, 9, count, dw + i * 9);
            store(sums + p.image * 2 * s.c + channel, dconv_sum[i], count);
            store(sums + (p.image * 2 + 1) * s.c + channel, du_sum[i], count);
        }
    }
};

// Calls for_all for as many vectors at a time as fill cache lines, and for the vectors that are left over. The tasks are
// Task<T, N>, made of a shape and further arguments.
template <class T, template <class, int> class Task, class... Arguments>
void for_lines(Shape shape, Index threads, Arguments... arguments) {
    constexpr int n = IN_A_LINE<T>, lanes = LANES<LanesFor<T>>;
    Index full = shape.c / (n * lanes) * (n * lanes);
    for_all<LanesFor<T>>(shape, 0, full, n * lanes, threads, [&] { return Task<T, n>{shape, arguments...}; });
    for_all<LanesFor<T>>(shape, full, shape.c, lanes, threads, [&] { return Task<T, 1>{shape, arguments...}; });
}

// ------------------------------------------------------------------------------------ around the two: pixel by pixel

// Calls task(i) for i below `count`, on some threads. Each has its own copy of the task, whose variables can stay in
// registers: of shared ones a compiler must assume that what the task writes may change them.
template <class Task> void in_threads(Index count, Index threads, Task task) {
    #pragma omp parallel for schedule(static) num_threads(int(threads)) firstprivate(task)
    for (Index i = 0; i < count; i++) task(i);
}

// Calls task(channel, is_new) for the channels of a pixel, of which there are at least as many as lanes. If their number
// is no multiple of the lanes, the last call begins among those that the call before had: is_new is 0 there, otherwise 1.
template <class Lanes> struct Channels {
    Index c;
    Lanes is_new = Lanes{} + 1;  // in the last call
    explicit Channels(Index c) : c(c) {
        for (Index lane = 0; lane < (LANES<Lanes> - c % LANES<Lanes>) % LANES<Lanes>; lane++) is_new[lane] = 0;
    }
    template <class Task> inline void each(Task task) const {
        Index channel = 0;
        for (; channel + LANES<Lanes> <= c; channel += LANES<Lanes>) task(channel, Lanes{} + 1);
        if (channel < c) task(c - LANES<Lanes>, is_new);
    }
    // The sum of term(channel) over all channels. Each of four sums waits for its last addition only.
    template <class Term> inline auto sum(Term term) const {
        Lanes sums[4] = {};
        Index channel = 0;
        for (; channel + 4 * LANES<Lanes> <= c; channel += 4 * LANES<Lanes>)
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[i] += term(channel + i * LANES<Lanes>);
        for (; channel + LANES<Lanes> <= c; channel += LANES<Lanes>) sums[0] += term(channel);
        if (channel < c) sums[1] += term(c - LANES<Lanes>) * is_new;
        return sum_of(sums[0] + sums[1] + (sums[2] + sums[3]));
    }
};

// Layer norm of a pixel x over its channels, as T. X is a type that is computed with. Returns mean and reciprocal deviation.
template <class X, class T>
inline std::pair<X, X> norm(const Channels<LanesFor<X>>& channels, const X* x, const X* weight, const X* bias, double eps,
                            T* out) {
    using Lanes = LanesFor<X>;
    X mean = channels.sum([&](Index i) { return load_all(x + i); }) / channels.c;
    X var = channels.sum([&](Index i) {
        Lanes d = load_all(x + i) - mean;
        return d * d;
    }) / channels.c;
    X rstd = 1 / std::sqrt(var + X(eps));
    channels.each([&](Index i, Lanes) {
        Lanes normed = (load_all(x + i) - mean) * rstd;
        store_all(out + i, normed * load_all(weight + i) + load_all(bias + i));
    });
    return {mean, rstd};
}

// The same of all pixels of a map. mean and rstd may be null.
template <class X, class T>
void norm(Index pixels, Index c, Index threads, const X* x, const X* weight, const X* bias, double eps, T* out, X* mean,
          X* rstd) {
    const Channels<LanesFor<X>> channels(c);
    in_threads(pixels, threads, [=](Index p) {
        auto [m, r] = norm(channels, x + p * c, weight, bias, eps, out + p * c);
        if (mean) mean[p] = m, rstd[p] = r;
    });
}

// The gradient of x, added to that of the residual connection. sums: (rows, 2, c), of the gradients of weight and bias
// over each row's pixels.
template <class X, class T>
void norm_backward(Index rows, Index w, Index c, Index threads, const T* dout, const X* x, const X* weight,
                   const X* mean, const X* rstd, const X* residual, X* dx, X* sums) {
    using Lanes = LanesFor<X>;
    const Channels<Lanes> channels(c);
    in_threads(rows, threads, [=](Index row) {
        X *dweight = sums + row * 2 * c, *dbias = dweight + c;
        std::fill(dweight, dbias + c, X(0));
        for (Index p = row * w; p < (row + 1) * w; p++) {
            X m = mean[p], r = rstd[p];
            Lanes sum{}, products{};
            channels.each([&](Index i, Lanes is_new) {
                Lanes d = load_all(dout + p * c + i) * is_new, normed = (load_all(x + p * c + i) - m) * r;
                store_all(dweight + i, load_all(dweight + i) + d * normed);
                store_all(dbias + i, load_all(dbias + i) + d);
                d *= load_all(weight + i);
                sum += d;
                products += d * normed;
            });
            X mean_sum = sum_of(sum) / c, mean_products = sum_of(products) / c;
            channels.each([&](Index i, Lanes) {
                Lanes normed = (load_all(x + p * c + i) - m) * r;
                Lanes d = load_all(dout + p * c + i) * load_all(weight + i) - mean_sum - normed * mean_products;
                store_all(dx + p * c + i, load_all(residual + p * c + i) + d * r);
            });
        }
    });
}

// x + (y + bias) * scale * mask; bias and scale are one for each channel and the mask one for each image, or they are null.
// The result may take the place of x. Its layer norm goes to `normed`, which may be y, if that is not null.
template <class X, class T>
void add_scaled(Index n, Index pixels, Index c, Index threads, const X* x, const T* y, const X* bias, const X* scale,
                const X* mask, X* out, const X* norm_weight, const X* norm_bias, double eps, T* normed) {
    using Lanes = LanesFor<X>;
    const Channels<Lanes> channels(c);
    in_threads(n * pixels, threads, [=](Index p) {
        const X m = mask ? mask[p / pixels] : X(1), *from = x + p * c;
        X* to = out + p * c;
        channels.each([&](Index i, Lanes is_new) {
            Lanes factor = scale ? load_all(scale + i) * m : Lanes{} + m, shift = bias ? load_all(bias + i) : Lanes{};
            Lanes sum = load_all(from + i) + (load_all(y + p * c + i) + shift) * factor;
            store_all(to + i, is_new != 0 ? sum : load_all(to + i));
        });
        if (normed) norm(channels, to, norm_weight, norm_bias, eps, normed + p * c);
    });
}

// The stem's GELU and batch norm. Sums over pixels are made row by row, (rows, 2, c).

// Sums of g = gelu(x) over each row's pixels, and of the squares of its distances from the row's mean.
template <class T>
void gelu_moments(Index rows, Index w, Index c, Index threads, const T* x, NumberFor<T>* sums) {
    using Lanes = LanesFor<T>;
    using Number = NumberFor<T>;
    const Channels<Lanes> channels(c);
    in_threads(rows, threads, [=, gelus = std::vector<Number>(w * c)](Index row) mutable {
        Number *sum = sums + row * 2 * c, *squares = sum + c;
        std::fill(sum, squares + c, Number(0));
        for (Index p = 0; p < w; p++)
            channels.each([&](Index i, Lanes is_new) {
                Lanes g = gelu<Number>(load_all(x + (row * w + p) * c + i));
                store_all(&gelus[p * c + i], g);
                store_all(sum + i, load_all(sum + i) + g * is_new);
            });
        for (Index p = 0; p < w; p++)
            channels.each([&](Index i, Lanes is_new) {
                Lanes d = (load_all(&gelus[p * c + i]) - load_all(sum + i) / Number(w)) * is_new;
                store_all(squares + i, load_all(squares + i) + d * d);
            });
    });
}

// Sums of dout and of dout * gelu(x) over each row's pixels.
template <class T>
void gelu_products(Index rows, Index w, Index c, Index threads, const T* dout, const T* x, NumberFor<T>* sums) {
    using Lanes = LanesFor<T>;
    const Channels<Lanes> channels(c);
    in_threads(rows, threads, [=](Index row) {
        NumberFor<T> *sum = sums + row * 2 * c, *products = sum + c;
        std::fill(sum, products + c, NumberFor<T>(0));
        for (Index p = row * w; p < (row + 1) * w; p++)
            channels.each([&](Index i, Lanes is_new) {
                Lanes d = load_all(dout + p * c + i) * is_new;
                store_all(sum + i, load_all(sum + i) + d);
                store_all(products + i, load_all(products + i) + d * gelu<NumberFor<T>>(load_all(x + p * c + i)));
            });
    });
}

// (dout * by_dout + gelu(x) * by_gelu + shift) * gelu'(x), with three numbers for each channel.
template <class T>
void gelu_affine_backward(Index pixels, Index c, Index threads, const T* dout, const T* x, const NumberFor<T>* by_dout,
                          const NumberFor<T>* by_gelu, const NumberFor<T>* shift, T* dx) {
    using Lanes = LanesFor<T>;
    const Channels<Lanes> channels(c);
    in_threads(pixels, threads, [=](Index p) {
        channels.each([&](Index i, Lanes) {
            Gelu<Lanes> g = gelu_and_slope(load_all(x + p * c + i));
            Lanes d = load_all(dout + p * c + i) * load_all(by_dout + i) + g.value * load_all(by_gelu + i);
            store_all(dx + p * c + i, (d + load_all(shift + i)) * g.slope);
        });
    });
}

// gelu(x) * scale + shift, with two numbers for each channel.
template <class T>
void gelu_affine(Index pixels, Index c, Index threads, const T* x, const NumberFor<T>* scale, const NumberFor<T>* shift,
                 T* out) {
    using Lanes = LanesFor<T>;
    const Channels<Lanes> channels(c);
    in_threads(pixels, threads, [=](Index p) {
        channels.each([&](Index i, Lanes) {
            store_all(out + p * c + i, gelu<T>(load_all(x + p * c + i)) * load_all(scale + i) + load_all(shift + i));
        });
    });
}

// The gradient of the weight of a dense convolution with few channels and a large map, as in the stem. oneDNN takes two to
// four times as long for it with AVX2.

// Pixels of a row, in two maps whose neighbours are so many numbers apart.
struct Pixels {
    Index count, x_step, dout_step;
};

// sums[i][o] += sum over pixels of x[i] * dout[o], of INS channels of x and OUTS vectors of dout's, for which there are
// registers.
template <int INS, int OUTS>
inline void add_products(const float* x, const float* dout, Pixels pixels, const Index* starts, Index vectors, Floats* sums) {
    Floats total[INS * OUTS] = {};
    for (Index p = 0; p < pixels.count; p++, x += pixels.x_step, dout += pixels.dout_step) {
        Floats d[OUTS];
        #pragma GCC unroll 3
        for (int o = 0; o < OUTS; o++) d[o] = load_all(dout + starts[o]);
        #pragma GCC unroll 12
        for (int i = 0; i < INS; i++)
            #pragma GCC unroll 3
            for (int o = 0; o < OUTS; o++) total[i * OUTS + o] += d[o] * x[i];
    }
    for (int i = 0; i < INS; i++)
        for (int o = 0; o < OUTS; o++) sums[i * vectors + o] += total[i * OUTS + o];
}

// The same for all c channels of x.
template <int OUTS>
inline void add_products(const float* x, const float* dout, Pixels pixels, Index c, const Index* starts, Index vectors,
                         Floats* sums) {
    Index i = 0;
    constexpr int most = 12 / OUTS;
    for (; c - i >= most; i += most) add_products<most, OUTS>(x + i, dout, pixels, starts, vectors, sums + i * vectors);
    for (; c - i >= 2; i += 2) add_products<2, OUTS>(x + i, dout, pixels, starts, vectors, sums + i * vectors);
    if (i < c) add_products<1, OUTS>(x + i, dout, pixels, starts, vectors, sums + i * vectors);
}

}  // namespace

// The weight's gradient (k, k, c, outs), a part of it from each of so many strips of an image's rows. x is (n, h, w, c) and
// dout (n, out_h, out_w, outs), with a vector's channels at least.
extern "C" void conv_weight_grad_float32(Index n, Index h, Index w, Index c, Index out_h, Index out_w, Index outs, Index k,
                                         Index stride, Index padding, Index strips, Index threads, const float* x,
                                         const float* dout, float* dweight) {
    std::vector<Index> starts;  // of the vectors of dout's channels
    Channels<Floats>(outs).each([&](Index i, Floats) { starts.push_back(i); });
    Index vectors = starts.size(), size = k * k * c;
    #pragma omp parallel num_threads(int(threads))
    {
        std::vector<Floats> sums(size * vectors);
        #pragma omp for schedule(static)
        for (Index part = 0; part < n * strips; part++) {
            std::fill(sums.begin(), sums.end(), Floats{});
            Index image = part / strips, strip = part % strips;
            for (Index y = out_h * strip / strips; y < out_h * (strip + 1) / strips; y++)
                for (Index ky = 0; ky < k; ky++) {
                    Index row = y * stride + ky - padding;
                    if (row < 0 || row >= h) continue;
                    for (Index kx = 0; kx < k; kx++) {
                        Index left = kx - padding;  // in x, of the first column
                        Index first = left < 0 ? (-left + stride - 1) / stride : 0;
                        Index end = w > left ? std::min(out_w, (w - 1 - left) / stride + 1) : 0;
                        if (first >= end) continue;
                        const float* from = x + ((image * h + row) * w + first * stride + left) * c;
                        const float* d = dout + ((image * out_h + y) * out_w + first) * outs;
                        Pixels pixels{end - first, stride * c, outs};
                        Floats* to = &sums[(ky * k + kx) * c * vectors];
                        Index v = 0;
                        for (; vectors - v >= 3 && vectors - v != 4; v += 3)
                            add_products<3>(from, d, pixels, c, &starts[v], vectors, to + v);
                        for (; vectors - v >= 2; v += 2) add_products<2>(from, d, pixels, c, &starts[v], vectors, to + v);
                        if (v < vectors) add_products<1>(from, d, pixels, c, &starts[v], vectors, to + v);
                    }
                }
            for (Index i = 0; i < size; i++)
                for (Index v = 0; v < vectors; v++)
                    store_all(dweight + (part * size + i) * outs + starts[v], sums[i * vectors + v]);
        }
    }
}

// What `compiled.py` calls, for each type. `out` may be v in modulate and u in mix; da and du may be dout.
#define FUNCTIONS(T, NAME)                                                                                             \
    extern "C" void modulate_##NAME(Index n, Index h, Index w, Index c, Index k, Index threads, const T* a, const T* v,  \
                                    const NumberFor<T>* a_bias, const NumberFor<T>* v_bias,                            \
                                    const NumberFor<T>* weight, const NumberFor<T>* bias, T* context, T* out) {        \
        Shape s{n, h, w, c};                                                                                           \
        auto weights = in_lanes<LanesFor<T>>(weight, k * k, c);                                                        \
        for_all<LanesFor<T>>(s, 0, c, LANES<LanesFor<T>>, threads, [&] {                                               \
            return Modulate<T>{s, k, a, v, a_bias, v_bias, weights.data(), bias, context, out};                        \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void modulate_backward_##NAME(Index n, Index h, Index w, Index c, Index k, Index threads, const T* dout,  \
                                             const T* a, const T* v, const NumberFor<T>* a_bias,                       \
                                             const NumberFor<T>* v_bias, const T* context,                             \
                                             const NumberFor<T>* weight, T* da, T* dv, T* out, NumberFor<T>* dweight,  \
                                             NumberFor<T>* sums) {                                                     \
        Shape s{n, h, w, c};                                                                                           \
        auto weights = in_lanes<LanesFor<T>>(weight, k * k, c);                                                        \
        for_all<LanesFor<T>>(s, 0, c, LANES<LanesFor<T>>, threads, [&] {                                               \
            return ModulateBackward<T>{s, k, dout, a, v, a_bias, v_bias, context, weights.data(), da, dv, out,         \
                                       dweight, sums};                                                                 \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void mix_##NAME(Index n, Index h, Index w, Index c, Index threads, const T* u,                            \
                               const NumberFor<T>* u_bias, const NumberFor<T>* weight, const NumberFor<T>* bias,       \
                               T* out) {                                                                               \
        const auto weights = in_lanes<LanesFor<T>>(weight, 9, c);                                                      \
        for_lines<T, Mix>(Shape{n, h, w, c}, threads, u, u_bias, weights.data(), bias, out);                           \
    }                                                                                                                  \
    extern "C" void mix_backward_##NAME(Index n, Index h, Index w, Index c, Index threads, const T* dout, const T* u,    \
                                        const NumberFor<T>* u_bias, const NumberFor<T>* weight,                        \
                                        const NumberFor<T>* bias, T* du, T* out, NumberFor<T>* dweight,                \
                                        NumberFor<T>* sums) {                                                          \
        const auto weights = in_lanes<LanesFor<T>>(weight, 9, c);                                                      \
        for_lines<T, MixBackward>(Shape{n, h, w, c}, threads, dout, u, u_bias, weights.data(), bias, du, out, dweight, \
                                  sums);                                                                               \
    }                                                                                                                  \
    extern "C" void gelu_affine_##NAME(Index pixels, Index c, Index threads, const T* x, const NumberFor<T>* scale,    \
                                       const NumberFor<T>* shift, T* out) {                                            \
        gelu_affine(pixels, c, threads, x, scale, shift, out);                                                         \
    }                                                                                                                  \
    extern "C" void gelu_affine_backward_##NAME(Index pixels, Index c, Index threads, const T* dout, const T* x,       \
                                                const NumberFor<T>* by_dout, const NumberFor<T>* by_gelu,              \
                                                const NumberFor<T>* shift, T* dx) {                                    \
        gelu_affine_backward(pixels, c, threads, dout, x, by_dout, by_gelu, shift, dx);                                \
    }                                                                                                                  \
    extern "C" void gelu_moments_##NAME(Index rows, Index w, Index c, Index threads, const T* x,                       \
                                        NumberFor<T>* sums) {                                                          \
        gelu_moments(rows, w, c, threads, x, sums);                                                                    \
    }                                                                                                                  \
    extern "C" void gelu_products_##NAME(Index rows, Index w, Index c, Index threads, const T* dout, const T* x,       \
                                         NumberFor<T>* sums) {                                                         \
        gelu_products(rows, w, c, threads, dout, x, sums);                                                             \
    }

FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
FUNCTIONS(Bfloat16, bfloat16)

// The same for a pair of types: that of the maps between blocks, and that of the maps in a block.
#define FUNCTIONS_AROUND(X, T, NAME)                                                                                   \
    extern "C" void norm_##NAME(Index pixels, Index c, Index threads, const X* x, const X* weight, const X* bias,      \
                                double eps, T* out, X* mean, X* rstd) {                                                \
        norm(pixels, c, threads, x, weight, bias, eps, out, mean, rstd);                                               \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(Index rows, Index w, Index c, Index threads, const T* dout, const X* x,       \
                                         const X* weight, const X* mean, const X* rstd, const X* residual, X* dx,      \
                                         X* sums) {                                                                    \
        norm_backward(rows, w, c, threads, dout, x, weight, mean, rstd, residual, dx, sums);                           \
    }                                                                                                                  \
    extern "C" void add_scaled_##NAME(Index n, Index pixels, Index c, Index threads, const X* x, const T* y,           \
                                      const X* bias, const X* scale, const X* mask, X* out, const X* norm_weight,      \
                                      const X* norm_bias, double eps, T* normed) {                                     \
        add_scaled(n, pixels, c, threads, x, y, bias, scale, mask, out, norm_weight, norm_bias, eps, normed);          \
    }

FUNCTIONS_AROUND(float, float, float32_float32)
FUNCTIONS_AROUND(double, double, float64_float64)
FUNCTIONS_AROUND(float, Bfloat16, float32_bfloat16)

extern "C" void compiled_to_the_end() {}  // what compiling.py looks for in a library
