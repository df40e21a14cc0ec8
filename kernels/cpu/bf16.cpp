// y = x W^T + b for bf16 weights, dense or 2:4. Sums are fp32.
//
// A step is 16 outputs x 32 inputs. Dense: sixteen vectors of two inputs each, met by broadcast activations. 2:4: eight
// vectors of survivors (two of every four inputs), then one of positions; the 32 activations of the step fill one
// register, from which a word permutation picks those that meet the survivors: weights are never expanded, so there are
// half the multiplications of a dense product and 9/16 of its bytes. Threads stream their own blocks once for up to
// eight rows at a time, as in integer.cpp.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "rows.h"

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__)
#error "needs AVX-512 with bf16"
#endif

namespace {

template <int rows>
using Sums = __m512[rows][kChains<rows>];

inline __attribute__((always_inline)) void dot(__m512& sums, __m512i x, __m512i w) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "vm"(w));
}

struct Dense {
    static constexpr int kBytes = 1024, kRows = 16;

    template <int rows>
    static inline __attribute__((always_inline)) void step(const uint8_t* w, const uint16_t* x, Sums<rows>& sums) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const __m512i weights = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                std::memcpy(&pair, x + r * kStep + 2 * j, 4);
                dot(sums[r][j % kChains<rows>], _mm512_set1_epi32(pair), weights);
            }
        }
    }
};

struct Sparse {
    static constexpr int kBytes = 576, kRows = 8;

    template <int t>
    static inline __attribute__((always_inline)) __m512i select(__m512i positions) {
        return _mm512_ternarylogic_epi32(_mm512_srli_epi16(positions, 2 * t), _mm512_set1_epi16(3),
                                         _mm512_set1_epi16(4 * t), 0xEA);  // (a & b) | c
    }

    template <int rows, int t>
    static inline __attribute__((always_inline)) void quad(const uint8_t* w, __m512i positions,
                                                           const __m512i (&x)[rows], Sums<rows>& sums) {
        const __m512i weights = _mm512_loadu_si512(w + 64 * t), from = select<t>(positions);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) dot(sums[r][t % kChains<rows>], _mm512_permutexvar_epi16(from, x[r]), weights);
    }

    template <int rows>
    static inline __attribute__((always_inline)) void step(const uint8_t* w, const uint16_t* x, Sums<rows>& sums) {
        __m512i inputs[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) inputs[r] = _mm512_loadu_si512(x + r * kStep);
        const __m512i positions = _mm512_loadu_si512(w + 512);
        quad<rows, 0>(w, positions, inputs, sums);
        quad<rows, 1>(w, positions, inputs, sums);
        quad<rows, 2>(w, positions, inputs, sums);
        quad<rows, 3>(w, positions, inputs, sums);
        quad<rows, 4>(w, positions, inputs, sums);
        quad<rows, 5>(w, positions, inputs, sums);
        quad<rows, 6>(w, positions, inputs, sums);
        quad<rows, 7>(w, positions, inputs, sums);
    }
};

void store(uint16_t* y, int64_t count, __m512 value) {  // vcvtneps2bf16: ties to even
    const __mmask16 mask = count >= kLanes ? 0xFFFF : (1u << count) - 1;
    _mm256_mask_storeu_epi16(y, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

template <class Format, int rows>
void block_rows(const Linear& a, int64_t block, const uint16_t* x, uint16_t* y) {
    const uint8_t* w = a.weights + block * a.steps * Format::kBytes;
    Sums<rows> sums;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < kChains<rows>; c++) sums[r][c] = _mm512_setzero_ps();
    for (int s = 0; s < a.steps; s++, w += Format::kBytes) {
        for (int i = 0; i < Format::kBytes; i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + 4096 + i, _MM_HINT_T0);
        Format::template step<rows>(w, x + s * rows * kStep, sums);
    }
    const __m512 bias = a.bias ? _mm512_loadu_ps(a.bias + block * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512 total = bias;
        for (int c = 0; c < kChains<rows>; c++) total = _mm512_add_ps(total, sums[r][c]);
        store(y + r * a.outputs + block * kLanes, a.outputs - block * kLanes, total);
    }
}

template <class Format, int rows = Format::kRows>
inline __attribute__((always_inline)) void rows_from(const Linear& a, int64_t block, const uint16_t* x, int64_t row,
                                                     int64_t end, uint16_t* y) {
    for (; row + rows <= end; row += rows) block_rows<Format, rows>(a, block, x + row * a.padded, y + row * a.outputs);
    if constexpr (rows > 1)
        if (row < end) rows_from<Format, rows / 2>(a, block, x, row, end, y);
}

thread_local Buffer interleaved;

// Rows first .. last into their groups' places, zeros behind the last input.
template <int most>
void interleave(const Linear& a, const uint16_t* x, int64_t first, int64_t last, int64_t count, uint16_t* places) {
    for (int64_t row = first; row < last; row++) {
        const Group group = group_of(row, count, most);
        uint16_t* place = places + group.first * a.padded + (row - group.first) * kStep;
        const uint16_t* source = x + row * a.inputs;
        for (int64_t i = 0; i < a.inputs; i += kStep, place += group.size * kStep) {
            const __mmask32 mask = a.inputs - i >= kStep ? ~0u : (1u << (a.inputs - i)) - 1;
            _mm512_storeu_si512(place, _mm512_maskz_loadu_epi16(mask, source + i));
        }
    }
}

// False when memory ran out.
template <class Format>
bool linear(const Linear& a, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    if (rows == 0) return true;
    const bool as_it_is = rows == 1 && a.inputs == a.padded;
    uint16_t* memory = as_it_is ? nullptr : reinterpret_cast<uint16_t*>(interleaved.of(rows * a.padded * 2));
    if (!as_it_is && !memory) return false;
    const uint16_t* ready = as_it_is ? x : memory;
    const int64_t pass = rows_of_pass(2 * a.padded, Format::kRows);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t first, last;
        if (!as_it_is) {
            share(rows, thread, team, first, last);
            interleave<Format::kRows>(a, x, first, last, rows, memory);
#pragma omp barrier
        }
        share(a.blocks, thread, team, first, last);
        for (int64_t start = 0; start < rows; start += pass)
            for (int64_t block = first; block < last; block++)
                rows_from<Format>(a, block, ready, start, std::min(rows, start + pass), y);
    }
    return true;
}

}  // namespace

extern "C" {

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), bf16, row-major.
int autotune_bf16(const void* packed, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    return a.sparse ? !linear<Sparse>(a, x, rows, y, threads) : !linear<Dense>(a, x, rows, y, threads);
}
}
