// Calls the native decoder layer on buffers without slack, for sanitizers. Products are a sum of their inputs.
#include "decoder.cpp"

#include <cstdio>
#include <vector>

template <typename T>
int sums(const void* packed, const void* x, int64_t rows, void* y, int) {
    const int64_t* sizes = static_cast<const int64_t*>(packed);  // inputs, outputs
    for (int64_t r = 0; r < rows; ++r) {
        float sum = 0.0f;
        for (int64_t i = 0; i < sizes[0]; ++i) sum += wide(static_cast<const T*>(x)[r * sizes[0] + i]);
        for (int64_t o = 0; o < sizes[1]; ++o) narrow(sum / sizes[0] + 0.01f * o, static_cast<T*>(y)[r * sizes[1] + o]);
    }
    return 0;
}

template <typename T>
std::vector<T> filled(int64_t count, float value) {
    std::vector<T> made(count);
    for (int64_t i = 0; i < count; ++i) narrow(value * (1 + i % 7), made[i]);
    made.shrink_to_fit();
    return made;
}

// Kept rows of `filled` numbers.
template <typename T, typename K>
std::vector<K> kept(int64_t count, int64_t width) {
    const auto row = filled<T>(width, 0.2f);
    std::vector<K> made(count * row_size<K>(width));
    for (int64_t i = 0; i < count; ++i) keep(row.data(), width, made.data() + i * row_size<K>(width));
    made.shrink_to_fit();
    return made;
}

template <typename T, typename K = T>
int check(int64_t rows, int64_t hidden, int64_t heads, int64_t key_heads, int64_t width, int64_t inner, int64_t position,
          bool norms, int threads) {
    const int64_t qkv = (heads + 2 * key_heads) * width, most = std::max(qkv, 2 * inner);
    const int64_t sizes[4][2] = {{hidden, qkv}, {heads * width, hidden}, {hidden, 2 * inner}, {inner, hidden}};
    auto x = filled<T>(rows * hidden, 0.3f), y = filled<T>(rows * hidden, 0), norm = filled<T>(hidden, 0.5f);
    auto head_norm = filled<T>(width, 0.5f), angles = filled<T>(rows * width, 0.1f);
    auto keys = kept<T, K>(rows * key_heads * (position + 1), width), values = keys;
    auto normed = filled<T>(rows * hidden, 0), projected = filled<T>(rows * most, 0);
    auto attended = filled<T>(rows * heads * width, 0), gated = filled<T>(rows * inner, 0);
    Layer a{{sums<T>, sizes[0], qkv}, {sums<T>, sizes[1], hidden}, {sums<T>, sizes[2], 2 * inner},
            {sums<T>, sizes[3], hidden}, norm.data(), norm.data(), norms ? head_norm.data() : nullptr,
            norms ? head_norm.data() : nullptr, 1e-5f, 1e-5f, 1e-5f, 1e-5f, 0.25f, sizeof(T) == 2, hidden, heads,
            key_heads, width, inner, normed.data(), projected.data(), attended.data(), gated.data(), rows};
    auto more_keys = keys, more_values = values;
    const int32_t how = !kCoded<K> ? 0 : kMost<K> == 127.0f ? 1 : 2;
    const Place places[] = {{keys.data(), values.data(), position + 1, position, how},
                            {more_keys.data(), more_values.data(), position + 1, position, how}};
    const Layer* layers[] = {&a, &a};
    Tokens t{x.data(), angles.data(), angles.data(), y.data(), rows, width, rows > 1 ? width : 0};
    if (autotune_decoder_layers(layers, places, 2, &t, threads)) return 1;
    for (const T& value : y)
        if (!std::isfinite(wide(value))) return 2;
    t.count = rows + 1;
    return autotune_decoder_layers(layers, places, 2, &t, threads) == 1 ? 0 : 3;
}

// Rows that are zero, as large as can be, tiny, or not finite; every code there is comes back.
template <typename K>
int check_codes() {
    int failed = 0;
    for (float value : {0.0f, 3.0e38f, 1.0e-38f, 1.5f}) {
        const float x[3] = {value, -value, value / 3};
        K row[3 + sizeof(float)];
        keep(x, 3, row);
        for (int i = 0; i < 3; ++i) {
            const float back = wide(row[i]) * row_scale(row, 3);
            if (!(std::fabs(back - x[i]) <= value / 16 || value < 1e-30f)) failed |= 16;
        }
    }
    for (float value : {INFINITY, -INFINITY, NAN}) {
        const float x[2] = {1.0f, value};
        K row[2 + sizeof(float)];
        keep(x, 2, row);
        if (std::isfinite(row_scale(row, 2))) failed |= 32;
    }
    uint8_t codes[256];
    for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
    const K* all = reinterpret_cast<const K*>(codes);
    for (int i = 0; i < 256; ++i) {
        if ((i & 0x7f) == 0x7f && kMost<K> == 448.0f) continue;  // NaN, which is never written
        if (load(all + i / kWide * kWide)[i % kWide] != wide(all[i])) failed |= 64;
        if (i == 128 && kMost<K> == 127.0f) continue;  // -128, neither
        K code;
        encode(wide(all[i]), code);
        if (std::memcmp(&code, all + i, 1)) failed |= 128;
    }
    return failed;
}

int main() {
    int failed = check_codes<Int8>() | check_codes<Fp8>();
    for (int threads : {1, 2})
        for (int64_t position : {0, 1, 3, 4, 18})
            for (int64_t rows : {1, 3}) {
                failed |= check<float>(rows, 37, 6, 2, 10, 21, position, true, threads);
                failed |= check<Half>(rows, 37, 4, 4, 6, 19, position, false, threads);
                failed |= check<Half>(rows, 64, 8, 1, 16, 48, position, true, threads);
                failed |= check<float, Int8>(rows, 37, 6, 2, 10, 21, position, true, threads);
                failed |= check<Half, Int8>(rows, 37, 7, 1, 86, 19, position, false, threads);
                failed |= check<Half, Fp8>(rows, 37, 6, 2, 26, 19, position, true, threads);
            }
    for (float x = -100.0f; x < 100.0f; x += 0.37f) {
        const float clamped = std::min(87.0f, std::max(-87.0f, x)), expected = std::exp(clamped);
        if (std::abs(exponential(x) - expected) > 3e-7f * expected) failed |= 4;
    }
    if (!std::isnan(exponential(NAN))) failed |= 8;
    std::printf("%d\n", failed);
    return failed;
}
