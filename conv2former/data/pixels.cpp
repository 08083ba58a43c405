// Images of 8 bits resized, sheared, moved and normalised: the compiled part of `pixels.py`, which says what for.
//
// An image is made of rows of pixels of four bytes: red, green, blue and one without meaning. What is computed is what
// Pillow computes, to the bit. A resize is one pass along the rows and one across them, in integers, with an image of 8
// bits in between. Doubles are computed in the order of Pillow's operations, since another could end in another last bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <vector>

namespace {

using Index = std::int64_t;
using Byte = std::uint8_t;
using Pixel = std::uint32_t;

// ---------------------------------------------------------------------------------------------------------- filters

constexpr int FRACTION = 22;  // bits of a weight behind the point

struct Filter {
    double support;
    double (*weight)(double distance);
};

double bilinear(double x) { return x < 1.0 ? 1.0 - x : 0.0; }

double bicubic(double x) {  // of Keys, with a = -1/2
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

// For each place of a result: the first of the `count` arguments that it is made of, and their weights. Where Pillow takes
// fewer, some of the weights are 0; with equally many everywhere, a processor foresees the loops' ends.
struct Taps {
    int count = 0;
    std::vector<int> first;
    std::vector<std::int32_t> weights;
    const std::int32_t* of(Index i) const { return &weights[i * count]; }

    Taps(int from, int to, Filter filter) : first(to) {
        double scale = double(from) / to, stretch = std::max(scale, 1.0), support = filter.support * stretch;
        auto begin = [&](double center) { return std::max(0, int(center - support + 0.5)); };
        auto end = [&](double center) { return std::min(from, int(center + support + 0.5)); };
        for (int i = 0; i < to; i++) {
            double center = (i + 0.5) * scale;
            count = std::max(count, end(center) - begin(center));
        }
        weights.resize(Index(to) * count);
        std::vector<double> exact(count);
        for (int i = 0; i < to; i++) {
            double center = (i + 0.5) * scale, shrink = 1.0 / stretch, sum = 0;
            int size = end(center) - begin(center);
            for (int x = 0; x < size; x++) {
                exact[x] = filter.weight(std::fabs((x + begin(center) - center + 0.5) * shrink));
                sum += exact[x];
            }
            first[i] = std::min(begin(center), from - count);
            for (int x = 0; x < size; x++) {
                double weight = (sum != 0 ? exact[x] / sum : exact[x]) * (1 << FRACTION);
                weights[Index(i) * count + begin(center) - first[i] + x] = int(weight < 0 ? weight - 0.5 : weight + 0.5);
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------- vectors

using Ints = std::int32_t __attribute__((vector_size(LANE_BYTES)));
constexpr int LANES = LANE_BYTES / 4;
const Ints HALF = Ints{} + (1 << (FRACTION - 1));

// By the processor's own names, because GCC takes a general conversion of bytes apart.
inline Ints load(const Byte* from) {
#if LANE_BYTES == 64
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
}

inline void store_rounded(Byte* to, Ints sums) {
    sums >>= FRACTION;
    sums = sums < 0 ? Ints{} : sums;
#if LANE_BYTES == 64
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8((__m512i)sums));
#else
    __m128i low = _mm256_castsi256_si128((__m256i)sums), high = _mm256_extracti128_si256((__m256i)sums, 1);
    __m128i both = _mm_packus_epi32(low, high);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(both, both));
#endif
}

// ------------------------------------------------------------------------------------------------------------ passes

struct Image {
    Byte* bytes;
    Index stride, width, height;  // stride: bytes from one row to the next
    Byte* row(Index y) const { return bytes + y * stride; }
};

// An image to write to, with room behind each row for a vector.
struct Buffer {
    std::vector<Byte> memory;
    Image image;
    Buffer(Index width, Index height) : memory((width * 4 + 4 * LANES) * height) {
        image = {memory.data(), width * 4 + 4 * LANES, width, height};
    }
};

// Four pixels of each of four rows change places: what was a row becomes a column.
inline void turn(const Byte* const* from, Byte* to, Index stride) {
    __m128i rows[4], pairs[4];
    for (int i = 0; i < 4; i++) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
    for (int i = 0; i < 2; i++) {
        pairs[i] = _mm_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[i + 2] = _mm_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i * stride), _mm_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * stride),
                         _mm_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    }
}

// Four rows at a time, whose pixels in a column lie together for it.
void along_rows(Image from, Image to, const Taps& taps, bool mirror) {
    constexpr int ROWS = 4, VECTORS = ROWS * 4 / LANES;
    std::vector<Pixel> columns(from.width * ROWS);
    for (Index y = 0; y < to.height; y += ROWS) {
        int rows = int(std::min<Index>(ROWS, to.height - y));
        const Byte* sources[ROWS];
        for (int i = 0; i < ROWS; i++) sources[i] = from.row(y + std::min(i, rows - 1));
        Index turned = 0;
        for (; turned + 4 <= from.width; turned += 4) {
            const Byte* here[ROWS];
            for (int i = 0; i < ROWS; i++) here[i] = sources[i] + turned * 4;
            turn(here, reinterpret_cast<Byte*>(&columns[turned * ROWS]), ROWS * 4);
        }
        for (; turned < from.width; turned++)
            for (int i = 0; i < ROWS; i++) std::memcpy(&columns[turned * ROWS + i], sources[i] + turned * 4, 4);
        for (Index x = 0; x < to.width; x++) {
            const std::int32_t* weights = taps.of(x);
            const Byte* column = reinterpret_cast<const Byte*>(&columns[taps.first[x] * ROWS]);
            Ints sums[VECTORS];
            for (int v = 0; v < VECTORS; v++) sums[v] = HALF;
            for (int i = 0; i < taps.count; i++)
                for (int v = 0; v < VECTORS; v++) sums[v] += load(column + i * ROWS * 4 + v * LANES) * weights[i];
            Byte result[ROWS * 4];
            for (int v = 0; v < VECTORS; v++) store_rounded(result + v * LANES, sums[v]);
            Index at = mirror ? to.width - 1 - x : x;
            for (int i = 0; i < rows; i++) std::memcpy(to.row(y + i) + at * 4, result + i * 4, 4);
        }
    }
}

template <int COUNT> inline void across(Image from, Index x, int first, int count, const std::int32_t* weights, Byte* to) {
    Ints sums[COUNT];
    #pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sums[i] = HALF;
    for (int y = 0; y < count; y++) {
        const Byte* row = from.row(first + y) + x;
        #pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) sums[i] += load(row + i * LANES) * weights[y];
    }
    #pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) store_rounded(to + i * LANES, sums[i]);
}

// The last bytes of a row, fewer than a vector, are done one by one.
void across_rows(Image from, Image to, const Taps& taps) {
    Index bytes = to.width * 4;
    for (Index y = 0; y < to.height; y++) {
        const std::int32_t* weights = taps.of(y);
        int first = taps.first[y];
        Index x = 0;
        for (; x + 4 * LANES <= bytes; x += 4 * LANES) across<4>(from, x, first, taps.count, weights, to.row(y) + x);
        for (; x + LANES <= bytes; x += LANES) across<1>(from, x, first, taps.count, weights, to.row(y) + x);
        for (; x < bytes; x++) {
            std::int32_t sum = 1 << (FRACTION - 1);
            for (int i = 0; i < taps.count; i++) sum += from.row(first + i)[x] * weights[i];
            to.row(y)[x] = Byte(std::clamp(sum >> FRACTION, 0, 255));
        }
    }
}

// ------------------------------------------------------------------------------------------------ affine transforms

using Colours = double __attribute__((vector_size(32)));  // of one pixel

inline Colours colours(const Byte* pixel) {
    std::int32_t bytes;
    std::memcpy(&bytes, pixel, 4);
    return (Colours)_mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
}

inline void store_truncated(Byte* to, Colours values) {  // to the range of a byte, too
    __m128i whole = _mm256_cvttpd_epi32((__m256d)values);
    whole = _mm_packus_epi32(whole, whole);
    std::int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(whole, whole));
    std::memcpy(to, &bytes, 4);
}

// How to interpolate between as many values as `taps`, of which number `taps` / 2 - 1 is at 0 and the next one at 1.
struct Linear {
    static constexpr int taps = 2;
    static Colours at(double x, const Colours* v) { return v[0] + (v[1] - v[0]) * x; }
};

struct Cubic {
    static constexpr int taps = 4;
    static Colours at(double x, const Colours* v) {
        Colours linear = -v[0] + v[2], square = 2 * (v[0] - v[1]) + v[2] - v[3], cube = -v[0] + v[1] - v[2] + v[3];
        return v[1] + x * (linear + x * (square + x * cube));
    }
};

// to[y][x] = from[d x + e y + f][a x + b y + c], for centres of pixels; what lies outside stays as it is.
template <class Way> void affine(Image from, Image to, const double* a) {
    constexpr int TAPS = Way::taps, BEFORE = TAPS / 2 - 1;
    const int last_column = int(from.width) - 1, last_row = int(from.height) - 1;
    for (Index y = 0; y < to.height; y++)
        for (Index x = 0; x < to.width; x++) {
            double px = a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2], py = a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5];
            if (!(px >= 0 && px < from.width && py >= 0 && py < from.height)) continue;
            px -= 0.5, py -= 0.5;
            double dx = px - std::floor(px), dy = py - std::floor(py);
            int left = int(std::floor(px)) - BEFORE, top = int(std::floor(py)) - BEFORE;
            auto row = [&](int i) { return from.row(std::clamp(top + i, 0, last_row)); };
            auto at = [&](const Byte* pixels, int i) { return colours(pixels + std::clamp(left + i, 0, last_column) * 4); };
            auto value_in = [&](const Byte* pixels) {
                Colours along[TAPS];
                for (int i = 0; i < TAPS; i++) along[i] = at(pixels, i);
                return Way::at(dx, along);
            };
            // Shears and moves in one direction leave the other one alone, where the value at 0 is the result.
            Colours value, across[TAPS];
            if (dy == 0) {
                value = dx == 0 ? at(row(BEFORE), BEFORE) : value_in(row(BEFORE));
            } else {
                for (int i = 0; i < TAPS; i++) across[i] = dx == 0 ? at(row(i), BEFORE) : value_in(row(i));
                value = Way::at(dy, across);
            }
            store_truncated(to.row(y) + x * 4, value);
        }
}

