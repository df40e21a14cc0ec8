// Root-mean-square normalisation in one pass over a row that stays in cache: y = w * round(x / sqrt(mean(x^2) + eps)),
// rounded as transformers' RMSNorm rounds: once to the activations' type before the weight, and once after it.
// Plain C++ with sixteen sums, which compilers turn into vectors of whatever width the CPU has.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kParallelElements = 1 << 16;  // fewer are done before other threads wake up

struct Bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Bf16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, Bf16& y) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
    y.bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

template <typename T>
void one_row(const T* x, const T* weight, T* y, int64_t width, float eps) {
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += wide(x[i + lane]) * wide(x[i + lane]);
    }
    float total = 0.0f;
    for (float sum : sums) total += sum;
    for (; i < width; ++i) total += wide(x[i]) * wide(x[i]);
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (int64_t j = 0; j < width; ++j) {
        T normal;
        narrow(wide(x[j]) * scale, normal);
        narrow(wide(weight[j]) * wide(normal), y[j]);
    }
}

template <typename T>
void all_rows(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int threads) {
    if (rows * width < kParallelElements || threads < 2) {
        for (int64_t row = 0; row < rows; ++row) one_row(x + row * width, weight, y + row * width, width, eps);
        return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) one_row(x + row * width, weight, y + row * width, width, eps);
}

}  // namespace

extern "C" {

void rms_norm_fp32(const float* x, const float* weight, float* y, int64_t rows, int64_t width, float eps, int threads) {
    all_rows(x, weight, y, rows, width, eps, threads);
}

void rms_norm_bf16(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float eps, int threads) {
    all_rows(static_cast<const Bf16*>(x), static_cast<const Bf16*>(weight), static_cast<Bf16*>(y), rows, width, eps,
             threads);
}

}  // extern "C"
