// Vector instructions through integer weights of any format (formats.h), any number of rows.
//
// Every thread streams its own blocks of 16 outputs from memory to registers, where they meet up to eight activation
// rows at a time. Few rows wait for weights: several streams keep more loads in flight. With eight rows the dot products
// are what the core is busy with; two blocks side by side halve the loads of activations, which is worth 3 to 10%. Sums
// are exact: int32 over a scale group, and over all inputs where there is one scale a channel.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "formats.h"
#include "integer.h"

namespace {


thread_local Buffer shared_rows, own_rows;

struct Rows {
    const uint8_t* codes;  // [rows * planes][padded], each group's rows interleaved (rows.h)
    const float* scales;   // [rows]
    int64_t count;
};

template <class Type, int planes>
void quantize(const Linear& a, const void* x, int64_t first, int64_t last, int64_t count, uint8_t* codes,
              float* scales) {
    for (int64_t row = first; row < last; row++) {
        const Group group = group_of(row, count, kStreamRows / planes);
        uint8_t* place = codes + (group.first * a.padded + (row - group.first) * kStep) * planes;
        const uint8_t* source = static_cast<const uint8_t*>(x) + row * a.inputs * Type::kBytes;
        scales[row] = quantize_row<Type, planes>(source, a.inputs, group.size * planes * kStep, place);
    }
}

template <int rows>
INLINE Ints gathered(Ints (&chains)[kChains<rows>]) {
    if constexpr (kChains<rows> == 4) return (chains[0] + chains[1]) + (chains[2] + chains[3]);
    if constexpr (kChains<rows> == 2) return chains[0] + chains[1];
    return chains[0];
}

// `blocks` blocks of 16 outputs, `apart` from each other, for a few rows: the weights pass once, as so many streams.
template <class Format, class Type, int planes, bool grouped, int tokens, int blocks>
void stream_blocks(const Linear& a, int block, int apart, const Rows& x, int64_t token, void* y) {
    constexpr int rows = tokens * planes;
    // Two planes of a group of up to 128 inputs fit an int32 together (255 * 128 * 128 * 257 < 2^31): half the conversions.
    constexpr bool paired = grouped && planes == 2;
    constexpr int kept = paired ? tokens : rows;
    // Several streams are fetched to the second cache, far ahead: the first cache waits for too few lines at once. Of wide
    // steps every other line is enough, its neighbour comes along, and a resident weight is not slowed down by asking.
    constexpr int64_t ahead = blocks == 1 ? 4096 : 3072;
    constexpr int level = blocks == 1 ? 3 : 2;
    constexpr int line = blocks == kStreamBlocks && Format::kBytes >= 512 ? 128 : 64;
    constexpr int scales_ahead = 8 * kLanes;
    const int64_t block_bytes = static_cast<int64_t>(a.steps) * Format::kBytes, stream_bytes = apart * block_bytes;
    const uint8_t* w = a.weights + block * block_bytes;
    const uint8_t* codes = x.codes + token * planes * a.padded;
    const int64_t groups = a.steps / a.steps_per_group;
    Floats totals[blocks][kept];
    Ints whole[blocks][rows];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < kept; r++) totals[b][r] = zero_floats();
    for (int64_t g = 0; g < groups; g++) {
        Sums<rows> sums[blocks];
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < kChains<rows>; c++) sums[b][r][c] = zero_ints();
        for (int s = 0; s < a.steps_per_group; s++) {
#pragma GCC unroll 4
            for (int b = 0; b < blocks; b++)
                for (int i = 0; i < Format::kBytes; i += line)
                    __builtin_prefetch(w + b * stream_bytes + ahead + i, 0, level);
            step<Format, rows, blocks>(w, stream_bytes, codes, sums);
            w += Format::kBytes;
            codes += rows * kStep;
        }
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) {
            if constexpr (grouped) {
                const uint16_t* scales = a.scales + ((block + b * apart) * groups + g) * kLanes;
                __builtin_prefetch(scales + scales_ahead);
                Floats scale = load_bf16(scales);
#pragma GCC unroll 8
                for (int r = 0; r < kept; r++) {
                    Ints sum;
                    if constexpr (paired)
                        sum = shift_left_int<8>(gathered<rows>(sums[b][2 * r])) + gathered<rows>(sums[b][2 * r + 1]);
                    else
                        sum = gathered<rows>(sums[b][r]);
                    totals[b][r] = fma(to_floats(sum), scale, totals[b][r]);
                }
            } else {
                for (int r = 0; r < rows; r++) whole[b][r] = gathered<rows>(sums[b][r]);
            }
        }
    }
    for (int b = 0; b < blocks; b++) {
        const Outputs<Type, grouped> outputs(a, block + b * apart, y);
        for (int t = 0; t < tokens; t++) {
            const int64_t row = token + t;
            const float scale = x.scales[row];
            if constexpr (paired)
                outputs.put_pair(row, scale, totals[b][t]);
            else
                outputs.template put<planes>(row, scale, [&](int plane) {
                    if constexpr (grouped)
                        return totals[b][t * planes + plane];
                    else
                        return whole[b][t * planes + plane];
                });
        }
    }
}

// As many tokens at a time as the registers hold, then half as many, down to one.
template <class Format, class Type, int planes, bool grouped, int blocks, int tokens = kStreamRows / planes>
INLINE void stream_tokens(const Linear& a, int block, int apart, const Rows& x, int64_t token, int64_t end, void* y) {
    for (; token + tokens <= end; token += tokens)
        stream_blocks<Format, Type, planes, grouped, tokens, blocks>(a, block, apart, x, token, y);
    if constexpr (tokens > 1)
        if (token < end)
            stream_tokens<Format, Type, planes, grouped, blocks, tokens / 2>(a, block, apart, x, token, end, y);
}

// Rows that meet the weights once: several streams a thread keep more loads in flight, each long and without a break.
// Returns the first block that is left.
template <class Format, class Type, int planes, bool grouped, int streams>
int stream_once(const Linear& a, int first, int last, const Rows& x, void* y) {
    const int each = (last - first) / streams;
    constexpr int most = streams == kStreamBlocks ? 1 : kStreamRows / planes;
    for (int block = first; block < first + each; block++)
        stream_tokens<Format, Type, planes, grouped, streams, most>(a, block, each, x, 0, x.count, y);
    return first + each * streams;
}

template <class Format, class Type, int planes, bool grouped>
void stream(const Linear& a, int first, int last, const Rows& x, void* y) {
    constexpr int most = kStreamRows / planes, tile = Format::kDense ? kTileBlocks : 1;
    if (x.count == 1) first = stream_once<Format, Type, planes, grouped, kStreamBlocks>(a, first, last, x, y);
    if constexpr (kStreamBlocks > 1)
        if (x.count <= most) first = stream_once<Format, Type, planes, grouped, 2>(a, first, last, x, y);
    const int64_t pass = rows_of_pass(a.padded * planes, most);
    for (int64_t start = 0; start < x.count; start += pass) {
        const int64_t end = std::min(x.count, start + pass);
        for (int block = first; block < last; block += tile) {
            const int apart = block + tile <= last;  // the last of an odd number stands for its neighbour too
            stream_tokens<Format, Type, planes, grouped, tile>(a, block, apart, x, start, end, y);
        }
    }
}

// False when memory ran out.
template <class Format, class Type, int planes, bool grouped>
bool linear(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (rows == 0) return true;
    const bool each = rows == 1;  // quantizing one row twice costs less than waiting for it
    const int64_t row_bytes = planes * a.padded;
    uint8_t* memory = each ? nullptr : shared_rows.of(rows * (row_bytes + sizeof(float)));
    if (!each && !memory) return false;
    std::atomic<bool> enough{true};
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        uint8_t* codes = each ? own_rows.of(row_bytes + sizeof(float)) : memory;
        float* scales = reinterpret_cast<float*>(codes + rows * row_bytes);
        int64_t first, last;
        if (each) {
            if (codes) quantize<Type, planes>(a, x, 0, 1, 1, codes, scales);
        } else {
            share(rows, thread, team, first, last);
            quantize<Type, planes>(a, x, first, last, rows, codes, scales);
#pragma omp barrier
        }
        const Rows quantized{codes, scales, rows};
        share(a.blocks, thread, team, first, last);
        if (codes)
            stream<Format, Type, planes, grouped>(a, first, last, quantized, y);
        else
            enough = false;
    }
    return enough;
}

template <class Format, class Type, bool grouped>
bool by_planes(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (a.planes == 1) return linear<Format, Type, 1, grouped>(a, x, rows, y, threads);
    if constexpr (std::is_same_v<Type, Bf16>)
        return linear<Format, Type, 2, grouped>(a, x, rows, y, threads);
    else
        return linear<Format, Type, 3, grouped>(a, x, rows, y, threads);
}

template <class Format, bool grouped>
bool by_type(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (a.bf16) return by_planes<Format, Bf16, grouped>(a, x, rows, y, threads);
    return by_planes<Format, Fp32, grouped>(a, x, rows, y, threads);
}

}  // namespace
