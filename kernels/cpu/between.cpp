// What is done to rows between matrix products, each in one pass over them.

#include "between.h"

#include <omp.h>

// Written by between.py (`_Heads`), field by field: rows of queries, keys and values, side by side.
struct Heads {
    void* rows;                    // (count, outputs)
    const void *q_norm, *k_norm;   // (width), or null
    const void *cosines, *sines;   // (sequences or 1, tokens, rotary)
    int64_t count, outputs, heads, key_heads, width, tokens, rotary, sequence_stride;
    float q_eps, k_eps;
};

namespace {

constexpr int64_t kParallelElements = 1 << 16;  // fewer are done before other threads wake up

template <typename Work>
void each_row(int64_t rows, int64_t width, int threads, const Work& work) {
    if (rows * width < kParallelElements || threads < 2) {
        for (int64_t row = 0; row < rows; ++row) work(row);
        return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) work(row);
}

template <typename T>
int norm_rows(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int threads) {
    each_row(rows, width, threads, [&](int64_t row) { rms_norm(x + row * width, weight, y + row * width, width, eps); });
    return 0;
}

template <typename T>
int add_norm(const T* x, const T* weight, T* sums, T* y, int64_t rows, int64_t width, float eps, int threads) {
    each_row(rows, width, threads, [&](int64_t row) {
        add(x + row * width, sums + row * width, width);
        rms_norm(sums + row * width, weight, y + row * width, width, eps);
    });
    return 0;
}

template <typename T>
int turn(const Heads& a, int threads) {
    each_row(a.count, a.outputs, threads, [&](int64_t row) {
        const int64_t angle = row / a.tokens * a.sequence_stride + row % a.tokens * a.rotary;
        const T *cosines = static_cast<const T*>(a.cosines) + angle, *sines = static_cast<const T*>(a.sines) + angle;
        T* head = static_cast<T*>(a.rows) + row * a.outputs;
        for (int64_t i = 0; i < a.heads + a.key_heads; ++i, head += a.width) {
            const T* norm = static_cast<const T*>(i < a.heads ? a.q_norm : a.k_norm);
            if (norm) rms_norm(head, norm, head, a.width, i < a.heads ? a.q_eps : a.k_eps);
            rotate(head, cosines, sines, a.rotary);
        }
    });
    return 0;
}

template <typename T>
int gate_rows(const T* both, T* y, int64_t rows, int64_t inner, int threads) {
    each_row(rows, inner, threads, [&](int64_t row) { gate(both + row * 2 * inner, y + row * inner, inner); });
    return 0;
}

template <typename T>
const T* in(const void* x) { return static_cast<const T*>(x); }
template <typename T>
T* out(void* x) { return static_cast<T*>(x); }

}  // namespace

extern "C" {

// y = the norm of x.
void autotune_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float eps, int bf16,
                   int threads) {
    bf16 ? norm_rows(in<Half>(x), in<Half>(weight), out<Half>(y), rows, width, eps, threads)
         : norm_rows(in<float>(x), in<float>(weight), out<float>(y), rows, width, eps, threads);
}

// sums += x, and y = the norm of that.
void autotune_add_norm(const void* x, const void* weight, void* sums, void* y, int64_t rows, int64_t width, float eps,
                       int bf16, int threads) {
    bf16 ? add_norm(in<Half>(x), in<Half>(weight), out<Half>(sums), out<Half>(y), rows, width, eps, threads)
         : add_norm(in<float>(x), in<float>(weight), out<float>(sums), out<float>(y), rows, width, eps, threads);
}

// Normalises and turns queries and keys where they are.
void autotune_turn(const Heads* a, int bf16, int threads) { bf16 ? turn<Half>(*a, threads) : turn<float>(*a, threads); }

// y = silu(gate) * up; both: (rows, gate's outputs, then up's).
void autotune_gate(const void* both, void* y, int64_t rows, int64_t inner, int bf16, int threads) {
    bf16 ? gate_rows(in<Half>(both), out<Half>(y), rows, inner, threads)
         : gate_rows(in<float>(both), out<float>(y), rows, inner, threads);
}

}  // extern "C"
