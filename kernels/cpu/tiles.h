// AMX: eight tiles of up to 16 rows x 64 bytes, and products of two added to a third (Intel's "Software Developer's
// Manual", volume 2; "Intel 64 and IA-32 Architectures Optimization Reference Manual", chapter on AMX).
//
// Assembly instead of the compilers' intrinsics, because gcc's `_tile_loadd` does not say that it reads memory: stores
// before it may then move behind it. Needs an assembler that knows AMX (binutils 2.34), no flags. With
// AUTOTUNE_EMULATED_TILES defined the same functions are plain C++ (tiles_emulated.h): what the tests run on CPUs
// without tiles. Where all lines are `tile_*`, a tile is named by its number.
#pragma once

#include <cstdint>

#include "rows.h"
#include "simd.h"

// What ldtilecfg reads. Tiles here: 0..3 sums, 4 and 5 rows of activations, 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // `width`: bytes of a row of activations, 4 of which meet a row of weights.
    explicit TileShapes(int width) {
        for (int tile = 0; tile < 8; tile++) row_bytes[tile] = 64, rows[tile] = 16;
        row_bytes[4] = row_bytes[5] = static_cast<uint16_t>(width);
        rows[6] = rows[7] = static_cast<uint8_t>(width / 4);
    }
};
static_assert(sizeof(TileShapes) == 64, "as the CPU reads it");

#if defined(AUTOTUNE_EMULATED_TILES)

#include "tiles_emulated.h"

#elif defined(__x86_64__) && defined(__linux__)

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux keeps tiles from a process that has not asked for them: 8 KB more of state to save for each of its threads.
// 0, or the error's number. For all threads, now and later.
inline int tiles_allowed() {
    constexpr int ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) ? errno : 0;
}

INLINE void tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
INLINE void tile_release() { asm volatile("tilerelease"); }

template <int tile>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
INLINE void tile_load(const void* from, int64_t row_stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_store(void* to, int64_t row_stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_stride), "i"(tile) : "memory");
}
// sums += x * w: unsigned and signed bytes to int32, or pairs of bf16 to fp32.
template <int sums, int x, int w>
INLINE void tile_dot_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(w));
}
template <int sums, int x, int w>
INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(w));
}

#else
#error "needs Linux on an x86 CPU with AMX"
#endif

// A thread's tiles, for as long as it multiplies; given back, so that nobody saves them when threads take turns.
class Tiles {
   public:
    explicit Tiles(int width) {
        const TileShapes shapes(width);
        tile_shapes(shapes);
    }
    ~Tiles() { tile_release(); }
    Tiles(const Tiles&) = delete;
};

struct DotBytes {
    template <int sums, int x, int w>
    static INLINE void add() {
        tile_dot_bytes<sums, x, w>();
    }
};

struct DotBf16 {
    template <int sums, int x, int w>
    static INLINE void add() {
        tile_dot_bf16<sums, x, w>();
    }
};

constexpr int kPanelRows = 32;      // rows of activations that meet weights at a time: two tiles
constexpr int kStripBlocks = 2;     // blocks of 16 outputs that meet them
constexpr int kSumBytes = 16 * 64;  // of a tile of sums

// Sums of a panel and a strip over `count` tiles of inputs: 16 or 32 rows (`high` tiles), 16 or 32 outputs (`wide`).
// x: [count][32 rows][width]; w[b]: [count][width / 4][16 outputs][4 bytes]; sums: [blocks][32 rows][16 outputs].
// Two times two: each tile that is loaded is used twice, so that loads (8 cycles) stay behind products (16).
template <class Dot, int high, int wide>
INLINE void multiply(const uint8_t* x, const uint8_t* const (&w)[kStripBlocks], int64_t count, int width, void* sums) {
    tile_zero<0>();
    if constexpr (wide == 2) tile_zero<1>();
    if constexpr (high == 2) tile_zero<2>();
    if constexpr (high == 2 && wide == 2) tile_zero<3>();
    const int64_t x_step = kPanelRows * width, w_step = kLanes * width;
    for (int64_t i = 0; i < count; i++) {
        tile_load<6>(w[0] + i * w_step, 64);
        tile_load<4>(x + i * x_step, width);
        Dot::template add<0, 4, 6>();
        if constexpr (wide == 2) {
            tile_load<7>(w[1] + i * w_step, 64);
            Dot::template add<1, 4, 7>();
        }
        if constexpr (high == 2) {
            tile_load<5>(x + i * x_step + 16 * width, width);
            Dot::template add<2, 5, 6>();
        }
        if constexpr (high == 2 && wide == 2) Dot::template add<3, 5, 7>();
    }
    uint8_t* to = static_cast<uint8_t*>(sums);
    tile_store<0>(to, 64);
    if constexpr (high == 2) tile_store<2>(to + kSumBytes, 64);
    if constexpr (wide == 2) tile_store<1>(to + 2 * kSumBytes, 64);
    if constexpr (high == 2 && wide == 2) tile_store<3>(to + 3 * kSumBytes, 64);
}

template <class Dot>
INLINE void multiply(bool high, bool wide, const uint8_t* x, const uint8_t* const (&w)[kStripBlocks], int64_t count,
                     int width, void* sums) {
    if (high && wide) return multiply<Dot, 2, 2>(x, w, count, width, sums);
    if (high) return multiply<Dot, 2, 1>(x, w, count, width, sums);
    if (wide) return multiply<Dot, 1, 2>(x, w, count, width, sums);
    return multiply<Dot, 1, 1>(x, w, count, width, sums);
}
