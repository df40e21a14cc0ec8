// The search for integer scales of `compress/rounding.py`: of every group the shrunken range whose rounding errors,
// squared and weighted, add up to the least.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "scalars.h"
#include "vector.h"

namespace {

struct Grid {
    const float* weight;      // (rows, inputs)
    const uint8_t* keep;      // (rows, inputs) or null: where 0, the weight is 0
    const float* importance;  // (inputs,)
    float* scales;            // (rows, groups)
    int8_t* zeros;            // (rows, groups), or null where levels are symmetric
    const float* shrinks;     // (tries,)
    int64_t rows, inputs, group_size, tries;
    float most, least_scale, largest_scale;  // levels are -most .. most, or with a zero point -most - 1 .. most
};

// A group padded to whole vectors with weights of no importance.
struct Group {
    Vector *weight, *importance;
    int64_t vectors;
};

// What bf16 and fp16 hold exactly (`formats.round_scale`).
float written(float scale, const Grid& all) {
    return std::min(std::max(rounded<Half>(scale), all.least_scale), all.largest_scale);
}

float lost(const Group& group, float scale, float low, float high) {
    Vector sum{};
    const Vector by = splat(scale), lowest = splat(low), highest = splat(high);
    for (int64_t at = 0; at < group.vectors; ++at) {
        const Vector weight = group.weight[at];
        const Vector error = nearest(clamped(weight / by, lowest, highest)) * by - weight;
        sum += error * error * group.importance[at];
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    return total;
}

void search(const Grid& all, const Group& group, float* scale, int8_t* zero) {
    const float* weight = reinterpret_cast<const float*>(group.weight);
    float low = 0, high = 0;
    for (int64_t at = 0; at < group.vectors * kLanes; ++at) {
        low = std::min(low, weight[at]);
        high = std::max(high, weight[at]);
    }
    const float span = zero ? high - low : std::max(high, -low), steps = zero ? 2 * all.most + 1 : all.most;
    const float lowest = zero ? -all.most - 1 : -all.most;
    float best = INFINITY;
    *scale = 1;
    for (int64_t number = 0; number < all.tries; ++number) {
        const float shrink = all.shrinks[number], tried = written(span * (shrink / steps), all);
        float offset = 0;
        if (zero) offset = std::min(std::max(std::nearbyint(lowest - low * shrink / tried), lowest), all.most);
        const float error = lost(group, tried, lowest - offset, all.most - offset);
        if (!(error < best)) continue;
        best = error;
        *scale = tried;
        if (zero) *zero = static_cast<int8_t>(offset);
    }
}

void search_row(const Grid& all, int64_t row, const Group& group) {
    float* weight = reinterpret_cast<float*>(group.weight);
    float* importance = reinterpret_cast<float*>(group.importance);
    const int64_t groups = all.inputs / all.group_size;
    for (int64_t number = 0; number < groups; ++number) {
        const int64_t first = number * all.group_size, at = row * all.inputs + first;
        for (int64_t own = 0; own < all.group_size; ++own) {
            weight[own] = !all.keep || all.keep[at + own] ? all.weight[at + own] : 0.0f;
            importance[own] = all.importance[first + own];
        }
        for (int64_t own = all.group_size; own < group.vectors * kLanes; ++own) weight[own] = importance[own] = 0;
        search(all, group, all.scales + row * groups + number, all.zeros ? all.zeros + row * groups + number : nullptr);
    }
}

}  // namespace

extern "C" {

// Fills scales and zero points. Returns 0, or 1 when memory ran out.
int find_grid(const Grid* all, int threads) {
    const int64_t vectors = (all->group_size + kLanes - 1) / kLanes;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const std::align_val_t line{64};
        auto* memory = static_cast<Vector*>(operator new(2 * vectors * sizeof(Vector), line, std::nothrow));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            const Group group{memory, memory + vectors, vectors};
#pragma omp for schedule(static)
            for (int64_t row = 0; row < all->rows; ++row) search_row(*all, row, group);
        }
        operator delete(memory, line);
    }
    return failed;
}

}  // extern "C"