// What Pillow hands out of an image: a struct of the Arrow C data interface.
struct ArrowArray {
    Index length, null_count, offset, n_buffers, n_children;
    const void** buffers;
    ArrowArray** children;
};

}  // namespace

// Returns where an image of so many pixels has them, or null if they are not four bytes each, one after the other.
extern "C" const void* pixels_of(const ArrowArray* image, Index pixels) {
    bool fits = image->length == pixels && image->n_children == 1 && image->children[0]->length == 4 * pixels;
    return fits && image->offset == 0 ? image->children[0]->buffers[1] : nullptr;
}

// Resizes the `width` x `height` pixels at `from`, in rows that are `stride` bytes apart, to `to`. Rows lie close together
// where no stride is given. The filter is one of Pillow's by its number there: 2 bilinear, 3 bicubic. `mirror` turns left and right
// round.
extern "C" void resize(const Byte* from, Index stride, Index width, Index height, Byte* to, Index to_width,
                       Index to_height, Index filter, Index rows_last, Index mirror) {
    Filter chosen = filter == 2 ? Filter{1.0, bilinear} : Filter{2.0, bicubic};
    Taps columns(width, to_width, chosen), rows(height, to_height, chosen);
    Image source{const_cast<Byte*>(from), stride, width, height}, result{to, to_width * 4, to_width, to_height};
    if (rows_last) {
        Buffer middle(width, to_height);
        across_rows(source, middle.image, rows);
        along_rows(middle.image, result, columns, mirror);
    } else {
        Buffer middle(to_width, height);
        along_rows(source, middle.image, columns, mirror);
        across_rows(middle.image, result, rows);
    }
}

