// Attention of one new token over cached keys and values: softmax(scaling * q K^T) V for the query heads of a key head.
//
// Vectors of sixteen floats in the compilers' own notation, whatever the CPU has. Keys and values are widened once for
// up to four query heads; what they are kept as (`kept.h`) says how. A row's scale enters its score, or its weight.
// Sums are fp32. Memory is never idle: values are fetched to the second cache while keys are read, and the next key head's
// keys while values are.
#pragma once

#include "attention_bf16.h"
#include "kept.h"

// A row's lines to the second cache.
template <typename K>
inline void fetch(const K* row, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / sizeof(K)) __builtin_prefetch(row + i, 0, 2);
}

// scores[r * count + j] = q[r] . k[j] for `heads` queries, each `width` floats.
template <int heads, typename K>
void query_keys(const float* queries, const K* keys, const K* values, int64_t count, int64_t width, float* scores) {
    const int64_t whole = width / kWide * kWide, ahead = 4096 / sizeof(K);
    const int64_t row = row_size<K>(width);
    for (int64_t j = 0; j < count; ++j) {
        const K* key = keys + j * row;
        fetch(key + ahead, width);
        fetch(values + j * row, width);
        Lanes sums[heads] = {};
        for (int64_t i = 0; i < whole; i += kWide) {
            const Lanes k = load(key + i);
#pragma GCC unroll 4
            for (int r = 0; r < heads; ++r) sums[r] += load(queries + r * width + i) * k;
        }
        const float scale = row_scale(key, width);
#pragma GCC unroll 4
        for (int r = 0; r < heads; ++r) scores[r * count + j] = sum(sums[r]) * scale;
        if (whole == width) continue;
        for (int r = 0; r < heads; ++r) {
            float rest = 0.0f;
            for (int64_t i = whole; i < width; ++i) rest += queries[r * width + i] * wide(key[i]);
            scores[r * count + j] += rest * scale;
        }
    }
}

// out[r * width + i ..] = sum over j of scores[r][j] * v[j][i ..] over `vectors` vectors, divided by totals[r].
template <int heads, int vectors, typename K, typename T>
void weigh(const float* scores, const K* values, int64_t count, int64_t width, const float* totals, T* out) {
    const int64_t row = row_size<K>(width);
    Lanes sums[heads][vectors] = {};
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) {
            const Lanes v = load(values + j * row + n * kWide);
#pragma GCC unroll 4
            for (int r = 0; r < heads; ++r) sums[r][n] += scores[r * count + j] * v;
        }
    for (int r = 0; r < heads; ++r)
        for (int n = 0; n < vectors; ++n)
            for (int lane = 0; lane < kWide; ++lane)
                narrow(sums[r][n][lane] / totals[r], out[r * width + n * kWide + lane]);
}

template <int heads, typename K, typename T>
void weigh_values(float* scores, const K* values, const K* next, int64_t count, int64_t width, const float* totals,
                  T* out) {
    const int64_t row = row_size<K>(width);
    if constexpr (kDots<T, K>)
        if (width % kPairs == 0) return weigh_halves<heads>(scores, values, next, count, width, totals, out);
    if constexpr (kCoded<K>)
        for (int64_t j = 0; j < count; ++j) {
            const float scale = row_scale(values + j * row, width);
            for (int r = 0; r < heads; ++r) scores[r * count + j] *= scale;
        }
    int64_t i = 0;
    for (; i + 4 * kWide <= width; i += 4 * kWide)
        weigh<heads, 4>(scores, values + i, count, width, totals, out + i);
    for (; i + kWide <= width; i += kWide) weigh<heads, 1>(scores, values + i, count, width, totals, out + i);
    for (; i < width; ++i)
        for (int r = 0; r < heads; ++r) {
            float total = 0.0f;
            for (int64_t j = 0; j < count; ++j) total += scores[r * count + j] * wide(values[j * row + i]);
            narrow(total / totals[r], out[r * width + i]);
        }
}

// Softmax in place, without the division; returns the sum.
inline float exponentials(float* scores, int64_t count, float scaling) {
    float most = scores[0];
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = exponential((scores[i] - most) * scaling);
        total += scores[i];
    }
    return total;
}

constexpr int kMostHeads = 4;

inline int64_t attention_room(int64_t count, int64_t width) { return kMostHeads * (count + width); }

template <int heads, typename T, typename K>
void all_scores(const T* queries, const K* keys, const K* values, int64_t count, int64_t width, float* scores,
                float* wide_queries) {
    if constexpr (kDots<T, K>)
        if (width % kPairs == 0) return query_halves<heads>(queries, keys, values, count, width, scores);
    for (int64_t i = 0; i < heads * width; ++i) wide_queries[i] = wide(queries[i]);
    query_keys<heads>(wide_queries, keys, values, count, width, scores);
}

// As many query heads at a time as `heads`, then half as many. `next`: keys that will be read after this, or null; `room`:
// attention_room floats.
template <typename T, typename K, int heads = kMostHeads>
void attend(const T* queries, int64_t number, const K* keys, const K* values, const K* next, int64_t count,
            int64_t width, float scaling, float* room, T* out) {
    float* scores = room;
    for (; number >= heads; number -= heads, queries += heads * width, out += heads * width) {
        all_scores<heads>(queries, keys, values, count, width, scores, room + heads * count);
        float totals[heads];
        for (int r = 0; r < heads; ++r) totals[r] = exponentials(scores + r * count, count, scaling);
        weigh_values<heads>(scores, values, next, count, width, totals, out);
    }
    if constexpr (heads > 1)
        if (number) attend<T, K, heads / 2>(queries, number, keys, values, next, count, width, scaling, room, out);
}
