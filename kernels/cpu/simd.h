// 64-byte vectors for integer kernels: sixteen 32-bit sums, or sixteen times four bytes. One type, three instruction
// sets: AVX-512 VNNI, AVX2 (pairs of 32 bytes; with AVX-VNNI where the compiler is told of it), and Arm's (simd_neon.h).
// All that is not here is plain C++.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int kStreamRows = 8;    // activation rows that weights meet on one pass
constexpr int kStreamBlocks = 4;  // blocks that a thread reads side by side where there is one row
constexpr int kTileBlocks = 2;    // blocks that meet those rows at a time: 16 sums of the 32 registers

struct Bytes {
    __m512i v;
};
struct Ints {
    __m512i v;
};
struct Floats {
    __m512 v;
};

INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
INLINE Floats zero_floats() { return {_mm512_setzero_ps()}; }
INLINE Floats splat(float x) { return {_mm512_set1_ps(x)}; }
INLINE Bytes splat_byte(int x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
INLINE Bytes splat_word(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
INLINE Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE Ints load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }

// Four bytes to all sixteen words; sixteen bytes to all four quarters.
INLINE Bytes broadcast4(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
}
INLINE Bytes broadcast16(const uint8_t* p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// sums[i] += u[4i] * s[4i] + ... + u[4i+3] * s[4i+3], u unsigned, s signed, exact.
// Assembly, because gcc 12 may copy and spill sums around the intrinsic, at half the speed.
INLINE Ints dot(Ints sums, Bytes u, Bytes s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(u.v), "vm"(s.v));
    return sums;
}

INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }

INLINE Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int bits>
INLINE Bytes shift_left(Bytes a) {  // of 16-bit words
    return {_mm512_slli_epi16(a.v, bits)};
}
template <int bits>
INLINE Bytes shift_right(Bytes a) {
    return {_mm512_srli_epi16(a.v, bits)};
}
// (a & b) | c
INLINE Bytes and_or(Bytes a, Bytes b, Bytes c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xEA)}; }
// Within each quarter: table[index & 15].
INLINE Bytes shuffle(Bytes table, Bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }

// Sixteen bf16 numbers.
INLINE Floats load_bf16(const uint16_t* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
INLINE void store_bf16(uint16_t* p, Floats a) {  // ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
#else
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#endif
}

INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
INLINE Ints splat_int(int x) { return {_mm512_set1_epi32(x)}; }
INLINE Ints to_nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // ties to even
template <int bits>
INLINE Ints shift_right_signed(Ints a) {
    return {_mm512_srai_epi32(a.v, bits)};
}
template <int bits>
INLINE Ints shift_left_int(Ints a) {
    return {_mm512_slli_epi32(a.v, bits)};
}
// Sixteen numbers within -128 .. 127 as bytes, plus 128.
INLINE void store_codes(uint8_t* p, Ints a) {
    __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(a.v), _mm_set1_epi8(static_cast<char>(0x80)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kStreamRows = 4, kStreamBlocks = 1, kTileBlocks = 1;

struct Bytes {
    __m256i v[2];
};
struct Ints {
    __m256i v[2];
};
struct Floats {
    __m256 v[2];
};

#define BOTH(expression_0, expression_1) \
    { expression_0, expression_1 }
#define LOAD32(p, i) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + (i))
#define STORE32(p, i, a) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + (i), a)

INLINE Ints zero_ints() { return {BOTH(_mm256_setzero_si256(), _mm256_setzero_si256())}; }
INLINE Floats zero_floats() { return {BOTH(_mm256_setzero_ps(), _mm256_setzero_ps())}; }
INLINE Floats splat(float x) { return {BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x))}; }
INLINE Bytes splat_byte(int x) {
    __m256i half = _mm256_set1_epi8(static_cast<char>(x));
    return {BOTH(half, half)};
}
INLINE Bytes splat_word(uint32_t x) {
    __m256i half = _mm256_set1_epi32(static_cast<int>(x));
    return {BOTH(half, half)};
}
INLINE Bytes load_bytes(const void* p) { return {BOTH(LOAD32(p, 0), LOAD32(p, 1))}; }
INLINE Ints load_ints(const void* p) { return {BOTH(LOAD32(p, 0), LOAD32(p, 1))}; }
INLINE Floats load_floats(const float* p) { return {BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8))}; }
INLINE void store_floats(float* p, Floats a) { _mm256_storeu_ps(p, a.v[0]), _mm256_storeu_ps(p + 8, a.v[1]); }
INLINE Bytes broadcast4(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return splat_word(word);
}
INLINE Bytes broadcast16(const uint8_t* p) {
    __m256i half = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {BOTH(half, half)};
}

