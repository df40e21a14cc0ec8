// The functions of warp.h in plain C++, for tests without a card. Threads of a block are fibers that take turns and give
// way where the kernel waits. Copies that run ahead arrive when they are waited for and not before, and what was never
// written is not zero, so that a wait that is missing shows. Of races within a block this finds some, not all.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define KERNEL(threads) static void
#define DEVICE static inline
#define SHARED_BYTES(name) uint8_t* name = emulated.memory.data()

struct Copy {
    uint8_t* to;
    const void* from;  // nullptr: zeros
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 16]};
    bool done = false;
    std::vector<std::vector<Copy>> batches{1};  // the last one is open
};

struct Meeting {
    int arrived = 0, times = 0;
};

// What the lanes of a warp bring to a product.
struct Brought {
    uint32_t a[32][4], b[32][4], places[32];
};

struct Emulated {
    std::vector<Fiber> fibers;
    std::vector<uint8_t> memory;
    std::vector<Meeting> warps;
    std::vector<Brought> brought;
    Meeting block;
    ucontext_t scheduler;
    int thread = 0, x = 0, y = 0;
};
static Emulated emulated;

static void meet(Meeting& meeting, int all) {
    const int now = meeting.times;
    if (++meeting.arrived == all) {
        meeting.arrived = 0, meeting.times++;
        return;
    }
    while (meeting.times == now) swapcontext(&emulated.fibers[emulated.thread].context, &emulated.scheduler);
}

DEVICE int thread_number() { return emulated.thread; }
DEVICE int block_x() { return emulated.x; }
DEVICE int block_y() { return emulated.y; }
DEVICE void wait_for_block() { meet(emulated.block, static_cast<int>(emulated.fibers.size())); }

DEVICE void sparse_product(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
    const int warp = emulated.thread / 32, lane = emulated.thread % 32;
    Brought& all = emulated.brought[warp];
    std::memcpy(all.a[lane], a, sizeof a);
    std::memcpy(all.b[lane], b, sizeof b);
    all.places[lane] = places;
    meet(emulated.warps[warp], 32);
    const auto byte = [](const uint32_t* words, int i) { return static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))); };
    for (int part = 0; part < 4; part++) {
        const int row = lane / 4 + 8 * (part / 2), column = 2 * (lane % 4) + part % 2;
        for (int kept = 0; kept < 32; kept++) {
            const int group = 4 * (row % 8), half = kept / 16;
            const uint32_t* own = all.a[group + kept % 16 / 4];
            const int weight = byte(own, 4 * (row / 8 + 2 * half) + kept % 4);
            const uint32_t word = all.places[group + 2 * half + row / 8];
            const int place = word >> (2 * (kept % 16)) & 3;
            if (kept % 2 && place <= static_cast<int>(word >> (2 * (kept % 16 - 1)) & 3)) {
                std::fprintf(stderr, "places are not in order\n");
                std::abort();
            }
            const int input = kept / 2 * 4 + place;
            sums[part] += weight * byte(all.b[4 * column + input % 16 / 4], 4 * (input / 16) + input % 4);
        }
    }
    meet(emulated.warps[warp], 32);  // nobody brings anything new before all have read
}

DEVICE void copy_ahead(uint8_t* to, const void* from, bool there) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || (to - emulated.memory.data()) % 16) {
        std::fprintf(stderr, "a copy is not aligned\n");
        std::abort();
    }
    emulated.fibers[emulated.thread].batches.back().push_back({to, there ? from : nullptr});
}
DEVICE void end_batch() { emulated.fibers[emulated.thread].batches.emplace_back(); }
template <int batches>
DEVICE void wait_for_copies() {
    auto& waiting = emulated.fibers[emulated.thread].batches;
    while (static_cast<int>(waiting.size()) - 1 > batches) {
        for (const Copy& copy : waiting.front()) {
            if (copy.from) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
        waiting.erase(waiting.begin());
    }
}

DEVICE uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
DEVICE uint32_t two_bf16(float low, float high) { return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16; }
DEVICE float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <typename Operands>
struct Launched {
    static inline void (*kernel)(Operands);
    static inline Operands operands;
    static void thread() {
        kernel(operands);
        emulated.fibers[emulated.thread].done = true;
    }
};

template <typename Operands>
int launch(void (*kernel)(Operands), int x, int y, int threads, int shared_bytes, void*, Operands operands) {
    Launched<Operands>::kernel = kernel, Launched<Operands>::operands = operands;
    for (int block = 0; block < x * y; block++) {
        emulated.x = block % x, emulated.y = block / x;
        emulated.memory.assign(shared_bytes, 0x5A);
        emulated.warps.assign(threads / 32, {});
        emulated.brought.resize(threads / 32);
        emulated.block = {};
        emulated.fibers = std::vector<Fiber>(threads);
        for (Fiber& fiber : emulated.fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = 1 << 16;
            fiber.context.uc_link = &emulated.scheduler;
            makecontext(&fiber.context, Launched<Operands>::thread, 0);
        }
        for (int done = 0; done < threads;) {
            done = 0;
            for (emulated.thread = 0; emulated.thread < threads; emulated.thread++) {
                Fiber& fiber = emulated.fibers[emulated.thread];
                if (!fiber.done) swapcontext(&emulated.scheduler, &fiber.context);
                done += fiber.done;
            }
        }
    }
    return 0;
}
inline const char* error_text(int) { return "emulated"; }
