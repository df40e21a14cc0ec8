// Attention of a prompt's tokens in bf16, on AVX-512 with bf16 dot products: FlashAttention (arXiv 2205.14135) on a CPU.
//
// A block of query rows meets a block of keys, its scores become weights while they are in cache, and the rows' sums are
// rescaled whenever a larger score turns up, so scores of all positions are never in memory. Both products are the same
// loop: rows of bf16 pairs, broadcast, times panels of 32 columns whose pairs lie side by side. Keys and values are laid out
// so once, for all query heads and blocks. Sums are fp32; weights are rounded to bf16, as torch's own kernel rounds them.

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "attention_bf16.h"
#include "rows.h"

// Written by flash.py (`_Task`), field by field. Strides in numbers; a head's numbers are neighbours.
struct Task {
    const void *queries, *keys, *values;  // (batch, heads or key heads, tokens, width)
    void* out;                            // (batch, queries, heads, width), contiguous
    int64_t query_strides[3], key_strides[3], value_strides[3];
    int64_t batch, heads, key_heads, count, kept, width;  // count: query tokens; kept: tokens that have keys
    int32_t causal;  // the last query sees all keys, the one before it all but one
    float scaling;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

namespace {

constexpr int kTile = 12;    // rows of a product's tile: 24 sums in registers
constexpr int kPanel = 32;   // columns of it
constexpr int kQueries = 4 * kTile, kKeys = 256;  // of a block; half or twice as many cost the same

thread_local Buffer packed_buffer, block_buffer;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

__m512i line(const Half* place) { return _mm512_loadu_si512(place); }

// out (kTile rows, kPanel columns) += rows times panel. `pairs`: of numbers that a row has.
inline void multiply(const Half* rows, int64_t stride, const Half* panel, int64_t pairs, float* out, int64_t out_stride) {
    __m512 sums[kTile][2];
#pragma GCC unroll 12
    for (int r = 0; r < kTile; ++r)
        for (int n = 0; n < 2; ++n) sums[r][n] = _mm512_loadu_ps(out + r * out_stride + n * 16);
    for (int64_t p = 0; p < pairs; ++p, panel += 2 * kPanel) {
        const __m512i left = line(panel), right = line(panel + kPanel);
#pragma GCC unroll 12
        for (int r = 0; r < kTile; ++r) {
            int32_t pair;
            std::memcpy(&pair, rows + r * stride + 2 * p, 4);
            const __m512i both = _mm512_set1_epi32(pair);
            dot_halves(sums[r][0], left, both);
            dot_halves(sums[r][1], right, both);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kTile; ++r)
        for (int n = 0; n < 2; ++n) _mm512_storeu_ps(out + r * out_stride + n * 16, sums[r][n]);
}

// Of one key head: panels of 32 keys over the width, and for every block of keys panels of 32 columns over its keys.
struct Packed {
    Half *keys, *values;
};

int64_t head_size(const Task& t) { return up(t.kept, kPanel) * t.width; }

Packed packed_of(const Task& t, Half* all, int64_t unit) {
    Half* keys = all + 2 * unit * head_size(t);
    return {keys, keys + head_size(t)};
}

const Half* head_of(const void* all, const int64_t* strides, int64_t batch, int64_t head) {
    return static_cast<const Half*>(all) + batch * strides[0] + head * strides[1];
}

// A panel of keys: [pairs of the width][32 keys][2]; zeros beyond the last.
void pack_keys(const Task& t, const Half* keys, int64_t first, Half* to) {
    const int64_t there = std::min<int64_t>(kPanel, t.kept - first), stride = t.key_strides[2];
    if (there < kPanel) std::memset(to, 0, kPanel * t.width * sizeof(Half));
    for (int64_t i = 0; i < t.width; i += 2)
        for (int64_t key = 0; key < there; ++key)
            std::memcpy(to + i * kPanel + 2 * key, keys + (first + key) * stride + i, 2 * sizeof(Half));
}

// Two tokens' values: to every panel of columns [32 columns][2]. `step`: from panel to panel.
void pack_values(const Half* one, const Half* other, int64_t width, int64_t step, Half* to) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (int64_t i = 0; i < width; i += kPanel, to += step) {
        const __m512i a = line(one + i), b = other ? line(other + i) : _mm512_setzero_si512();
        const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(even, low, odd));
        _mm512_storeu_si512(to + kPanel, _mm512_permutex2var_epi64(even, high, odd));
    }
}

// One panel's worth of tokens of one key head.
void pack(const Task& t, Half* all, int64_t unit, int64_t first) {
    const Packed to = packed_of(t, all, unit);
    const int64_t batch = unit / t.key_heads, head = unit % t.key_heads;
    pack_keys(t, head_of(t.keys, t.key_strides, batch, head), first, to.keys + first * t.width);
    const Half* values = head_of(t.values, t.value_strides, batch, head);
    const int64_t block = first / kKeys * kKeys, tokens = std::min<int64_t>(kKeys, up(t.kept, kPanel) - block);
    for (int64_t key = first; key < first + kPanel; key += 2) {
        Half* place = to.values + block * t.width + (key - block) * kPanel;
        const Half* one = values + key * t.value_strides[2];
        if (key >= t.kept)
            for (int64_t i = 0; i < t.width; i += kPanel) std::memset(place + i * tokens, 0, 2 * kPanel * sizeof(Half));
        else
            pack_values(one, key + 1 < t.kept ? one + t.value_strides[2] : nullptr, t.width, tokens * kPanel, place);
    }
}

// What a thread needs for a block of queries.
struct Room {
    float *scores, *sums, *most, *totals;  // (kQueries, kKeys), (kQueries, width), (kQueries) twice
    Half *queries, *weights;               // (kQueries, width), (kQueries, kKeys)

