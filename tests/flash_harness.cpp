// Attention on buffers without slack, for sanitizers, against sums in double precision; prints how many outputs are off.
#include "flash.cpp"

#include <cmath>
#include <cstdio>
#include <vector>

std::vector<Half> made(int64_t count, uint32_t seed) {
    std::vector<Half> values(count);
    for (auto& value : values) {
        seed = seed * 1664525u + 1013904223u;
        narrow(static_cast<float>(seed >> 8) / (1 << 23) - 1.0f, value);
    }
    values.shrink_to_fit();
    return values;
}

int check(int64_t batch, int64_t heads, int64_t key_heads, int64_t count, int64_t kept, int64_t width, bool causal,
          int threads) {
    const auto queries = made(batch * heads * count * width, 1);
    const auto keys = made(batch * key_heads * kept * width, 2), values = made(batch * key_heads * kept * width, 3);
    std::vector<Half> out(batch * count * heads * width);
    Task t{queries.data(), keys.data(), values.data(), out.data(), {heads * count * width, count * width, width},
           {key_heads * kept * width, kept * width, width}, {key_heads * kept * width, kept * width, width},
           batch, heads, key_heads, count, kept, width, causal, 0.3f};
    if (autotune_flash(&t, threads)) return 1;
    int wrong = 0;
    for (int64_t row = 0; row < batch * heads * count; ++row) {
        const int64_t b = row / count / heads, head = row / count % heads, token = row % count;
        const int64_t unit = (b * key_heads + head / (heads / key_heads)) * kept * width;
        const int64_t seen = causal ? kept - count + token + 1 : kept;
        std::vector<double> sums(width);
        double total = 0;
        for (int64_t j = 0; j < seen; ++j) {
            double score = 0;
            for (int64_t i = 0; i < width; ++i) score += wide(queries[row * width + i]) * wide(keys[unit + j * width + i]);
            const double weight = std::exp(score * 0.3f);
            total += weight;
            for (int64_t i = 0; i < width; ++i) sums[i] += weight * wide(values[unit + j * width + i]);
        }
        for (int64_t i = 0; i < width; ++i) {
            const double found = wide(out[((b * count + token) * heads + head) * width + i]);
            wrong += !(std::fabs(found - sums[i] / total) < 0.01);
        }
    }
    return wrong;
}

int main() {
    int wrong = 0;
    for (const int64_t count : {1, 11, 48, 97})
        for (const int64_t more : {0, 3, 230})
            for (const bool causal : {false, true})
                wrong += check(2, 4, causal ? 2 : 1, count, count + more, causal ? 32 : 96, causal, 1 + causal);
    std::printf("%d\n", wrong);
    return 0;
}
