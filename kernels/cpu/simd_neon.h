// The vectors of simd.h on Arm: four quarters of sixteen bytes. Needs dot products (Armv8.2); with the int8 matrix
// extension (i8mm) one instruction multiplies unsigned by signed bytes.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

constexpr int kStreamRows = 4, kStreamBlocks = 1, kTileBlocks = 1;  // 16 of the 32 registers hold the sums of four rows

struct Bytes {
    uint8x16_t v[4];
};
struct Ints {
    int32x4_t v[4];
};
struct Floats {
    float32x4_t v[4];
};

// `expression` with q = 0 .. 3.
#define QUARTERS(type, expression)              \
    type result;                                \
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) result.v[q] = (expression); \
    return result

INLINE Ints splat_int(int x) { QUARTERS(Ints, vdupq_n_s32(x)); }
INLINE Ints zero_ints() { return splat_int(0); }
INLINE Floats splat(float x) { QUARTERS(Floats, vdupq_n_f32(x)); }
INLINE Floats zero_floats() { return splat(0.0f); }
INLINE Bytes splat_byte(int x) { QUARTERS(Bytes, vdupq_n_u8(static_cast<uint8_t>(x))); }
INLINE Bytes splat_word(uint32_t x) { QUARTERS(Bytes, vreinterpretq_u8_u32(vdupq_n_u32(x))); }
INLINE Bytes load_bytes(const void* p) { QUARTERS(Bytes, vld1q_u8(static_cast<const uint8_t*>(p) + 16 * q)); }
INLINE Ints load_ints(const void* p) {
    Bytes raw = load_bytes(p);
    QUARTERS(Ints, vreinterpretq_s32_u8(raw.v[q]));
}
INLINE Floats load_floats(const float* p) { QUARTERS(Floats, vld1q_f32(p + 4 * q)); }
INLINE void store_floats(float* p, Floats a) {
    for (int q = 0; q < 4; q++) vst1q_f32(p + 4 * q, a.v[q]);
}
INLINE Bytes broadcast4(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return splat_word(word);
}
INLINE Bytes broadcast16(const uint8_t* p) {
    const uint8x16_t quarter = vld1q_u8(p);
    QUARTERS(Bytes, quarter);
}

INLINE int32x4_t dot_quarter(int32x4_t sums, uint8x16_t u, uint8x16_t s) {
    const int8x16_t weights = vreinterpretq_s8_u8(s);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sums, u, weights);
#else
    // u = (u - 128) + 64 + 64, because both factors must be signed.
    const int8x16_t shifted = vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(0x80))), half = vdupq_n_s8(64);
    return vdotq_s32(vdotq_s32(vdotq_s32(sums, shifted, weights), half, weights), half, weights);
#endif
}
INLINE Ints dot(Ints sums, Bytes u, Bytes s) { QUARTERS(Ints, dot_quarter(sums.v[q], u.v[q], s.v[q])); }

INLINE Ints operator+(Ints a, Ints b) { QUARTERS(Ints, vaddq_s32(a.v[q], b.v[q])); }
INLINE Ints operator-(Ints a, Ints b) { QUARTERS(Ints, vsubq_s32(a.v[q], b.v[q])); }
INLINE Floats operator*(Floats a, Floats b) { QUARTERS(Floats, vmulq_f32(a.v[q], b.v[q])); }
INLINE Floats operator/(Floats a, Floats b) { QUARTERS(Floats, vdivq_f32(a.v[q], b.v[q])); }
INLINE Floats operator-(Floats a, Floats b) { QUARTERS(Floats, vsubq_f32(a.v[q], b.v[q])); }
INLINE Floats fma(Floats a, Floats b, Floats c) { QUARTERS(Floats, vfmaq_f32(c.v[q], a.v[q], b.v[q])); }
INLINE Floats max(Floats a, Floats b) { QUARTERS(Floats, vmaxq_f32(a.v[q], b.v[q])); }
INLINE Floats min(Floats a, Floats b) { QUARTERS(Floats, vminq_f32(a.v[q], b.v[q])); }
INLINE Floats magnitude(Floats a) { QUARTERS(Floats, vabsq_f32(a.v[q])); }
INLINE Floats to_floats(Ints a) { QUARTERS(Floats, vcvtq_f32_s32(a.v[q])); }
INLINE Ints to_nearest(Floats a) { QUARTERS(Ints, vcvtnq_s32_f32(a.v[q])); }
template <int bits>
INLINE Ints shift_right_signed(Ints a) {
    QUARTERS(Ints, vshrq_n_s32(a.v[q], bits));
}
template <int bits>
INLINE Ints shift_left_int(Ints a) {
    QUARTERS(Ints, vshlq_n_s32(a.v[q], bits));
}

INLINE Bytes operator&(Bytes a, Bytes b) { QUARTERS(Bytes, vandq_u8(a.v[q], b.v[q])); }
INLINE Bytes and_or(Bytes a, Bytes b, Bytes c) { QUARTERS(Bytes, vorrq_u8(vandq_u8(a.v[q], b.v[q]), c.v[q])); }
template <int bits>
INLINE Bytes shift_left(Bytes a) {  // of 16-bit words
    QUARTERS(Bytes, vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a.v[q]), bits)));
}
template <int bits>
INLINE Bytes shift_right(Bytes a) {
    if constexpr (bits == 0) return a;  // the instruction has no shift by nothing
    else { QUARTERS(Bytes, vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a.v[q]), bits))); }
}
INLINE Bytes shuffle(Bytes table, Bytes index) { QUARTERS(Bytes, vqtbl1q_u8(table.v[q], index.v[q])); }

INLINE Floats load_bf16(const uint16_t* p) {
    QUARTERS(Floats, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * q)), 16)));
}
INLINE void store_bf16(uint16_t* p, Floats a) {  // ties to even; NaN stays NaN
    for (int q = 0; q < 4; q++) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[q]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
        const uint32x4_t number = vceqq_f32(a.v[q], a.v[q]);
        vst1_u16(p + 4 * q, vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7FC00000)), 16));
    }
}
INLINE void store_codes(uint8_t* p, Ints a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    const uint8x16_t bytes = vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    vst1q_u8(p, veorq_u8(bytes, vdupq_n_u8(0x80)));
}
