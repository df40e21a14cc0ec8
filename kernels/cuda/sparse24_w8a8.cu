// y = x W^T + b for 2:4 weights and activations of 8 bits on sparse tensor cores (compute capability 8.0 and later).
//
// A block takes 128 outputs of 128 tokens, its four warps 64 x 64 each, and goes through the inputs 64 at a time. Weights
// are the sparse operand and lie as lanes want them: 16 bytes of values and a word of places a lane, one behind the other,
// so that they are loaded as they are. Of 16 rows of a product, rows r and r + 8 are outputs 2 r and 2 r + 1, which a lane
// then stores as one word. Activations keep their order (tokens, inputs); of a token's four pieces of 16 bytes the i-th
// is kept at place i ^ (token / 2 % 4), so that 32 lanes read from 32 banks. Four steps are in flight.
#include "warp.h"

namespace {

constexpr int TILE = 128, STEP = 64, STAGES = 4, THREADS = 128;
constexpr int VALUES = TILE * STEP / 2, PLACES = TILE * STEP / 8, CODES = TILE * STEP;  // bytes of a step
constexpr int STAGE = VALUES + PLACES + CODES;

struct Operands {
    const uint8_t* values;   // (tiles, steps, 8, 32, 16): kept weights, int8
    const uint8_t* places;   // (tiles, steps, 8, 32, 4)
    const int8_t* codes;     // (rows, 64 steps)
    const float* scales;     // (rows)
    const float* channels;   // (outputs)
    const uint16_t* bias;    // (outputs) bf16, or nullptr
    uint16_t* y;             // (rows, outputs) bf16
    int rows, outputs, steps;
};

// One load of 16 bytes: four of 4 would meet each other in the banks.
struct alignas(16) Words {
    uint32_t part[4];
};

// All of one step's copies of this thread.
DEVICE void fetch(const Operands& o, uint8_t* stage, int step) {
    const int thread = thread_number(), token0 = TILE * block_x();
    const int64_t tile = static_cast<int64_t>(block_y()) * o.steps + step;
    for (int piece = thread; piece < VALUES / 16; piece += THREADS)
        copy_ahead(stage + 16 * piece, o.values + tile * VALUES + 16 * piece, true);
    for (int piece = thread; piece < PLACES / 16; piece += THREADS)
        copy_ahead(stage + VALUES + 16 * piece, o.places + tile * PLACES + 16 * piece, true);
    for (int piece = thread; piece < CODES / 16; piece += THREADS) {
        const int token = piece / 4, part = piece % 4;
        const bool there = token0 + token < o.rows;
        const int64_t row = there ? token0 + token : 0;
        copy_ahead(stage + VALUES + PLACES + 64 * token + 16 * (part ^ (token / 2 % 4)),
                   o.codes + row * STEP * o.steps + STEP * step + 16 * part, there);
    }
}

// One step of a warp: 4 x 8 products.
DEVICE void multiply_step(int (&sums)[4][8][4], const uint8_t* stage) {
    const int lane = thread_number() % 32, warp = thread_number() / 32;
    uint32_t a[4][4], places[4];
    for (int i = 0; i < 4; i++) {
        const int at = 32 * (4 * (warp / 2) + i) + lane;
        const Words words = *reinterpret_cast<const Words*>(stage + 16 * at);
        for (int j = 0; j < 4; j++) a[i][j] = words.part[j];
        places[i] = *reinterpret_cast<const uint32_t*>(stage + VALUES + 4 * at);
    }
    for (int n = 0; n < 8; n++) {
        const int token = 64 * (warp % 2) + 8 * n + lane / 4;
        const uint8_t* row = stage + VALUES + PLACES + 64 * token + 4 * (lane % 4);
        uint32_t b[4];
        for (int j = 0; j < 4; j++) b[j] = *reinterpret_cast<const uint32_t*>(row + 16 * (j ^ (token / 2 % 4)));
        for (int i = 0; i < 4; i++) sparse_product(sums[i][n], a[i], b, places[i]);
    }
}

// Two outputs of a token.
DEVICE void store(const Operands& o, int token, int output, int low, int high) {
    if (token >= o.rows || output >= o.outputs) return;
    const float scale = o.scales[token];
    float first = static_cast<float>(low) * scale * o.channels[output];
    float second = static_cast<float>(high) * scale * o.channels[output + 1];
    if (o.bias) first += from_bf16(o.bias[output]), second += from_bf16(o.bias[output + 1]);
    uint16_t* y = o.y + static_cast<int64_t>(token) * o.outputs + output;
    *reinterpret_cast<uint32_t*>(y) = two_bf16(first, second);
}

KERNEL(THREADS) multiply(Operands o) {
    SHARED_BYTES(memory);
    const int lane = thread_number() % 32, warp = thread_number() / 32;
    int sums[4][8][4];
#pragma unroll
    for (int i = 0; i < 128; i++) sums[i / 32][i / 4 % 8][i % 4] = 0;
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < o.steps) fetch(o, memory + STAGE * step, step);
        end_batch();
    }
    for (int step = 0; step < o.steps; step++) {
        wait_for_copies<STAGES - 2>();  // of this step
        wait_for_block();               // everybody's; and the step before is done with, whose place is next
        const int next = step + STAGES - 1;
        if (next < o.steps) fetch(o, memory + STAGE * (next % STAGES), next);
        end_batch();
        multiply_step(sums, memory + STAGE * (step % STAGES));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int output = TILE * block_y() + 64 * (warp / 2) + 16 * i + 2 * (lane / 4);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int token = TILE * block_x() + 64 * (warp % 2) + 8 * n + 2 * (lane % 4);
            store(o, token, output, sums[i][n][0], sums[i][n][2]);
            store(o, token + 1, output, sums[i][n][1], sums[i][n][3]);
        }
    }
}

}  // namespace

// 0, or the number of an error. `outputs` is even, `steps` inputs / 64.
extern "C" int sparse24_w8a8(const void* values, const void* places, const void* codes, const void* scales,
                             const void* channels, const void* bias, void* y, int rows, int outputs, int steps,
                             void* stream) {
    const Operands operands{
        static_cast<const uint8_t*>(values), static_cast<const uint8_t*>(places), static_cast<const int8_t*>(codes),
        static_cast<const float*>(scales),   static_cast<const float*>(channels), static_cast<const uint16_t*>(bias),
        static_cast<uint16_t*>(y),           rows,                                outputs,
        steps};
    const int tokens = (rows + TILE - 1) / TILE, tiles = (outputs + TILE - 1) / TILE;
    return launch(multiply, tokens, tiles, THREADS, STAGES * STAGE, stream, operands);
}

extern "C" const char* error_of(int error) { return error_text(error); }
