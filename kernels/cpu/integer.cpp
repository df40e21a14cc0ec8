// y = x W^T + b for int8, int4 and 2:4 weights, on integer dot products, any number of rows: stream.h with each format.

#include "stream.h"

namespace {

template <class Format, bool grouped>
bool by_type(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (a.bf16) return by_planes<Format, Bf16, grouped>(a, x, rows, y, threads);
    return by_planes<Format, Fp32, grouped>(a, x, rows, y, threads);
}

}  // namespace

extern "C" {

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), row-major, bf16 or fp32.
int autotune_linear(const void* packed, const void* x, int64_t rows, void* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    switch (a.format) {
        case 0: return !by_type<Int8, false>(a, x, rows, y, threads);
        case 1: return !by_type<Int4, true>(a, x, rows, y, threads);
        case 2: return !by_type<Sparse8, false>(a, x, rows, y, threads);
        default: return !by_type<Sparse4, true>(a, x, rows, y, threads);
    }
}
}
