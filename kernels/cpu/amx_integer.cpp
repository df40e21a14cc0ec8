// y = x W^T + b for many rows of x, on AMX tiles: the weights as integer.cpp reads them, the same sums to the last bit.
//
// Activations are quantized once, into panels of 32 rows (a token's planes are neighbouring rows), each a row of tiles.
// A thread takes its outputs 32 at a time. Where tiles cannot read these weights as they lie (4-bit, 2:4, an odd number
// of steps), it lays them out in its second cache; then every panel passes: 2 x 2 tiles of sums over all inputs, or
// over one scale group after the other, whose sums go to fp32 in between. Sums leave tiles through memory.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "expand.h"
#include "formats.h"
#include "integer.h"
#include "tiles.h"

namespace {

constexpr int64_t kPassBytes = 1 << 20;  // of activations that stay in the second cache (2 MB) while outputs pass

thread_local Buffer shared_rows, own_strip;

// How a layer's inputs are cut into tiles.
struct Cut {
    int width;      // inputs in a tile: 64, or 32 where a scale group has an odd number of steps
    int64_t tiles;  // in all
    int64_t tiles_per_group;

    Cut(const Linear& a, bool grouped) {
        width = grouped && a.steps_per_group % 2 ? 32 : 64;
        tiles = (static_cast<int64_t>(a.steps) * kStep + width - 1) / width;
        tiles_per_group = grouped ? a.steps_per_group * kStep / width : tiles;
    }
    int64_t panel_bytes() const { return tiles * kPanelRows * width; }
    int64_t strip_bytes() const { return tiles * kLanes * width; }  // of one block
};

struct Panels {
    const uint8_t* codes;  // [panels][tiles][32 rows][width]
    const float* scales;   // [rows]
    int64_t rows;
};

// Where one block's tiles are, in the end: among the packed weights, or in `place`.
const uint8_t* strip(const Linear& a, int64_t block, uint8_t* place) {
    const int64_t steps = a.steps;
    switch (a.format) {
        case 0: {
            const uint8_t* w = a.weights + block * steps * Int8::kBytes;
            if (steps % 2 == 0) return w;
            expand_block<Int8>(w, steps, place);
            break;
        }
        case 1: expand_block<Int4>(a.weights + block * steps * Int4::kBytes, steps, place); break;
        case 2: expand_block<Sparse8>(a.weights + block * steps * Sparse8::kBytes, steps, place); break;
        default: expand_block<Sparse4>(a.weights + block * steps * Sparse4::kBytes, steps, place);
    }
    return place;
}

// Rows behind the last one, and what is left of a panel that planes do not fill, stay as they are: their sums are not
// used.
template <class Type, int planes, int width>
void quantize(const Linear& a, const Cut& cut, const void* x, int64_t first, int64_t last, uint8_t* codes,
              float* scales) {
    constexpr int64_t tokens = kPanelRows / planes;
    for (int64_t row = first; row < last; row++) {
        uint8_t* place = codes + row / tokens * cut.panel_bytes() + row % tokens * planes * width;
        const uint8_t* source = static_cast<const uint8_t*>(x) + row * a.inputs * Type::kBytes;
        scales[row] = quantize_row<Type, planes, width>(source, a.inputs, kPanelRows * width, place);
    }
}

// A panel's sums, int32, or fp32 over all groups.
template <bool grouped>
struct PanelSums {
    alignas(64) int32_t whole[kStripBlocks][kPanelRows][kLanes];
    alignas(64) float totals[kStripBlocks][kPanelRows][kLanes];

