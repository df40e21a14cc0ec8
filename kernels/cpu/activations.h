// Activations as planes of int8 codes, stored plus 128, one scale a token.
//
// One plane is the per-token int8 of `kernels.reference`: scale amax / 127.5, ties to even. Two planes are 16 bits
// (x = scale * (256 * plane 0 + plane 1)) and three are 24: activations that a scheme leaves alone, as integers fine
// enough that bf16 (two) or fp32 (three) rounding dwarfs what they lose: 2^-16 or 2^-24 of the token's largest value.
#pragma once

#include "rows.h"
#include "simd.h"

constexpr float kSmallestAmax = 1e-30f;

struct Bf16 {
    static constexpr int kBytes = 2;
    static INLINE Floats load(const void* p, int64_t i) { return load_bf16(static_cast<const uint16_t*>(p) + i); }
    static INLINE void store(void* p, int64_t i, Floats a) { store_bf16(static_cast<uint16_t*>(p) + i, a); }
};

struct Fp32 {
    static constexpr int kBytes = 4;
    static INLINE Floats load(const void* p, int64_t i) { return load_floats(static_cast<const float*>(p) + i); }
    static INLINE void store(void* p, int64_t i, Floats a) { store_floats(static_cast<float*>(p) + i, a); }
};

// A copy of the last, partial vector, padded with zeros.
template <class Type>
INLINE Floats load_tail(const void* p, int64_t i, int64_t count) {
    alignas(64) uint8_t padded[64] = {};
    std::memcpy(padded, static_cast<const uint8_t*>(p) + i * Type::kBytes, (count - i) * Type::kBytes);
    return Type::load(padded, 0);
}

template <class Type>
INLINE void store_tail(void* p, int64_t i, int64_t count, Floats a) {
    alignas(64) uint8_t padded[64];
    Type::store(padded, 0, a);
    std::memcpy(static_cast<uint8_t*>(p) + i * Type::kBytes, padded, (count - i) * Type::kBytes);
}

// The largest magnitude; NaN or infinity when the row holds one.
template <class Type>
float largest(const void* x, int64_t count) {
    Floats most = zero_floats(), poison = zero_floats();
    for (int64_t i = 0; i < count; i += 16) {
        Floats a = i + 16 <= count ? Type::load(x, i) : load_tail<Type>(x, i, count);
        most = max(most, magnitude(a));
        poison = fma(a, zero_floats(), poison);
    }
    float lanes[16], bad[16], result = kSmallestAmax;
    store_floats(lanes, most);
    store_floats(bad, poison);
    for (int i = 0; i < 16; i++) result = lanes[i] > result ? lanes[i] : result;
    for (int i = 0; i < 16; i++) result += bad[i];
    return result;
}

// One row into `planes` rows of its group: input i of plane p at (i / step) * step_stride + step * p + i % step. Returns
// the scale of the last plane.
template <class Type, int planes, int step = kStep>
float quantize_row(const void* x, int64_t count, int64_t step_stride, uint8_t* codes) {
    constexpr float steps = planes == 1 ? 127.5f : planes == 2 ? 32639.0f : 8355711.0f;
    constexpr float lowest = planes == 1 ? -128.0f : -steps, highest = planes == 1 ? 127.0f : steps;
    const float scale = largest<Type>(x, count) / steps;
    const Floats by = splat(scale), low = splat(lowest), high = splat(highest);
    for (int64_t i = 0; i < count; i += 16) {
        uint8_t* place = codes + i / step * step_stride + i % step;
        Floats a = i + 16 <= count ? Type::load(x, i) : load_tail<Type>(x, i, count);
        Ints code = to_nearest(max(min(a / by, high), low));
        if constexpr (planes == 3) {
            Ints top = shift_right_signed<16>(code + splat_int(0x8080));
            store_codes(place, top);
            code = code - shift_left_int<16>(top);
        }
        if constexpr (planes >= 2) {
            Ints top = shift_right_signed<8>(code + splat_int(0x80));
            store_codes(place + (planes - 2) * step, top);
            code = code - shift_left_int<8>(top);
        }
        store_codes(place + (planes - 1) * step, code);
    }
    // What is left of the last step meets weights of zero: its value does not matter, but it must be some value.
    for (int64_t i = (count + 15) / 16 * 16; i % step; i += 16)
        for (int p = 0; p < planes; p++) std::memset(codes + i / step * step_stride + p * step + i % step, 128, 16);
    return scale;
}