INLINE __m256i dot_half(__m256i sums, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#else
    // vpmaddubsw would saturate: 16-bit products of the even and of the odd bytes instead.
    const __m256i low = _mm256_set1_epi16(0x00FF);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
#endif
}
INLINE Ints dot(Ints sums, Bytes u, Bytes s) {
    return {BOTH(dot_half(sums.v[0], u.v[0], s.v[0]), dot_half(sums.v[1], u.v[1], s.v[1]))};
}

INLINE Ints operator+(Ints a, Ints b) {
    return {BOTH(_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1]))};
}
INLINE Ints operator-(Ints a, Ints b) {
    return {BOTH(_mm256_sub_epi32(a.v[0], b.v[0]), _mm256_sub_epi32(a.v[1], b.v[1]))};
}
INLINE Floats operator*(Floats a, Floats b) {
    return {BOTH(_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1]))};
}
INLINE Floats operator-(Floats a, Floats b) {
    return {BOTH(_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1]))};
}
INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {BOTH(_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1]))};
}
INLINE Floats to_floats(Ints a) { return {BOTH(_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1]))}; }
INLINE Bytes operator&(Bytes a, Bytes b) {
    return {BOTH(_mm256_and_si256(a.v[0], b.v[0]), _mm256_and_si256(a.v[1], b.v[1]))};
}
INLINE Bytes operator|(Bytes a, Bytes b) {
    return {BOTH(_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1]))};
}
template <int bits>
INLINE Bytes shift_left(Bytes a) {
    return {BOTH(_mm256_slli_epi16(a.v[0], bits), _mm256_slli_epi16(a.v[1], bits))};
}
template <int bits>
INLINE Bytes shift_right(Bytes a) {
    return {BOTH(_mm256_srli_epi16(a.v[0], bits), _mm256_srli_epi16(a.v[1], bits))};
}
INLINE Bytes and_or(Bytes a, Bytes b, Bytes c) { return (a & b) | c; }
INLINE Bytes shuffle(Bytes table, Bytes index) {
    return {BOTH(_mm256_shuffle_epi8(table.v[0], index.v[0]), _mm256_shuffle_epi8(table.v[1], index.v[1]))};
}
INLINE __m256 load_bf16_half(const uint16_t* p) {
    __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
INLINE Floats load_bf16(const uint16_t* p) { return {BOTH(load_bf16_half(p), load_bf16_half(p + 8))}; }
INLINE void store_bf16_half(uint16_t* p, __m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
}
INLINE void store_bf16(uint16_t* p, Floats a) { store_bf16_half(p, a.v[0]), store_bf16_half(p + 8, a.v[1]); }

INLINE Floats operator/(Floats a, Floats b) {
    return {BOTH(_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1]))};
}
INLINE Floats max(Floats a, Floats b) {
    return {BOTH(_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1]))};
}
INLINE Floats min(Floats a, Floats b) {
    return {BOTH(_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1]))};
}
INLINE Floats magnitude(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {BOTH(_mm256_andnot_ps(sign, a.v[0]), _mm256_andnot_ps(sign, a.v[1]))};
}
INLINE Ints splat_int(int x) { return {BOTH(_mm256_set1_epi32(x), _mm256_set1_epi32(x))}; }
INLINE Ints to_nearest(Floats a) { return {BOTH(_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1]))}; }
template <int bits>
INLINE Ints shift_right_signed(Ints a) {
    return {BOTH(_mm256_srai_epi32(a.v[0], bits), _mm256_srai_epi32(a.v[1], bits))};
}
template <int bits>
INLINE Ints shift_left_int(Ints a) {
    return {BOTH(_mm256_slli_epi32(a.v[0], bits), _mm256_slli_epi32(a.v[1], bits))};
}
INLINE void store_codes(uint8_t* p, Ints a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v[0], a.v[1]), 0xD8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#elif defined(__ARM_FEATURE_DOTPROD)

#include "simd_neon.h"

#else
#error "needs AVX-512 VNNI, AVX2 with FMA, or Arm's dot products"
#endif
