// What a decoder layer does between its matrix products, a row at a time. Numbers are rounded to the activations' type
// wherever transformers' modules round them.
#pragma once

#include "scalars.h"

// x[j], x[j + half] turned by the position's angles; transformers' rotate_half convention.
template <typename T>
void rotate(T* x, const T* cosines, const T* sines, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t j = 0; j < half; ++j) {
        const float a = wide(x[j]), b = wide(x[j + half]);
        const float turned_a = rounded<T>(a * wide(cosines[j])) + rounded<T>(-b * wide(sines[j]));
        const float turned_b = rounded<T>(b * wide(cosines[j + half])) + rounded<T>(a * wide(sines[j + half]));
        narrow(turned_a, x[j]);
        narrow(turned_b, x[j + half]);
    }
}

// silu(gate) * up of one row: gate's outputs first, then up's.
template <typename T>
void gate(const T* both, T* out, int64_t inner) {
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) {
        const float x = wide(both[i]);
        narrow(rounded<T>(x / (1.0f + exponential(-x))) * wide(both[inner + i]), out[i]);
    }
}

// y += x, each sum rounded.
template <typename T>
void add(const T* x, T* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow(wide(x[i]) + wide(y[i]), y[i]);
}
