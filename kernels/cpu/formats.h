// Weight formats: how one step (16 outputs x 32 inputs) lies in memory and is multiplied with a few rows.
//
// Activations are unsigned (code + 128), weights signed, so that one instruction multiplies them; the 128 is taken off
// afterwards through the sums of the weights. 4-bit codes stay in the upper half of their byte, which multiplies them
// by 16 and saves the sign extension; the packer divides the scales by 16. 2:4 weights are not expanded: the
// activations that meet them are gathered with a byte shuffle, whose indices are the stored positions.
#pragma once

#include "rows.h"
#include "simd.h"

template <int rows>
using Sums = Ints[rows][kChains<rows>];

// Positions of four survivors a word, two for each of two quads: in the lower or the upper eight bytes of a quarter.
INLINE Bytes quad_base(int upper) { return splat_word(upper ? 0x0C0C0808u : 0x04040000u); }

// Quad j of a step: inputs 4j..4j+3 of every output, as signed bytes.
struct Int8 {
    static constexpr int kBytes = 512;
    static constexpr bool kDense = true;

    template <int j>
    static INLINE Bytes quad(const uint8_t* w) {
        return load_bytes(w + 64 * j);
    }
};

struct Int4 {
    static constexpr int kBytes = 256;  // [4][16 outputs][4 bytes]: inputs 8j..8j+3 in low nibbles, 8j+4..8j+7 in high
    static constexpr bool kDense = true;

    template <int j>
    static INLINE Bytes quad(const uint8_t* w) {
        const Bytes both = load_bytes(w + 64 * (j / 2));
        if constexpr (j % 2) return both & splat_byte(0xF0);
        return shift_left<4>(both) & splat_byte(0xF0);
    }
};

// Three bits: the upper two of code j of an output's byte in bits 2 * (j % 4) .. of the byte (j / 4), the lowest in bit j
// of a third 64 bytes, all so that a shift to the left brings them to the top of the byte. Multiplied by 32 there.
struct Int3 {
    static constexpr int kBytes = 192;
    static constexpr bool kDense = true;

    template <int j>
    static INLINE Bytes quad(const uint8_t* w) {
        const Bytes upper = shift_left<2 * (j % 4)>(load_bytes(w + 64 * (j / 4))), lowest = load_bytes(w + 128);
        Bytes bit;
        if constexpr (j <= 5)
            bit = shift_left<5 - j>(lowest);
        else
            bit = shift_right<j - 5>(lowest);
        return and_or(upper, splat_byte(0xC0), bit & splat_byte(0x20));
    }
};

// Two bits: code j in bits 6 - 2 * (j % 4) .. of the byte (j / 4). Multiplied by 64 at the top.
struct Int2 {
    static constexpr int kBytes = 128;
    static constexpr bool kDense = true;

    template <int j>
    static INLINE Bytes quad(const uint8_t* w) {
        return shift_left<2 * (j % 4)>(load_bytes(w + 64 * (j / 4))) & splat_byte(0xC0);
    }
};

// Survivor j of chunk t (8 inputs, 4 survivors) of an output: byte 4 * output + j; its position in its quad: bits
// 2t, 2t+1 of the same byte of the last 64 bytes of the step.
template <class Values>
struct Sparse {
    static constexpr int kBytes = Values::kBytes + 64;
    static constexpr bool kDense = false;

    template <int t>
    static INLINE Bytes select(Bytes positions) {
        return and_or(shift_right<2 * t>(positions), splat_byte(3), quad_base(t % 2));
    }

    template <int rows>
    static INLINE void step(const uint8_t* w, const uint8_t* x, Sums<rows>& sums) {
        Bytes positions = load_bytes(w + Values::kBytes);
        half<rows, 0>(w, x, positions, sums);
        half<rows, 1>(w, x, positions, sums);
    }

    template <int rows, int upper>
    static INLINE void half(const uint8_t* w, const uint8_t* x, Bytes positions, Sums<rows>& sums) {
        Bytes first = Values::template chunk<2 * upper>(w), second = Values::template chunk<2 * upper + 1>(w);
        Bytes from_first = select<2 * upper>(positions), from_second = select<2 * upper + 1>(positions);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            Bytes table = broadcast16(x + r * kStep + 16 * upper);
            Ints& even = sums[r][(2 * upper) % kChains<rows>];
            even = dot(even, shuffle(table, from_first), first);
            Ints& odd = sums[r][(2 * upper + 1) % kChains<rows>];
            odd = dot(odd, shuffle(table, from_second), second);
        }
    }
};

struct Values8 {
    static constexpr int kBytes = 256;
    template <int t>
    static INLINE Bytes chunk(const uint8_t* w) {
        return load_bytes(w + 64 * t);
    }
};

struct Values4 {
    static constexpr int kBytes = 128;  // low nibbles: chunk 0 and 2; high nibbles: chunk 1 and 3
    template <int t>
    static INLINE Bytes chunk(const uint8_t* w) {
        Bytes both = load_bytes(w + 64 * (t / 2));
        return (t % 2 ? both : shift_left<4>(both)) & splat_byte(0xF0);
    }
};

using Sparse8 = Sparse<Values8>;
using Sparse4 = Sparse<Values4>;

// One step of several blocks, `apart` bytes from each other, with a few rows: every activation that is loaded meets the
// same inputs of all blocks.
template <class Format, int rows, int blocks, int j = 0>
INLINE void step(const uint8_t* w, int64_t apart, const uint8_t* x, Sums<rows> (&sums)[blocks]) {
    if constexpr (Format::kDense) {
        Bytes weights[blocks];
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) weights[b] = Format::template quad<j>(w + b * apart);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const Bytes inputs = broadcast4(x + r * kStep + 4 * j);
#pragma GCC unroll 4
            for (int b = 0; b < blocks; b++) {
                Ints& sum = sums[b][r][j % kChains<rows>];
                sum = dot(sum, inputs, weights[b]);
            }
        }
        if constexpr (j < 7) step<Format, rows, blocks, j + 1>(w, apart, x, sums);
    } else {
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) Format::template step<rows>(w + b * apart, x, sums[b]);
    }
}
