// GPTQ's sweep (arXiv 2210.17323) of many rows over one factor: an input after the other is rounded, and its error is
// taken out of the inputs still to come. Rows do not see each other, so a strip of them is swept from the first input to
// the last while its errors stay in cache. Blocks of inputs look left: what all earlier errors take from them comes in
// one product, and only within a block are errors spread one by one. Every number is made by the same operations
// whatever else is swept, so codes do not depend on what a row is stacked with.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "vector.h"

namespace {

constexpr int kBlock = 32;  // inputs
#if defined(__AVX512F__)
constexpr int kWide = 3, kTall = 8;  // vectors of rows and inputs of a product's tile: 24 sums in registers
#else
constexpr int kWide = 1, kTall = 4;
#endif
constexpr int kRows = kWide * kLanes;  // of a strip

struct Line {  // one input of a strip's rows
    Vector v[kWide];
    float& operator[](int row) { return reinterpret_cast<float*>(v)[row]; }
};

// One format's rows. Levels are whole numbers from lowest to highest, less the zero point where there is one.
struct Rows {
    const float* weight;  // (rows, inputs)
    const float* scales;  // (rows, groups)
    const int8_t* zeros;  // (rows, groups) or null
    const uint8_t* keep;  // (rows, inputs) or null: where 0, the level is 0
    float* levels;        // (rows, inputs)
    int64_t rows, groups, group_size;
    int64_t pattern;  // 0, or so many inputs in a row of which the sweep keeps half: their weights are 0 or levels
    float lowest, highest;

