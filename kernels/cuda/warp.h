// What kernels here use of a GPU beyond C++: the sparse tensor-core product, copies into shared memory that run ahead,
// and launching. With AUTOTUNE_EMULATED_WARPS defined the same functions are plain C++ (warp_emulated.h): what the tests
// run where there is no card. Source: NVIDIA's "Parallel Thread Execution ISA", 9.0.
#pragma once

#include <cstdint>

#if defined(AUTOTUNE_EMULATED_WARPS)

#include "warp_emulated.h"

#else

#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define DEVICE __device__ __forceinline__
#define SHARED_BYTES(name) extern __shared__ __align__(128) uint8_t name[]

DEVICE int thread_number() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE void wait_for_block() { __syncthreads(); }

// sums += A B for A (16, 64) int8 with two of every four inputs kept, B (64, 8) int8, int32 sums (16, 8). With group g =
// lane / 4 and t = lane % 4, a lane holds, four to a word:
//   a[0], a[1]: what is kept of inputs 8 t ... 8 t + 7 in rows g and g + 8; a[2], a[3]: of inputs 32 + 8 t ...
//   b[i]: inputs 16 i + 4 t ... + 3 of column g
//   sums[0], sums[1]: row g, columns 2 t and 2 t + 1; sums[2], sums[3]: row g + 8
//   places: two bits for each that is kept, lowest first, of row g + 8 (t % 2), inputs 32 (t / 2) ... + 31; of two in
//   the same four inputs the first has the lower place ("ordered metadata").
// So the manual, which has pictures of places; in numbers they are in CUTLASS's `mma_traits_sm120_sparse.hpp`.
DEVICE void sparse_product(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));
}

// 16 bytes to shared memory, zeros where `there` is false; done once `wait_for_copies` says so.
DEVICE void copy_ahead(uint8_t* to, const void* from, bool there) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
// Ends a batch of this thread's copies, which may be empty.
DEVICE void end_batch() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// This thread's copies are there, those of the newest `batches` excepted.
template <int batches>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(batches) : "memory");
}

// Two bf16 numbers, rounded to nearest even, `low` first in memory.
DEVICE uint32_t two_bf16(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// 0, or CUDA's number of the error.
template <typename Operands>
int launch(void (*kernel)(Operands), int x, int y, int threads, int shared_bytes, void* stream, Operands operands) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    kernel<<<dim3(x, y), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(operands);
    return cudaGetLastError();
}
inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif
