// Sweeps on buffers without slack, for sanitizers, against a plain sweep in double precision; prints how many levels
// differ.
#include "sweep.cpp"

#include <cmath>
#include <cstdio>
#include <vector>

struct Numbers {  // the same everywhere
    uint32_t state = 1;
    float operator()() { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f; }
};

template <typename T>
std::vector<T> made(int64_t count, Numbers& numbers, float scale, float offset) {
    std::vector<T> values(count);
    for (auto& value : values) value = static_cast<T>(numbers() * scale + offset);
    values.shrink_to_fit();
    return values;
}

std::vector<double> plain(const Rows& all, const std::vector<float>& upper, const std::vector<int32_t>& order,
                          int64_t row) {
    const int64_t inputs = order.size();
    std::vector<double> weight(all.weight + row * inputs, all.weight + (row + 1) * inputs), levels(inputs);
    std::vector<bool> chosen(inputs, true);
    for (int64_t swept = 0; swept < inputs; ++swept) {
        const auto score = [&](int64_t at) { return std::fabs(weight[order[at]] / upper[at * inputs + at]); };
        for (int64_t at = swept; all.pattern && swept % all.pattern == 0 && at < swept + all.pattern; ++at) {
            int64_t larger = 0;
            for (int64_t other = swept; other < swept + all.pattern; ++other) larger += score(other) > score(at);
            chosen[at] = larger < all.pattern / 2;
        }
        const int64_t input = order[swept], group = row * all.groups + input / all.group_size;
        const double scale = all.scales[group], zero = all.zeros ? all.zeros[group] : 0;
        double level = std::nearbyint(weight[input] / scale);
        level = std::fmin(std::fmax(level, all.lowest - zero), all.highest - zero);
        if ((all.keep && !all.keep[row * inputs + input]) || !chosen[swept]) level = 0;
        levels[input] = level;
        const double error = (weight[input] - level * scale) / upper[swept * inputs + swept];
        for (int64_t later = swept + 1; later < inputs; ++later)
            weight[order[later]] -= upper[swept * inputs + later] * error;
    }
    return levels;
}

int check(int64_t rows, int64_t inputs, int64_t group_size, bool zeros, bool pruned, int threads) {
    Numbers numbers;
    const int64_t groups = inputs / group_size;
    const auto weight = made<float>(rows * inputs, numbers, 1, 0);
    const auto scales = made<float>(rows * groups, numbers, 0.1f, 0.15f);
    const auto zero = made<int8_t>(rows * groups, numbers, 8, 0);
    const auto keep = made<uint8_t>(rows * inputs, numbers, 2, 1);
    auto upper = made<float>(inputs * inputs, numbers, 0.2f, 0);
    std::vector<int32_t> order(inputs);
    for (int64_t i = 0; i < inputs; ++i) {
        order[i] = static_cast<int32_t>(inputs - 1 - i);
        upper[i * inputs + i] = 1;
    }
    std::vector<float> levels(3 * rows * inputs, NAN);
    const Rows one{weight.data(), scales.data(), zeros ? zero.data() : nullptr, pruned ? keep.data() : nullptr,
                   levels.data(), rows, groups, group_size, 0, -8, 7};
    Rows other = one;
    other.levels += rows * inputs, other.lowest = -127, other.highest = 127;
    Rows sparse = other;
    sparse.levels += rows * inputs, sparse.keep = nullptr, sparse.pattern = zeros ? 4 : 8;
    const std::vector<Rows> formats{one, other, sparse};
    if (sweep(formats.data(), 3, upper.data(), order.data(), inputs, threads)) return 1;
    int wrong = 0;
    for (const Rows& format : formats) {
        for (int64_t row = 0; row < rows; ++row) {
            const auto expected = plain(format, upper, order, row);
            for (int64_t input = 0; input < inputs; ++input)
                wrong += format.levels[row * inputs + input] != expected[input];
        }
    }
    return wrong;
}

int main() {
    int wrong = 0;
    for (const int64_t rows : {1, 48, 50})
        for (const int64_t inputs : {8, 32, 40, 72})
            for (const bool other : {false, true})
                wrong += check(rows, inputs, other ? inputs : 8, other, !other, 1 + other);
    std::printf("%d\n", wrong);
    return 0;
}
