// The 2:4 formats of integer.cpp.

#include "stream.h"

extern "C" int autotune_sparse(const void* packed, const void* x, int64_t rows, void* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    switch (a.format) {
        case 2: return !by_type<Sparse8, false>(a, x, rows, y, threads);
        default: return !by_type<Sparse4, true>(a, x, rows, y, threads);
    }
}
