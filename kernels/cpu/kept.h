// Keys and values as a cache keeps them: numbers of the activations' type, or a byte each with the row's scale (fp32)
// behind them. A row is one head of one token. `kernels/kv_cache.py` says the same in torch.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "scalars.h"

struct Int8 {
    int8_t code;
};
struct Fp8 {  // e4m3: sign, four bits of exponent (bias 7), three of mantissa; no infinities
    uint8_t bits;
};

constexpr int kWide = 16;
using Lanes = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));

template <typename K>
constexpr bool kCoded = sizeof(K) == 1;
template <typename K>
constexpr float kMost = 0.0f;  // the largest code
template <>
inline constexpr float kMost<Int8> = 127.0f;
template <>
inline constexpr float kMost<Fp8> = 448.0f;
constexpr float kLeastScale = 1e-30f;

// Elements from one row to the next.
template <typename K>
constexpr int64_t row_size(int64_t width) {
    return kCoded<K> ? width + static_cast<int64_t>(sizeof(float)) : width;
}

template <typename K>
inline float row_scale(const K* row, int64_t width) {
    float scale = 1.0f;
    if constexpr (kCoded<K>) std::memcpy(&scale, row + width, sizeof scale);
    return scale;
}

inline Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

// What compilers make of the notation below is two to five times as many instructions (gcc 12).
inline Lanes load(const Half* p) {
    const __m256i shorts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16));
}

inline Lanes load(const Int8* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// As fp16 with the same bits of exponent, whose bias is 8 more.
inline Lanes load(const Fp8* p) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(w, 7), 15);
    const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(0x3f80));
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest)) * 256.0f;
}

inline float sum(Lanes v) { return _mm512_reduce_add_ps(v); }

#else

inline Lanes load(const Half* p) {
    using Shorts = uint16_t __attribute__((vector_size(32)));
    Shorts s;
    std::memcpy(&s, p, sizeof s);
    return reinterpret_cast<Lanes>(__builtin_convertvector(s, Words) << 16);
}

inline Lanes load(const Int8* p) {  // by way of 16 bits: gcc 12 widens fourfold one by one
    using Bytes = int8_t __attribute__((vector_size(16)));
    using Shorts = int16_t __attribute__((vector_size(32)));
    using Ints = int32_t __attribute__((vector_size(64)));
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Shorts), Ints), Lanes);
}

// Exponents are moved from bias 7 to 127; numbers below 2^-6, which have no leading one, are whole 512ths.
inline Lanes load(const Fp8* p) {
    using Bytes = uint8_t __attribute__((vector_size(16)));
    using Shorts = uint16_t __attribute__((vector_size(32)));
    using Ints = int32_t __attribute__((vector_size(64)));
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    const Words w = __builtin_convertvector(__builtin_convertvector(b, Shorts), Words), magnitude = w & 0x7f;
    const Lanes small = __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Lanes) * 0.001953125f;
    const Words normal = (magnitude << 20) + (120u << 23);
    const Words bits = magnitude < 8 ? reinterpret_cast<Words>(small) : normal;
    return reinterpret_cast<Lanes>(bits | (w & 0x80) << 24);
}

inline float sum(Lanes v) {
    using Half8 = float __attribute__((vector_size(32)));
    using Half4 = float __attribute__((vector_size(16)));
    Half8 a[2];
    std::memcpy(a, &v, sizeof v);
    const Half8 b = a[0] + a[1];
    Half4 c[2];
    std::memcpy(c, &b, sizeof b);
    const Half4 d = c[0] + c[1];
    return (d[0] + d[1]) + (d[2] + d[3]);
}

#endif

inline float wide(Int8 x) { return x.code; }
inline float wide(Fp8 x) {
    const uint32_t magnitude = x.bits & 0x7f;
    const uint32_t word = (magnitude << 20) + (120u << 23);
    float value;
    std::memcpy(&value, &word, 4);
    if (magnitude < 8) value = static_cast<float>(magnitude) * 0.001953125f;
    return x.bits & 0x80 ? -value : value;
}

inline void encode(float x, Int8& y) { y.code = static_cast<int8_t>(std::nearbyint(x)); }
inline void encode(float x, Fp8& y) {  // to nearest, ties to even; |x| is at most 448
    const float a = std::fabs(x);
    uint32_t word;
    std::memcpy(&word, &a, 4);
    const uint32_t normal = ((word + 0x7ffff + ((word >> 20) & 1)) >> 20) - (120u << 3);
    const uint32_t code = a < 0.015625f ? static_cast<uint32_t>(std::nearbyint(a * 512.0f)) : normal;
    y.bits = static_cast<uint8_t>(std::min(code, 0x7eu) | (std::signbit(x) ? 0x80u : 0u));
}

// A row as it is kept. A row that is not finite gets a scale that is not, and codes of zero.
template <typename T, typename K>
void keep(const T* x, int64_t width, K* row) {
    if constexpr (kCoded<K>) {
        float most = 0.0f, total = 0.0f;
        for (int64_t i = 0; i < width; ++i) {
            const float a = std::fabs(wide(x[i]));
            most = a > most ? a : most;
            total += a - a;  // NaN where one is not finite
        }
        const float scale = std::max(most / kMost<K>, kLeastScale) + total;
        const bool finite = total == 0.0f;
        for (int64_t i = 0; i < width; ++i) encode(finite ? wide(x[i]) / scale : 0.0f, row[i]);
        std::memcpy(row + width, &scale, sizeof scale);
    } else {
        std::copy_n(x, width, row);
    }
}
