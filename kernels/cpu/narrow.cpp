// y = x W^T + b for weights of three and two bits, activations left alone: stream.h with each format.

#include "stream.h"

namespace {

template <class Format>
bool by_type(const Linear& a, const void* x, int64_t rows, void* y, int threads) {
    if (a.bf16) return linear<Format, Bf16, 2, true>(a, x, rows, y, threads);
    return linear<Format, Fp32, 3, true>(a, x, rows, y, threads);
}

}  // namespace

extern "C" {

// 0, or 1 when memory ran out. x (rows, inputs) and y (rows, outputs), row-major, bf16 or fp32.
int autotune_narrow(const void* packed, const void* x, int64_t rows, void* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    return a.format == 4 ? !by_type<Int3>(a, x, rows, y, threads) : !by_type<Int2>(a, x, rows, y, threads);
}
}
