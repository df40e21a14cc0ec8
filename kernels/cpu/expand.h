// Steps of packed weights (formats.h, bf16.cpp) laid out as tiles take them: rows of [16 outputs][4 bytes], which hold
// four int8 inputs or two bf16 ones. Dense int8 and bf16 lie so already. What 4-bit and 2:4 weights save in memory is
// undone here, in the second cache, once for all rows of a pass.
//
// Words are plain C++ where a vector type would not help: compilers make variable shifts of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

struct Words {
    uint32_t of[16];
};

template <class From>
INLINE Words words(const From& bytes) {
    Words made;
    std::memcpy(made.of, &bytes, 64);
    return made;
}

INLINE void put(uint8_t* to, const Bytes& bytes) { std::memcpy(to, &bytes, 64); }

// One step, 512 bytes: [8][16 outputs][4 inputs].
INLINE void expand(const Int8*, const uint8_t* w, uint8_t* to) { std::memcpy(to, w, Int8::kBytes); }

INLINE void expand(const Int4*, const uint8_t* w, uint8_t* to) {
    const Bytes high = splat_byte(0xF0);
    for (int j = 0; j < 4; j++) {
        const Bytes both = load_bytes(w + 64 * j);
        put(to + 128 * j, shift_left<4>(both) & high);
        put(to + 128 * j + 64, both & high);
    }
}

// Eight inputs of every output: its four survivors, each moved to its position in its quad.
template <int t>
INLINE void expand_chunk(const Words& kept, const Words& spots, uint8_t* to) {
    Words first, second;
    for (int i = 0; i < 16; i++) {
        const uint32_t a = kept.of[i], at = spots.of[i] >> 2 * t;
        first.of[i] = (a & 0xFF) << 8 * (at & 3) | (a >> 8 & 0xFF) << 8 * (at >> 8 & 3);
        second.of[i] = (a >> 16 & 0xFF) << 8 * (at >> 16 & 3) | (a >> 24) << 8 * (at >> 24 & 3);
    }
    std::memcpy(to, first.of, 64);
    std::memcpy(to + 64, second.of, 64);
}

template <class Values>
INLINE void expand(const Sparse<Values>*, const uint8_t* w, uint8_t* to) {
    Words spots;
    std::memcpy(spots.of, w + Values::kBytes, 64);
    expand_chunk<0>(words(Values::template chunk<0>(w)), spots, to);
    expand_chunk<1>(words(Values::template chunk<1>(w)), spots, to + 128);
    expand_chunk<2>(words(Values::template chunk<2>(w)), spots, to + 256);
    expand_chunk<3>(words(Values::template chunk<3>(w)), spots, to + 384);
}

// One block's steps from first to last, a tile of 64 inputs for two; zeros where the last has no second.
template <class Format>
void expand_block(const uint8_t* w, int64_t steps, uint8_t* to) {
    for (int64_t s = 0; s < steps; s++)
        expand(static_cast<const Format*>(nullptr), w + s * Format::kBytes, to + s * Int8::kBytes);
    if (steps % 2) std::memset(to + steps * Int8::kBytes, 0, Int8::kBytes);
}

// One block's steps of 2:4 bf16 (bf16.cpp): [8 quads][16 outputs][2 survivors] and their positions, to
// [16 pairs of inputs][16 outputs][2 inputs], which is a tile.
inline void expand_bf16_block(const uint8_t* w, int64_t steps, uint8_t* to) {
    for (int64_t s = 0; s < steps; s++, w += 576, to += 1024) {
        Words spots;
        std::memcpy(spots.of, w + 512, 64);
        for (int t = 0; t < 8; t++) {
            Words kept, first, second;
            std::memcpy(kept.of, w + 64 * t, 64);
            for (int i = 0; i < 16; i++) {
                const uint32_t at = spots.of[i] >> 2 * t;
                const uint64_t quad = static_cast<uint64_t>(kept.of[i] & 0xFFFF) << 16 * (at & 3) |
                                      static_cast<uint64_t>(kept.of[i] >> 16) << 16 * (at >> 16 & 3);
                first.of[i] = static_cast<uint32_t>(quad);
                second.of[i] = static_cast<uint32_t>(quad >> 32);
            }
            std::memcpy(to + 128 * t, first.of, 64);
            std::memcpy(to + 128 * t + 64, second.of, 64);
        }
    }
}