    auto of(int b, int row) const {
        if constexpr (grouped)
            return load_floats(totals[b][row]);
        else
            return load_ints(whole[b][row]);
    }
};

// One group's sums, scaled, to the totals.
void add_group(const Linear& a, int64_t block, int blocks, int rows, int64_t groups, int64_t g, PanelSums<true>& sums) {
    for (int b = 0; b < blocks; b++) {
        const Floats scale = load_bf16(a.scales + ((block + b) * groups + g) * kLanes);
        for (int row = 0; row < rows; row++) {
            float* total = sums.totals[b][row];
            const Floats before = g ? load_floats(total) : zero_floats();
            store_floats(total, fma(to_floats(load_ints(sums.whole[b][row])), scale, before));
        }
    }
}

template <class Type, int planes, bool grouped>
void panel(const Linear& a, const Cut& cut, int64_t block, int blocks, const uint8_t* const (&w)[kStripBlocks],
           const Panels& x, int64_t number, void* y) {
    constexpr int64_t tokens = kPanelRows / planes;
    const int64_t token = number * tokens, count = std::min(tokens, x.rows - token);
    const int rows = static_cast<int>(count) * planes;
    const uint8_t* codes = x.codes + number * cut.panel_bytes();
    PanelSums<grouped> sums;
    if constexpr (grouped) {
        const int64_t groups = cut.tiles / cut.tiles_per_group, bytes = cut.tiles_per_group * kLanes * cut.width;
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t* here[kStripBlocks] = {w[0] + g * bytes, w[1] + g * bytes};
            multiply<DotBytes>(rows > 16, blocks > 1, codes, here, cut.tiles_per_group, cut.width, sums.whole);
            add_group(a, block, blocks, rows, groups, g, sums);
            codes += cut.tiles_per_group * kPanelRows * cut.width;
        }
    } else {
        multiply<DotBytes>(rows > 16, blocks > 1, codes, w, cut.tiles, cut.width, sums.whole);
    }
    for (int b = 0; b < blocks; b++) {
        const Outputs<Type, grouped> outputs(a, static_cast<int>(block) + b, y);
        for (int t = 0; t < count; t++)
            outputs.template put<planes>(token + t, x.scales[token + t],
                                         [&](int plane) { return sums.of(b, t * planes + plane); });
    }
}

template <class Type, int planes, bool grouped>
void blocks_of_thread(const Linear& a, const Cut& cut, int64_t first, int64_t last, const Panels& x, uint8_t* place,
                      void* y) {
    constexpr int64_t tokens = kPanelRows / planes;
    const int64_t panels = (x.rows + tokens - 1) / tokens;
    const int64_t pass = std::max<int64_t>(1, kPassBytes / cut.panel_bytes());
    const Tiles tiles(cut.width);
    for (int64_t start = 0; start < panels; start += pass)
        for (int64_t block = first; block < last; block += kStripBlocks) {
            const int blocks = static_cast<int>(std::min<int64_t>(kStripBlocks, last - block));
            const uint8_t* w[kStripBlocks];
            for (int b = 0; b < kStripBlocks; b++)  // an only one stands for both, and is not multiplied twice
                w[b] = b < blocks ? strip(a, block + b, place + b * cut.strip_bytes()) : w[0];
            for (int64_t number = start; number < std::min(panels, start + pass); number++)
                panel<Type, planes, grouped>(a, cut, block, blocks, w, x, number, y);
        }
}

// False when memory ran out.
template <class Type, int planes, bool grouped>
bool linear(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (rows == 0) return true;
    const Cut cut(a, grouped);
    const int64_t tokens = kPanelRows / planes, panels = (rows + tokens - 1) / tokens;
    uint8_t* codes = shared_rows.of(panels * cut.panel_bytes() + rows * sizeof(float));
    if (!codes) return false;
    float* scales = reinterpret_cast<float*>(codes + panels * cut.panel_bytes());
    std::atomic<bool> enough{true};
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t first, last;
        share(rows, thread, team, first, last);
        if (cut.width == 64)
            quantize<Type, planes, 64>(a, cut, x, first, last, codes, scales);
        else
            quantize<Type, planes, 32>(a, cut, x, first, last, codes, scales);
        uint8_t* place = own_strip.of(kStripBlocks * cut.strip_bytes());
#pragma omp barrier
        share(a.blocks, thread, team, first, last);
        if (place)
            blocks_of_thread<Type, planes, grouped>(a, cut, first, last, {codes, scales, rows}, place, y);
        else
            enough = false;
    }
    return enough;
}

template <class Type>
bool by_planes(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    constexpr int more = std::is_same_v<Type, Bf16> ? 2 : 3;
    const bool grouped = a.format % 2;  // 4-bit
    if (a.planes == 1 && grouped) return linear<Type, 1, true>(a, x, rows, y, threads);
    if (a.planes == 1) return linear<Type, 1, false>(a, x, rows, y, threads);
    if (grouped) return linear<Type, more, true>(a, x, rows, y, threads);
    return linear<Type, more, false>(a, x, rows, y, threads);
}

}  // namespace

extern "C" {

// 0, or why the system keeps tiles from this process (an errno). Before anything else.
int autotune_amx_allowed() { return tiles_allowed(); }

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), row-major, bf16 or fp32.
int autotune_amx_linear(const void* packed, const void* x, int64_t rows, void* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    if (a.bf16) return !by_planes<Bf16>(a, x, rows, y, threads);
    return !by_planes<Fp32>(a, x, rows, y, threads);
}
}
