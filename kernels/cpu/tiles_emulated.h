// The tile instructions of tiles.h in plain C++, as Intel's manual states them, faults included: for tests on CPUs
// without AMX. Numbers are the manual's to the last bit; of its pseudo-code's flushing to zero, results that would
// round up to the smallest normal number are kept, as arithmetic with gradual underflow finds them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

struct EmulatedTiles {
    int rows[8], row_bytes[8];
    bool configured = false;
    alignas(64) uint8_t data[8][16][64];
};
inline thread_local EmulatedTiles emulated;

// A fault ends the process here as it does there.
inline void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX fault: %s\n", what);
    std::abort();
}

inline int tiles_allowed() { return 0; }

inline void tile_shapes(const TileShapes& shapes) {
    expect(shapes.palette == 1 && shapes.start_row == 0, "palette or start row");
    for (uint8_t byte : shapes.reserved) expect(byte == 0, "reserved bytes");
    for (int tile = 0; tile < 16; tile++) {
        const int rows = shapes.rows[tile], bytes = shapes.row_bytes[tile];
        expect(rows <= (tile < 8 ? 16 : 0) && bytes <= (tile < 8 ? 64 : 0) && !rows == !bytes, "shape of a tile");
        if (tile < 8) emulated.rows[tile] = rows, emulated.row_bytes[tile] = bytes;
    }
    std::memset(emulated.data, 0, sizeof emulated.data);
    emulated.configured = true;
}

inline void tile_release() { emulated.configured = false; }

inline void expect_tile(int tile) {
    expect(emulated.configured && tile < 8 && emulated.rows[tile] > 0, "a tile without a shape");
}

template <int tile>
void tile_zero() {
    expect_tile(tile);
    std::memset(emulated.data[tile], 0, sizeof emulated.data[tile]);
}

template <int tile>
void tile_load(const void* from, int64_t row_stride) {
    tile_zero<tile>();
    for (int row = 0; row < emulated.rows[tile]; row++)
        std::memcpy(emulated.data[tile][row], static_cast<const uint8_t*>(from) + row * row_stride,
                    emulated.row_bytes[tile]);
}

template <int tile>
void tile_store(void* to, int64_t row_stride) {
    expect_tile(tile);
    for (int row = 0; row < emulated.rows[tile]; row++)
        std::memcpy(static_cast<uint8_t*>(to) + row * row_stride, emulated.data[tile][row], emulated.row_bytes[tile]);
}

inline void expect_product(int sums, int x, int w) {
    for (int tile : {sums, x, w}) expect_tile(tile);
    expect(sums != x && sums != w && x != w, "one tile twice");
    const auto& at = emulated;
    expect(at.row_bytes[sums] % 4 == 0 && at.row_bytes[x] % 4 == 0 && at.row_bytes[w] % 4 == 0, "parts of words");
    expect(at.row_bytes[x] / 4 == at.rows[w], "inputs of x and w");
    expect(at.rows[sums] == at.rows[x] && at.row_bytes[sums] == at.row_bytes[w], "rows or outputs of the sums");
}

// Four products to each sum, which wraps.
template <int sums, int x, int w>
void tile_dot_bytes() {
    expect_product(sums, x, w);
    int32_t weights[64][16];  // [input][output]
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int i = 0; i < 4; i++) weights[4 * k + i][n] = static_cast<int8_t>(emulated.data[w][k][4 * n + i]);
    for (int row = 0; row < emulated.rows[sums]; row++) {
        uint32_t total[16];
        std::memcpy(total, emulated.data[sums][row], 64);
        for (int input = 0; input < emulated.row_bytes[x]; input++) {
            const int32_t activation = emulated.data[x][row][input];
            for (int n = 0; n < 16; n++) total[n] += static_cast<uint32_t>(activation * weights[input][n]);
        }
        std::memcpy(emulated.data[sums][row], total, emulated.row_bytes[sums]);
    }
}

inline float flushed(float a) { return std::fabs(a) < FLT_MIN ? std::copysign(0.0f, a) : a; }

inline float wide_bf16(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float a;
    std::memcpy(&a, &word, 4);
    return flushed(a);
}

// The even inputs' products in one chain of fused multiply-adds from zero, the odd ones' in another, their sum, and
// that added; every operand and result that is subnormal counts as zero, whatever MXCSR says.
template <int sums, int x, int w>
void tile_dot_bf16() {
    expect_product(sums, x, w);
    float weights[32][16];  // [input][output]
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int i = 0; i < 2; i++) weights[2 * k + i][n] = wide_bf16(&emulated.data[w][k][4 * n + 2 * i]);
    for (int row = 0; row < emulated.rows[sums]; row++) {
        float even[16] = {}, odd[16] = {}, total[16];
        for (int k = 0; k < emulated.rows[w]; k++) {
            const float first = wide_bf16(&emulated.data[x][row][4 * k]);
            const float second = wide_bf16(&emulated.data[x][row][4 * k + 2]);
            for (int n = 0; n < 16; n++) even[n] = flushed(std::fma(first, weights[2 * k][n], even[n]));
            for (int n = 0; n < 16; n++) odd[n] = flushed(std::fma(second, weights[2 * k + 1][n], odd[n]));
        }
        std::memcpy(total, emulated.data[sums][row], 64);
        for (int n = 0; n < 16; n++) total[n] = flushed(flushed(total[n]) + flushed(even[n] + odd[n]));
        std::memcpy(emulated.data[sums][row], total, emulated.row_bytes[sums]);
    }
}
