// What kernels of integer weights share: the description of packed weights, and the way from sums to outputs.
#pragma once

#include <cstdint>

#include "activations.h"
#include "rows.h"
#include "simd.h"

// One packed layer group; written by integer.py (`_Linear`), field by field.
struct Linear {
    const uint8_t* weights;   // [blocks][steps][format's bytes of a step]
    const uint16_t* scales;   // bf16: [blocks][groups][16]
    const void* corrections;  // 128 * sum of codes, [blocks * 16]: int32, or float times the scales where grouped
    const float* bias;        // [blocks * 16], or null
    int64_t outputs, inputs, padded;
    int32_t blocks, steps, steps_per_group;  // steps_per_group == steps: one scale a channel
    int32_t format, planes, bf16;
};

template <int planes>
float plane_weight(int plane) {
    return plane == planes - 1 ? 1.0f : plane == planes - 2 ? 256.0f : 65536.0f;
}

// A block's outputs of one row: sums that all planes and scales of groups are in, times the row's scale and the channel's.
template <class Type, bool grouped>
INLINE void put_outputs(const Linear& a, int block, Floats total, float row_scale, void* y, int64_t row) {
    Floats scale = splat(row_scale);
    if constexpr (!grouped) scale = scale * load_bf16(a.scales + block * kLanes);
    Floats bias = a.bias ? load_floats(a.bias + block * kLanes) : zero_floats();
    Floats result = fma(total, scale, bias);
    uint8_t* out = static_cast<uint8_t*>(y) + row * a.outputs * Type::kBytes;
    if ((block + 1) * kLanes <= a.outputs)
        Type::store(out, block * kLanes, result);
    else
        store_tail<Type>(out, block * kLanes, a.outputs, result);
}

// The same where two planes were brought together as integers: `value` is of 256 * the upper plus the lower.
template <class Type>
INLINE void finish_pair(const Linear& a, int block, float row_scale, void* y, int64_t row, Floats value) {
    const Floats off = load_floats(static_cast<const float*>(a.corrections) + block * kLanes);
    put_outputs<Type, true>(a, block, fma(off, splat(-257.0f), value), row_scale, y, row);
}

// Sums of one row and block, all planes, to outputs. `sums(plane)` gives Ints, or Floats where grouped.
template <class Type, int planes, bool grouped, class Get>
INLINE void finish(const Linear& a, int block, float row_scale, void* y, int64_t row, Get sums) {
    Floats total = zero_floats();
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) {
        Floats value;
        if constexpr (grouped) {
            value = sums(plane) - load_floats(static_cast<const float*>(a.corrections) + block * kLanes);
        } else {
            value = to_floats(sums(plane) - load_ints(static_cast<const int32_t*>(a.corrections) + block * kLanes));
        }
        total = fma(value, splat(plane_weight<planes>(plane)), total);
    }
    put_outputs<Type, grouped>(a, block, total, row_scale, y, row);
}
