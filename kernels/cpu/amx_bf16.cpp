// y = x W^T + b for many rows of bf16 x and bf16 weights, dense or 2:4, on AMX tiles: the weights as bf16.cpp reads
// them. Dense steps are tiles as they lie; 2:4 is expanded in the second cache, once for all rows of a pass. Panels of
// 32 rows and strips of 32 outputs as in amx_integer.cpp; sums are fp32, in the order the CPU's tiles add.

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "activations.h"
#include "bf16.h"
#include "expand.h"
#include "tiles.h"

namespace {

constexpr int kWidth = 64;                       // bytes of a step of activations: 32 inputs, a tile's row
constexpr int64_t kStripTile = kLanes * kWidth;  // bytes of a step of weights, expanded
constexpr int64_t kSparseStep = 576;
constexpr int64_t kPassBytes = 1 << 20;  // of activations that stay in the second cache (2 MB) while outputs pass

thread_local Buffer shared_rows, own_strip;

int64_t panel_bytes(const Linear& a) { return static_cast<int64_t>(a.steps) * kPanelRows * kWidth; }

// Rows to their places, [panels][steps][32 rows][32 inputs], zeros behind the last input. Rows behind the last one stay
// as they are: their sums are not used.
void place_rows(const Linear& a, const uint16_t* x, int64_t first, int64_t last, uint8_t* panels) {
    for (int64_t row = first; row < last; row++) {
        uint8_t* place = panels + row / kPanelRows * panel_bytes(a) + row % kPanelRows * kWidth;
        const uint16_t* source = x + row * a.inputs;
        for (int64_t i = 0; i < a.inputs; i += kStep, place += kPanelRows * kWidth) {
            const int64_t bytes = 2 * std::min<int64_t>(kStep, a.inputs - i);
            std::memcpy(place, source + i, bytes);
            if (bytes < kWidth) std::memset(place + bytes, 0, kWidth - bytes);
        }
    }
}

// Where one block's tiles are, in the end: among the packed weights, or in `place`.
const uint8_t* strip(const Linear& a, int64_t block, uint8_t* place) {
    if (!a.sparse) return a.weights + block * a.steps * kStripTile;
    expand_bf16_block(a.weights + block * a.steps * kSparseStep, a.steps, place);
    return place;
}

void panel(const Linear& a, int64_t block, int blocks, const uint8_t* const (&w)[kStripBlocks], const uint8_t* x,
           int64_t row, int rows, uint16_t* y) {
    alignas(64) float sums[kStripBlocks][kPanelRows][kLanes];
    multiply<DotBf16>(rows > 16, blocks > 1, x, w, a.steps, kWidth, sums);
    for (int b = 0; b < blocks; b++) {
        const int64_t output = (block + b) * kLanes;
        const Floats bias = a.bias ? load_floats(a.bias + output) : zero_floats(), one = splat(1.0f);
        for (int r = 0; r < rows; r++) {
            uint16_t* out = y + (row + r) * a.outputs;
            const Floats value = fma(load_floats(sums[b][r]), one, bias);
            if (output + kLanes <= a.outputs)
                Bf16::store(out, output, value);
            else
                store_tail<Bf16>(out, output, a.outputs, value);
        }
    }
}

void blocks_of_thread(const Linear& a, int64_t first, int64_t last, const uint8_t* x, int64_t rows, uint8_t* place,
                      uint16_t* y) {
    const int64_t pass = std::max<int64_t>(1, kPassBytes / panel_bytes(a)) * kPanelRows;
    const Tiles tiles(kWidth);
    for (int64_t start = 0; start < rows; start += pass)
        for (int64_t block = first; block < last; block += kStripBlocks) {
            const int blocks = static_cast<int>(std::min<int64_t>(kStripBlocks, last - block));
            const uint8_t* w[kStripBlocks];
            for (int b = 0; b < kStripBlocks; b++)  // an only one stands for both, and is not multiplied twice
                w[b] = b < blocks ? strip(a, block + b, place + b * a.steps * kStripTile) : w[0];
            for (int64_t row = start; row < std::min(rows, start + pass); row += kPanelRows) {
                const int count = static_cast<int>(std::min<int64_t>(kPanelRows, rows - row));
                panel(a, block, blocks, w, x + row / kPanelRows * panel_bytes(a), row, count, y);
            }
        }
}

// False when memory ran out.
bool linear(const Linear& a, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    if (rows == 0) return true;
    uint8_t* panels = shared_rows.of((rows + kPanelRows - 1) / kPanelRows * panel_bytes(a));
    if (!panels) return false;
    std::atomic<bool> enough{true};
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t first, last;
        share(rows, thread, team, first, last);
        place_rows(a, x, first, last, panels);
        uint8_t* place = own_strip.of(a.sparse ? kStripBlocks * a.steps * kStripTile : 1);
#pragma omp barrier
        share(a.blocks, thread, team, first, last);
        if (place)
            blocks_of_thread(a, first, last, panels, rows, place, y);
        else
            enough = false;
    }
    return enough;
}

}  // namespace

extern "C" {

// 0, or why the system keeps tiles from this process (an errno). Before anything else.
int autotune_amx_allowed() { return tiles_allowed(); }

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), bf16, row-major.
int autotune_amx_bf16(const void* packed, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    return !linear(*static_cast<const Linear*>(packed), x, rows, y, threads);
}
}