// An affine transform of a `width` x `height` image by the six numbers of `matrix`, to `to` of the same size, whose pixels
// say what is to be where the image does not reach. The filter is as above.
extern "C" void transform(const Byte* from, Index width, Index height, Byte* to, const double* matrix, Index filter) {
    Image source{const_cast<Byte*>(from), width * 4, width, height}, result{to, width * 4, width, height};
    if (filter == 2) affine<Linear>(source, result, matrix);
    else affine<Cubic>(source, result, matrix);
}

// Leaves out the byte without meaning.
extern "C" void pack(const Byte* from, Index pixels, Byte* to) {
    const __m128i colours = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    Index i = 0;
    for (; i + 6 <= pixels; i += 4) {  // 4 pixels, with a vector that reaches over 5 1/3 of the result
        __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 3), _mm_shuffle_epi8(four, colours));
    }
    for (; i < pixels; i++) std::memcpy(to + i * 3, from + i * 4, 3);
}

// to[i][c] = table[c][from[i][c]], for three channels or one: a function of each pixel's values, such as its normalisation.
extern "C" void look_up(const Byte* from, Index pixels, Index channels, const float* table, float* to, Index threads) {
    if (channels == 1) {
        #pragma omp parallel for schedule(static) num_threads(int(threads))
        for (Index i = 0; i < pixels; i++) to[i] = table[from[i]];
        return;
    }
    #pragma omp parallel for schedule(static) num_threads(int(threads))
    for (Index i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++) to[i * 3 + c] = table[c * 256 + from[i * 3 + c]];
}

extern "C" void compiled_to_the_end() {}  // what compiling.py looks for in a library
