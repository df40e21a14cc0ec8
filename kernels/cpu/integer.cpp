// y = x W^T + b for int8, int4 and 2:4 weights, on integer dot products, any number of rows: stream.h with each format.
// What is 2:4 is in integer.sparse.cpp, so that two cores compile.

#include "stream.h"

extern "C" {

int autotune_sparse(const void* packed, const void* x, int64_t rows, void* y, int threads);

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), row-major, bf16 or fp32.
int autotune_linear(const void* packed, const void* x, int64_t rows, void* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    switch (a.format) {
        case 0: return !by_type<Int8, false>(a, x, rows, y, threads);
        case 1: return !by_type<Int4, true>(a, x, rows, y, threads);
        default: return autotune_sparse(packed, x, rows, y, threads);
    }
}
}
