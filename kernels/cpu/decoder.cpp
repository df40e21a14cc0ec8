// One new token of each sequence through decoder layers in one call: norm, q/k/v, rotary positions, attention over
// the cached keys and values, output product, residual sum, norm, gated MLP, residual sum.
//
// Run as modules, the few microseconds of arithmetic between a layer's four matrix products cost ten times as much in
// Python, whose code and data the weights push out of the caches meanwhile; and so does what Python does between two
// layers: 90 us. The products are those of any kernel: a function pointer each. Numbers are rounded to the activations' type wherever transformers' modules round them.

#include <omp.h>

#include "attention.h"
#include "between.h"
#include "rows.h"

namespace {

// y = x W^T + b; 0, or an error code.
struct Product {
    int (*run)(const void* packed, const void* x, int64_t rows, void* y, int threads);
    const void* packed;
    int64_t outputs;
};

// Written by decoder.py (`_Layer`), field by field.
struct Layer {
    Product qkv, o, gate_up, down;
    const void *input_norm, *post_norm, *q_norm, *k_norm;  // weights; q_norm and k_norm may be null
    float input_eps, post_eps, q_eps, k_eps, scaling;
    int32_t bf16;
    int64_t hidden, heads, key_heads, width, inner;  // width: of a head; inner: outputs of gate, and of up
    void *normed, *projected, *attended, *gated;     // room for a row of each: hidden, q/k/v or gate/up, heads, inner
    int64_t rows;                                    // that the room is for
};

// Where a layer keeps keys and values: (sequences, key heads, capacity, row of `kept.h`).
struct Place {
    void *keys, *values;
    int64_t capacity, position;  // position: tokens already kept
    int32_t kept;                // how: 0 as activations, 1 int8, 2 fp8
};

// The new tokens; y may be x.
struct Tokens {
    const void *x, *cosines, *sines;
    void* y;
    int64_t count, rotary, rotary_stride;  // rotary: turned numbers
};

thread_local Buffer scores_buffer;

// Normalises and turns a key head's queries and its key, keeps key and value, and attends. `more`: the same thread does the
// next one. False: no memory.
template <typename T, typename K>
bool key_head(const Layer& a, const Place& p, const Tokens& t, int64_t unit, bool more) {
    const int64_t token = unit / a.key_heads, head = unit % a.key_heads;
    const int64_t shared = a.heads / a.key_heads, kept = p.position + 1;
    float* room = reinterpret_cast<float*>(scores_buffer.of(attention_room(kept, a.width) * sizeof(float)));
    if (!room) return false;
    T* row = static_cast<T*>(a.projected) + token * a.qkv.outputs;
    T *queries = row + head * shared * a.width, *key = row + (a.heads + head) * a.width;
    const T* value = row + (a.heads + a.key_heads + head) * a.width;
    const T* cosines = static_cast<const T*>(t.cosines) + token * t.rotary_stride;
    const T* sines = static_cast<const T*>(t.sines) + token * t.rotary_stride;
    const int64_t size = row_size<K>(a.width), place = unit * p.capacity * size;
    K *keys = static_cast<K*>(p.keys) + place, *values = static_cast<K*>(p.values) + place;
    if (a.k_norm) rms_norm(key, static_cast<const T*>(a.k_norm), key, a.width, a.k_eps);
    rotate(key, cosines, sines, t.rotary);
    keep(key, a.width, keys + p.position * size);
    keep(value, a.width, values + p.position * size);
    for (int64_t i = 0; i < shared; ++i) {
        T* query = queries + i * a.width;
        if (a.q_norm) rms_norm(query, static_cast<const T*>(a.q_norm), query, a.width, a.q_eps);
        rotate(query, cosines, sines, t.rotary);
    }
    T* out = static_cast<T*>(a.attended) + (token * a.heads + head * shared) * a.width;
    attend(queries, shared, keys, values, more ? keys + p.capacity * size : nullptr, kept, a.width, a.scaling, room, out);
    return true;
}

template <typename T, typename K>
bool all_heads(const Layer& a, const Place& p, const Tokens& t, int threads) {
    bool enough = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
    {
        int64_t first, last;
        share(t.count * a.key_heads, omp_get_thread_num(), omp_get_num_threads(), first, last);
        for (int64_t unit = first; unit < last; ++unit)
            enough = key_head<T, K>(a, p, t, unit, unit + 1 < last) && enough;
    }
    return enough;
}

template <typename T>
bool attention(const Layer& a, const Place& p, const Tokens& t, int threads) {
    if (p.kept == 1) return all_heads<T, Int8>(a, p, t, threads);
    return p.kept == 2 ? all_heads<T, Fp8>(a, p, t, threads) : all_heads<T, T>(a, p, t, threads);
}

template <typename T>
void normalise(const Layer& a, const T* x, const void* weight, float eps, int64_t rows) {
    T* y = static_cast<T*>(a.normed);
    for (int64_t r = 0; r < rows; ++r)
        rms_norm(x + r * a.hidden, static_cast<const T*>(weight), y + r * a.hidden, a.hidden, eps);
}

int product(const Product& a, const void* x, int64_t rows, void* y, int threads) {
    return a.run(a.packed, x, rows, y, threads);
}

// y: the tokens, changed in place.
template <typename T>
int layer(const Layer& a, const Place& p, const Tokens& t, int threads) {
    T *y = static_cast<T*>(t.y), *normed = static_cast<T*>(a.normed), *both = static_cast<T*>(a.projected);
    normalise(a, y, a.input_norm, a.input_eps, t.count);
    if (int error = product(a.qkv, normed, t.count, both, threads)) return error;
    if (!attention<T>(a, p, t, threads)) return 1;
    if (int error = product(a.o, a.attended, t.count, normed, threads)) return error;
    add(normed, y, t.count * a.hidden);
    normalise(a, y, a.post_norm, a.post_eps, t.count);
    if (int error = product(a.gate_up, normed, t.count, both, threads)) return error;
    T* gated = static_cast<T*>(a.gated);
    for (int64_t r = 0; r < t.count; ++r) gate(both + r * 2 * a.inner, gated + r * a.inner, a.inner);
    if (int error = product(a.down, gated, t.count, normed, threads)) return error;
    add(normed, y, t.count * a.hidden);
    return 0;
}

template <typename T>
int all_layers(const Layer* const* layers, const Place* places, int64_t number, const Tokens& t, int threads) {
    if (t.y != t.x) std::memcpy(t.y, t.x, t.count * layers[0]->hidden * sizeof(T));
    for (int64_t i = 0; i < number; ++i)
        if (int error = layer<T>(*layers[i], places[i], t, threads)) return error;
    return 0;
}

}  // namespace

