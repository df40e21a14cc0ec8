// The description of packed bf16 weights.
#pragma once

#include <cstdint>

// One packed layer group; written by bf16.py (`_Linear`), field by field.
struct Linear {
    const uint8_t* weights;  // [blocks][steps][format's bytes of a step]
    const float* bias;       // [blocks * 16], or null
    int64_t outputs, inputs, padded;
    int32_t blocks, steps, sparse;
};
