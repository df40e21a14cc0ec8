// bf16 and fp32 one number at a time: plain C++, which compilers turn into vectors of whatever width the CPU has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct Half {  // bf16
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Half x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, Half& y) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
    y.bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

// To the activations' type and back.
template <typename T>
inline float rounded(float x) {
    T y;
    narrow(x, y);
    return wide(y);
}

// e^x within 2e-7 of it, x clamped to +-87: x = k ln 2 + r, and a polynomial in r (Cephes' expf).
inline float exponential(float x) {
    x = x > 87.0f ? 87.0f : x < -87.0f ? -87.0f : x;  // NaN stays
    const float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// y = w * round(x / sqrt(mean(x^2) + eps)), rounded as transformers' RMSNorm rounds: to the activations' type before
// the weight, and after it.
template <typename T>
void rms_norm(const T* x, const T* weight, T* y, int64_t width, float eps) {
    constexpr int lanes = 16;
    float sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        for (int lane = 0; lane < lanes; ++lane) sums[lane] += wide(x[i + lane]) * wide(x[i + lane]);
    }
    float total = 0.0f;
    for (float sum : sums) total += sum;
    for (; i < width; ++i) total += wide(x[i]) * wide(x[i]);
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (int64_t j = 0; j < width; ++j) narrow(wide(weight[j]) * rounded<T>(wide(x[j]) * scale), y[j]);
}
