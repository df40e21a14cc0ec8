// Root-mean-square normalisation in one pass over a row that stays in cache.

#include "scalars.h"

namespace {

constexpr int64_t kParallelElements = 1 << 16;  // fewer are done before other threads wake up

template <typename T>
void all_rows(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int threads) {
    if (rows * width < kParallelElements || threads < 2) {
        for (int64_t row = 0; row < rows; ++row) rms_norm(x + row * width, weight, y + row * width, width, eps);
        return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) rms_norm(x + row * width, weight, y + row * width, width, eps);
}

}  // namespace

extern "C" {

void rms_norm_fp32(const float* x, const float* weight, float* y, int64_t rows, int64_t width, float eps, int threads) {
    all_rows(x, weight, y, rows, width, eps, threads);
}

void rms_norm_bf16(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float eps, int threads) {
    all_rows(static_cast<const Half*>(x), static_cast<const Half*>(weight), static_cast<Half*>(y), rows, width, eps,
             threads);
}

}  // extern "C"
