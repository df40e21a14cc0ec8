// Attention over bf16 keys and values on AVX-512 with bf16 dot products: 32 numbers to an instruction.
//
// Queries are bf16 as they are, so products with keys are exact and their sums fp32. Values are widened without moving
// them: numbers at even places are the upper halves of words shifted left, those at odd places are the words with their
// lower halves cleared. Weights stay fp32.
#pragma once

#include "scalars.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <type_traits>

constexpr int kPairs = 32;  // numbers in a vector

template <typename T, typename K>
constexpr bool kDots = std::is_same_v<T, Half> && std::is_same_v<K, Half>;

inline __attribute__((always_inline)) void dot_halves(__m512& sums, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));  // gcc 12 may copy sums around the intrinsic
}

// The sums of four vectors.
inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 quarters = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
    const __m256 halves = _mm512_castps512_ps256(quarters) + _mm512_extractf32x8_ps(quarters, 1);
    return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
}

// Lines of `rows` rows to the second cache.
inline __attribute__((always_inline)) void fetch_halves(const Half* row, int64_t rows, int64_t width) {
    const char* place = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < rows * width * 2; i += 64) __builtin_prefetch(place + i, 0, 2);
}

// scores[r * count + j ..] = q[r] . k[j ..] of `rows` keys side by side.
template <int heads, int rows>
inline void query_rows(const Half* queries, const Half* keys, int64_t count, int64_t width, float* scores) {
    __m512 sums[heads][4] = {};
    for (int64_t i = 0; i < width; i += kPairs) {
        __m512i k[rows];
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) k[j] = _mm512_loadu_si512(keys + j * width + i);
#pragma GCC unroll 4
        for (int r = 0; r < heads; ++r) {
            const __m512i q = _mm512_loadu_si512(queries + r * width + i);
#pragma GCC unroll 4
            for (int j = 0; j < rows; ++j) dot_halves(sums[r][j], q, k[j]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < heads; ++r) {
        const __m128 found = sums_of_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        if constexpr (rows == 4)
            _mm_storeu_ps(scores + r * count, found);
        else
            scores[r * count] = _mm_cvtss_f32(found);
    }
}

template <int heads>
void query_halves(const Half* queries, const Half* keys, const Half* values, int64_t count, int64_t width,
                  float* scores) {
    const int64_t ahead = 4096 / sizeof(Half);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        fetch_halves(keys + j * width + ahead, 4, width);
        fetch_halves(values + j * width, 4, width);
        query_rows<heads, 4>(queries, keys + j * width, count, width, scores + j);
    }
    for (; j < count; ++j) {
        fetch_halves(values + j * width, 1, width);
        query_rows<heads, 1>(queries, keys + j * width, count, width, scores + j);
    }
}

// Sums at even and at odd places, divided, to their places. Not inlined: it is seldom run and takes long to compile.
__attribute__((noinline)) inline void put_both(__m512 even, __m512 odd, float total, Half* out) {
    float sums[2][16];
    _mm512_storeu_ps(sums[0], even);
    _mm512_storeu_ps(sums[1], odd);
    for (int i = 0; i < kPairs; ++i) narrow(sums[i % 2][i / 2] / total, out[i]);
}

// out[r * width + i ..] over `vectors` vectors: the sum over j of scores[r][j] * v[j][i ..], divided by totals[r].
template <int heads, int vectors>
inline void weigh_vectors(const float* scores, const Half* values, const Half* next, int64_t count, int64_t width,
                          const float* totals, Half* out) {
    __m512 even[heads][vectors] = {}, odd[heads][vectors] = {};
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t j = 0; j < count; ++j) {
        if (next) fetch_halves(next + j * width, 1, vectors * kPairs);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) {
            const __m512i both = _mm512_loadu_si512(values + j * width + n * kPairs);
            const __m512 at_even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            const __m512 at_odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
#pragma GCC unroll 4
            for (int r = 0; r < heads; ++r) {
                const __m512 weight = _mm512_set1_ps(scores[r * count + j]);
                even[r][n] = _mm512_fmadd_ps(weight, at_even, even[r][n]);
                odd[r][n] = _mm512_fmadd_ps(weight, at_odd, odd[r][n]);
            }
        }
    }
    for (int r = 0; r < heads; ++r)
        for (int n = 0; n < vectors; ++n) put_both(even[r][n], odd[r][n], totals[r], out + r * width + n * kPairs);
}

template <int heads>
void weigh_halves(const float* scores, const Half* values, const Half* next, int64_t count, int64_t width,
                  const float* totals, Half* out) {
    constexpr int vectors = heads > 2 ? 2 : 4;  // sums of all heads stay in registers
    int64_t i = 0;
    for (; i + vectors * kPairs <= width; i += vectors * kPairs)
        weigh_vectors<heads, vectors>(scores, values + i, next ? next + i : next, count, width, totals, out + i);
    for (; i < width; i += kPairs)
        weigh_vectors<heads, 1>(scores, values + i, next ? next + i : next, count, width, totals, out + i);
}

#else

template <typename T, typename K>
constexpr bool kDots = false;
constexpr int kPairs = 1;
template <int heads, typename... Rest>
void query_halves(Rest...) {}
template <int heads, typename... Rest>
void weigh_halves(Rest...) {}

#endif
