// Sixteen floats as gcc and clang write them: the compiler cuts them to what the CPU has.
#pragma once

typedef float Vector __attribute__((vector_size(64), aligned(64)));
constexpr int kLanes = 16;

inline Vector splat(float x) { return x - Vector{}; }
inline Vector nearest(Vector x) {  // whole numbers, ties to even; right up to 2^22
    const Vector large = splat(12582912.0f);
    return (x + large) - large;
}
inline Vector clamped(Vector x, Vector low, Vector high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}