    int64_t strips() const { return (rows + kRows - 1) / kRows; }
};

// U of the inverse H^-1 = U^T U, inputs as they are swept.
struct Factor {
    const int32_t* order;
    const float* upper;   // (inputs, inputs)
    const float* panels;  // of every block U[inputs before it][its inputs], as products read it: kTall inputs together
    int64_t inputs;
};

// What a strip needs while it is swept: of every scale group its scale and limits, of every input its error.
struct Strip {
    const Rows& all;
    int64_t first;
    int count;  // rows that there are; the others are zeros
    Line *scale, *low, *high, *errors;
};

struct Block {
    int64_t first;  // input, as swept
    int count;
    Line weight[kBlock], keep[kBlock], levels[kBlock];
};

int64_t panel_at(int64_t block) { return kBlock * kBlock * (block * (block - 1) / 2); }

void read_groups(Strip& strip) {
    const Rows& all = strip.all;
    for (int64_t group = 0; group < all.groups; ++group) {
        for (int row = 0; row < kRows; ++row) {
            const int64_t at = (strip.first + row) * all.groups + group;
            const bool there = row < strip.count;
            const float zero = there && all.zeros ? all.zeros[at] : 0;
            strip.scale[group][row] = there ? all.scales[at] : 1.0f;
            strip.low[group][row] = all.lowest - zero;
            strip.high[group][row] = all.highest - zero;
        }
    }
}

void read_block(const Strip& strip, const Factor& factor, Block& block) {
    const int32_t* order = factor.order + block.first;
    if (strip.count < kRows) std::memset(static_cast<void*>(block.weight), 0, sizeof block.weight);
    for (int row = 0; row < strip.count; ++row) {
        const int64_t line = (strip.first + row) * factor.inputs;
        const float* weight = strip.all.weight + line;
        for (int place = 0; place < block.count; ++place) block.weight[place][row] = weight[order[place]];
        if (!strip.all.keep) continue;
        const uint8_t* keep = strip.all.keep + line;
        for (int place = 0; place < block.count; ++place) block.keep[place][row] = keep[order[place]];
    }
}

void write_block(const Strip& strip, const Factor& factor, Block& block) {
    const int32_t* order = factor.order + block.first;
    for (int row = 0; row < strip.count; ++row) {
        float* line = strip.all.levels + (strip.first + row) * factor.inputs;
        for (int place = 0; place < block.count; ++place) line[order[place]] = block.levels[place][row];
    }
}

// Takes from kTall inputs what the errors of the inputs before their block take.
void take_earlier(const float* panel, const Line* errors, int64_t before, Line* weight) {
    Vector sums[kTall][kWide];
    for (int tall = 0; tall < kTall; ++tall)
        for (int wide = 0; wide < kWide; ++wide) sums[tall][wide] = weight[tall].v[wide];
    for (int64_t input = 0; input < before; ++input, panel += kTall) {
        for (int tall = 0; tall < kTall; ++tall)
            for (int wide = 0; wide < kWide; ++wide) sums[tall][wide] -= panel[tall] * errors[input].v[wide];
    }
    for (int tall = 0; tall < kTall; ++tall)
        for (int wide = 0; wide < kWide; ++wide) weight[tall].v[wide] = sums[tall][wide];
}

// SparseGPT's choice (arXiv 2301.00774) among the inputs of a pattern, when the sweep has come to them: those stay whose
// loss w^2 / U_ii^2 would be largest, of equals the earlier.
void choose(const float* upper, int64_t stride, int count, const Line* weight, Line* keep) {
    for (int wide = 0; wide < kWide; ++wide) {
        Vector scores[kBlock];
        for (int own = 0; own < count; ++own) {
            const Vector part = weight[own].v[wide] / splat(upper[own * (stride + 1)]);
            scores[own] = part * part;
        }
        for (int own = 0; own < count; ++own) {
            Vector before{};
            for (int other = 0; other < count; ++other) {
                const auto larger = other < own ? scores[other] >= scores[own] : scores[other] > scores[own];
                before += larger ? splat(1.0f) : Vector{};
            }
            keep[own].v[wide] = before < splat(count / 2) ? splat(1.0f) : Vector{};
        }
    }
}

// Rounds the inputs of a block one after the other.
void round_block(const Strip& strip, const Factor& factor, Block& block) {
    const int pattern = static_cast<int>(strip.all.pattern);
    const bool pruned = strip.all.keep || pattern;
    for (int place = 0; place < block.count; ++place) {
        const int64_t swept = block.first + place, group = factor.order[swept] / strip.all.group_size;
        const float* upper = factor.upper + swept * (factor.inputs + 1);
        if (pattern && place % pattern == 0)
            choose(upper, factor.inputs, pattern, block.weight + place, block.keep + place);
        for (int wide = 0; wide < kWide; ++wide) {
            const Vector weight = block.weight[place].v[wide], scale = strip.scale[group].v[wide];
            // Clamped first: `nearest` wants small numbers, and both orders end at the same level.
            Vector level = nearest(clamped(weight / scale, strip.low[group].v[wide], strip.high[group].v[wide]));
            if (pruned) level *= block.keep[place].v[wide];
            const Vector error = (weight - level * scale) / splat(upper[0]);
            block.levels[place].v[wide] = level;
            strip.errors[swept].v[wide] = error;
            for (int later = 1; later < block.count - place; ++later)
                block.weight[place + later].v[wide] -= upper[later] * error;
        }
    }
}

void sweep_strip(Strip& strip, const Factor& factor, Block& block) {
    read_groups(strip);
    for (block.first = 0; block.first < factor.inputs; block.first += kBlock) {
        block.count = static_cast<int>(std::min<int64_t>(kBlock, factor.inputs - block.first));
        read_block(strip, factor, block);
        const float* panel = factor.panels + panel_at(block.first / kBlock);
        for (int tall = 0; tall < kBlock; tall += kTall)
            take_earlier(panel + tall * block.first, strip.errors, block.first, block.weight + tall);
        round_block(strip, factor, block);
        write_block(strip, factor, block);
    }
}

// Zeros beyond the last input.
void pack(const float* upper, int64_t inputs, float* panels) {
    for (int64_t first = 0; first < inputs; first += kTall) {
        const int64_t before = first / kBlock * kBlock, count = std::min<int64_t>(kTall, inputs - first);
        float* to = panels + panel_at(first / kBlock) + (first - before) * before;
        for (int64_t input = 0; input < before; ++input, to += kTall)
            for (int64_t own = 0; own < kTall; ++own)
                to[own] = own < count ? upper[input * inputs + first + own] : 0.0f;
    }
}

struct Free {
    void operator()(void* memory) const { operator delete(memory, std::align_val_t{64}); }
};
template <typename T>
using Aligned = std::unique_ptr<T, Free>;
template <typename T>
Aligned<T> aligned(int64_t count) {
    return Aligned<T>(static_cast<T*>(operator new(sizeof(T) * count, std::align_val_t{64}, std::nothrow)));
}

}  // namespace

extern "C" {

// Fills the levels of `count` formats. Returns 0, or 1 when memory ran out.
int sweep(const Rows* formats, int64_t count, const float* upper, const int32_t* order, int64_t inputs, int threads) {
    const int64_t blocks = (inputs + kBlock - 1) / kBlock;
    int64_t strips = 0, groups = 0;
    for (int64_t format = 0; format < count; ++format) {
        strips += formats[format].strips();
        groups = std::max(groups, formats[format].groups);
    }
    const Aligned<float> panels = aligned<float>(panel_at(blocks) + 1);
    if (!panels) return 1;
    pack(upper, inputs, panels.get());
    const Factor factor{order, upper, panels.get(), inputs};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const Aligned<Block> block = aligned<Block>(1);
        const Aligned<Line> lines = aligned<Line>(3 * groups + inputs);
        if (!block || !lines) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            Line* scale = lines.get();
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < strips; ++item) {
                const Rows* all = formats;
                int64_t first = item;
                for (; first >= all->strips(); ++all) first -= all->strips();
                first *= kRows;
                const int there = static_cast<int>(std::min<int64_t>(kRows, all->rows - first));
                Strip strip{*all, first, there, scale, scale + groups, scale + 2 * groups, scale + 3 * groups};
                sweep_strip(strip, factor, *block);
            }
        }
    }
    return failed;
}

}  // extern "C"