    static int64_t bytes(int64_t width) {
        return kQueries * ((kKeys + width + 2) * sizeof(float) + (width + kKeys) * sizeof(Half));
    }
    Room(uint8_t* memory, int64_t width) {
        scores = reinterpret_cast<float*>(memory);
        sums = scores + kQueries * kKeys;
        most = sums + kQueries * width;
        totals = most + kQueries;
        queries = reinterpret_cast<Half*>(totals + kQueries);
        weights = queries + kQueries * width;
    }
};

// Turns a row's first `valid` scores to weights under the largest so far; what it had summed up is rescaled.
void weigh(const Room& room, int row, int64_t valid, int64_t padded, int64_t width, float scaling) {
    float* scores = room.scores + row * kKeys;
    Half* weights = room.weights + row * kKeys;
    float most = room.most[row], total = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < valid; ++j) most = scores[j] * scaling > most ? scores[j] * scaling : most;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < valid; ++j) {
        scores[j] = exponential(scores[j] * scaling - most);
        total += scores[j];
    }
    for (int64_t j = std::max<int64_t>(valid, 0); j < padded; ++j) scores[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + j),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(scores + j))));
    if (most == room.most[row]) {
        room.totals[row] += total;
        return;
    }
    const float less = exponential(room.most[row] - most);
    float* sums = room.sums + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sums[i] *= less;
    room.totals[row] = room.totals[row] * less + total;
    room.most[row] = most;
}

// A block of queries of one head, from `first` on.
void attend(const Task& t, const Packed& packed, int64_t batch, int64_t head, int64_t first, const Room& room) {
    const int rows = static_cast<int>(std::min<int64_t>(kQueries, t.count - first)), tiles = (rows + kTile - 1) / kTile;
    const Half* queries = head_of(t.queries, t.query_strides, batch, head) + first * t.query_strides[2];
    std::memset(room.queries + rows * t.width, 0, (kQueries - rows) * t.width * sizeof(Half));
    for (int r = 0; r < rows; ++r)
        std::memcpy(room.queries + r * t.width, queries + r * t.query_strides[2], t.width * sizeof(Half));
    std::memset(room.sums, 0, kQueries * t.width * sizeof(float));
    std::fill_n(room.most, kQueries, -3e38f);
    std::fill_n(room.totals, kQueries, 0.0f);
    const int64_t seen = t.causal ? t.kept - t.count + first + 1 : t.kept;  // by the first row
    const int64_t end = t.causal ? seen + rows - 1 : t.kept;
    for (int64_t block = 0; block < end; block += kKeys) {
        const int64_t padded = up(std::min<int64_t>(kKeys, end - block), kPanel);
        const int64_t tokens = std::min<int64_t>(kKeys, up(t.kept, kPanel) - block);
        std::memset(room.scores, 0, tiles * kTile * kKeys * sizeof(float));
        for (int64_t key = 0; key < padded; key += kPanel)
            for (int tile = 0; tile < tiles; ++tile)
                multiply(room.queries + tile * kTile * t.width, t.width, packed.keys + (block + key) * t.width,
                         t.width / 2, room.scores + tile * kTile * kKeys + key, kKeys);
        for (int r = 0; r < tiles * kTile; ++r) {
            const int64_t valid = std::min(end, t.causal ? seen + r : end) - block;
            weigh(room, r, std::min(valid, padded), padded, t.width, t.scaling);
        }
        for (int64_t i = 0; i < t.width; i += kPanel)
            for (int tile = 0; tile < tiles; ++tile)
                multiply(room.weights + tile * kTile * kKeys, kKeys, packed.values + block * t.width + i * tokens,
                         padded / 2, room.sums + tile * kTile * t.width + i, t.width);
    }
    for (int r = 0; r < rows; ++r) {
        Half* out = static_cast<Half*>(t.out) + ((batch * t.count + first + r) * t.heads + head) * t.width;
        for (int64_t i = 0; i < t.width; ++i) narrow(room.sums[r * t.width + i] / room.totals[r], out[i]);
    }
}

}  // namespace

extern "C" {

// 0, or 1 when memory ran out.
int autotune_flash(const Task* task, int threads) {
    const Task& t = *task;
    const int64_t panels = (t.kept + kPanel - 1) / kPanel, blocks = (t.count + kQueries - 1) / kQueries;
    const int64_t units = t.batch * t.key_heads, shared = t.heads / t.key_heads;
    Half* all = reinterpret_cast<Half*>(packed_buffer.of(2 * units * head_size(t) * sizeof(Half)));
    if (!all) return 1;
    bool failed = false;
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
#pragma omp for
        for (int64_t item = 0; item < units * panels; ++item)
            pack(t, all, item / panels, item % panels * kPanel);
        uint8_t* memory = block_buffer.of(Room::bytes(t.width));
        failed = !memory;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < units * shared * blocks; ++item) {
            if (!memory) continue;
            const int64_t head = item / blocks % t.heads, batch = item / blocks / t.heads;
            const int64_t block = blocks - 1 - item % blocks;  // of causal ones the longest first
            const Packed packed = packed_of(t, all, batch * t.key_heads + head / shared);
            attend(t, packed, batch, head, block * kQueries, Room(memory, t.width));
        }
    }
    return failed;
}

}  // extern "C"

#endif
