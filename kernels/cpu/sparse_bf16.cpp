// y = x W^T + b for 2:4 weights in bf16: activations are gathered, weights never expanded.
//
// A step is 16 outputs x 32 inputs: eight vectors of survivors (two of every four inputs, 16 outputs), then one vector
// of positions. The 32 activations of a step fill one register, from which a word permutation picks those that meet the
// survivors: half the multiplications of a dense product, 9/16 of its bytes. Sums are fp32.

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__)
#error "needs AVX-512 with bf16"
#endif

namespace {

// One packed layer group; written by sparse_bf16.py (`_Linear`), field by field.
struct Linear {
    const uint8_t* weights;  // [blocks][steps][576]
    const float* bias;       // [blocks * 16], or null
    int64_t outputs, padded;
    int32_t blocks, steps;
};

constexpr int kLanes = 16, kStep = 32, kStepBytes = 576, kMostRows = 8;

inline __attribute__((always_inline)) void dot(__m512& sums, __m512i x, __m512i w) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "vm"(w));
}

template <int t>
inline __attribute__((always_inline)) __m512i select(__m512i positions) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi16(positions, 2 * t), _mm512_set1_epi16(3),
                                     _mm512_set1_epi16(4 * t), 0xEA);  // (a & b) | c
}

template <int rows, int t>
inline __attribute__((always_inline)) void chunk(const uint8_t* w, __m512i positions, const __m512i (&x)[rows],
                                                 __m512 (&sums)[rows][2]) {
    const __m512i weights = _mm512_loadu_si512(w + 64 * t), from = select<t>(positions);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) dot(sums[r][rows <= 4 ? t % 2 : 0], _mm512_permutexvar_epi16(from, x[r]), weights);
}

void store(uint16_t* y, int64_t count, __m512 value) {  // vcvtneps2bf16: ties to even
    const __mmask16 mask = count >= kLanes ? 0xFFFF : (1u << count) - 1;
    _mm256_mask_storeu_epi16(y, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

template <int rows>
void block_rows(const Linear& a, int block, const uint16_t* x, uint16_t* y) {
    const uint8_t* w = a.weights + static_cast<int64_t>(block) * a.steps * kStepBytes;
    __m512 sums[rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int s = 0; s < a.steps; s++, w += kStepBytes) {
        for (int i = 0; i < kStepBytes; i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + 4096 + i, _MM_HINT_T0);
        __m512i inputs[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) inputs[r] = _mm512_loadu_si512(x + r * a.padded + s * kStep);
        const __m512i positions = _mm512_loadu_si512(w + 512);
        chunk<rows, 0>(w, positions, inputs, sums);
        chunk<rows, 1>(w, positions, inputs, sums);
        chunk<rows, 2>(w, positions, inputs, sums);
        chunk<rows, 3>(w, positions, inputs, sums);
        chunk<rows, 4>(w, positions, inputs, sums);
        chunk<rows, 5>(w, positions, inputs, sums);
        chunk<rows, 6>(w, positions, inputs, sums);
        chunk<rows, 7>(w, positions, inputs, sums);
    }
    const __m512 bias = a.bias ? _mm512_loadu_ps(a.bias + block * kLanes) : _mm512_setzero_ps();
    for (int r = 0; r < rows; r++)
        store(y + r * a.outputs + block * kLanes, a.outputs - block * kLanes,
              _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), bias));
}

template <int rows = kMostRows>
inline __attribute__((always_inline)) void rows_from(const Linear& a, int block, const uint16_t* x, int64_t row,
                                                     int64_t end, uint16_t* y) {
    for (; row + rows <= end; row += rows) block_rows<rows>(a, block, x + row * a.padded, y + row * a.outputs);
    if constexpr (rows > 1)
        if (row < end) rows_from<rows / 2>(a, block, x, row, end, y);
}

}  // namespace

extern "C" {

// x (rows, padded) and y (rows, outputs), bf16, row-major.
void autotune_sparse_bf16(const void* packed, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    const Linear& a = *static_cast<const Linear*>(packed);
    int64_t cached = (512 << 10) / (2 * a.padded) / kMostRows * kMostRows;  // rows that stay in the second cache
    if (cached < kMostRows) cached = kMostRows;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t start = 0; start < rows; start += cached)
            for (int64_t block = a.blocks * thread / team; block < a.blocks * (thread + 1) / team; block++)
                rows_from(a, block, x, start, start + cached < rows ? start + cached : rows, y);
    }
}
}