extern "C" {

// One layer behind the other, all of them of the same numbers and width. 0; 1: no memory; else what a product returned.
int autotune_decoder_layers(const Layer* const* layers, const Place* places, int64_t number, const Tokens* t,
                            int threads) {
    for (int64_t i = 0; i < number; ++i)
        if (t->count > layers[i]->rows) return 1;
    if (number == 0) return 0;
    return layers[0]->bf16 ? all_layers<Half>(layers, places, number, *t, threads)
                           : all_layers<float>(layers, places, number, *t, threads);
}

// Attention alone, of what is in `projected`; for timing it.
int autotune_decoder_attention(const Layer* a, const Place* p, const Tokens* t, int threads) {
    if (t->count > a->rows) return 1;
    return !(a->bf16 ? attention<Half>(*a, *p, *t, threads) : attention<float>(*a, *p, *t, threads));
}

// Products of the same rows one after the other, each over the outputs of the last; for timing them.
int autotune_products(const Product* products, int64_t number, const void* x, int64_t rows, void* y, int threads) {
    for (int64_t i = 0; i < number; ++i)
        if (int error = product(products[i], x, rows, y, threads)) return error;
    return 0;
}

// A product that is left out (`zeros`): `packed` points to its outputs' bytes a row.
int autotune_zeros(const void* packed, const void*, int64_t rows, void* y, int) {
    std::memset(y, 0, rows * *static_cast<const int64_t*>(packed));
    return 0;
}
}
