// How activation rows are dealt out and laid out, for all kernels here.
//
// Rows go through the weights in groups of eight, what is left in groups of four, two and one. A group's rows are
// interleaved, [steps][rows of the group][32 inputs]: read front to back, where rows a power of two apart would fight
// over the same few places of the first cache.
#pragma once

#include <cstdint>
#include <cstdlib>

constexpr int kLanes = 16;  // outputs in a block
constexpr int kStep = 32;   // inputs in a step
constexpr int64_t kCachedBytes = 512 << 10;  // of activations that stay in the second cache while the blocks pass

// Independent chains of sums hide the latency of a dot product when there are few rows.
template <int rows>
constexpr int kChains = rows == 1 ? 4 : rows <= 3 ? 2 : 1;

struct Group {
    int64_t first, size;
};

// The group of a row, where `most` (a power of two) rows make a full one.
inline Group group_of(int64_t row, int64_t count, int64_t most) {
    const int64_t full = count / most * most;
    if (row < full) return {row / most * most, most};
    Group group{full, most / 2};
    while (true) {
        if (count - group.first >= group.size) {
            if (row < group.first + group.size) return group;
            group.first += group.size;
        }
        group.size /= 2;
    }
}

// Rows of a pass over the weights: whole groups, as many as stay cached.
inline int64_t rows_of_pass(int64_t row_bytes, int64_t most) {
    const int64_t groups = kCachedBytes / row_bytes / most;
    return (groups < 1 ? 1 : groups) * most;
}

// A thread's share of `count` things.
inline void share(int64_t count, int thread, int threads, int64_t& first, int64_t& last) {
    first = count * thread / threads;
    last = count * (thread + 1) / threads;
}

// Memory that is kept from call to call, one buffer a thread and purpose.
class Buffer {
   public:
    uint8_t* of(size_t bytes) {  // null when there is none
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, size_));
            if (!data_) size_ = 0;
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }

   private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};
