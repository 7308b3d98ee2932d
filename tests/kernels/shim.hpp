// What `move.cu` needs of CUDA, for g++: one thread at a time, and memory accesses that are watched.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
    unsigned int x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};

// What a device would answer with a fault, or nobody would see.
struct Watch {
    std::uint64_t source_start, source_end; // all that may be read
    std::uint64_t target_start, target_end; // all that may be written
    std::uint64_t misaligned;
    std::uint64_t outside;
    std::uint64_t stored; // bytes
};
static Watch watch;

template <class T> T __ldcs(const T *from) {
    std::uint64_t at = reinterpret_cast<std::uint64_t>(from);
    T value = T();
    watch.misaligned += at % sizeof(T) != 0;
    if (at < watch.source_start || at > watch.source_end - sizeof(T)) {
        watch.outside++;
    } else {
        std::memcpy(&value, from, sizeof(T));
    }
    return value;
}

template <class T> void __stcs(T *into, T value) {
    std::uint64_t at = reinterpret_cast<std::uint64_t>(into);
    watch.misaligned += at % sizeof(T) != 0;
    watch.stored += sizeof(T);
    if (at < watch.target_start || at > watch.target_end - sizeof(T)) {
        watch.outside++;
    } else {
        std::memcpy(into, &value, sizeof(T));
    }
}

static inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float __uint_as_float(unsigned int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

using std::exp;
