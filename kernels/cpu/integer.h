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

// From the sums of one block to its outputs: what all rows share is loaded once.
template <class Type, bool grouped>
class Outputs {
   public:
    INLINE Outputs(const Linear& a, int block, void* y)
        : y_(static_cast<uint8_t*>(y)), stride_(a.outputs * Type::kBytes), first_(block * kLanes), count_(a.outputs) {
        bias_ = a.bias ? load_floats(a.bias + first_) : zero_floats();
        if constexpr (grouped) {
            off_ = load_floats(static_cast<const float*>(a.corrections) + first_);
        } else {
            whole_off_ = load_ints(static_cast<const int32_t*>(a.corrections) + first_);
            scale_ = load_bf16(a.scales + first_);
        }
    }

    // Sums of one row, all planes. `sums(plane)` gives Ints, or Floats where grouped.
    template <int planes, class Get>
    INLINE void put(int64_t row, float row_scale, Get sums) const {
        Floats total = zero_floats();
#pragma GCC unroll 3
        for (int plane = 0; plane < planes; plane++) {
            Floats value;
            if constexpr (grouped)
                value = sums(plane) - off_;
            else
                value = to_floats(sums(plane) - whole_off_);
            total = planes == 1 ? value : fma(value, splat(plane_weight<planes>(plane)), total);
        }
        store(row, row_scale, total);
    }

    // The same where two planes were brought together as integers: `value` is of 256 * the upper plus the lower.
    INLINE void put_pair(int64_t row, float row_scale, Floats value) const {
        store(row, row_scale, fma(off_, splat(-257.0f), value));
    }

   private:
    INLINE void store(int64_t row, float row_scale, Floats total) const {
        Floats scale = splat(row_scale);
        if constexpr (!grouped) scale = scale * scale_;
        const Floats result = fma(total, scale, bias_);
        uint8_t* out = y_ + row * stride_;
        if (first_ + kLanes <= count_)
            Type::store(out, first_, result);
        else
            store_tail<Type>(out, first_, count_, result);
    }

    uint8_t* y_;
    int64_t stride_, first_, count_;
    Floats bias_, scale_, off_;
    Ints whole_off_;
};
