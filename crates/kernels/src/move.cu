// Carries out tables of strided moves: copies, casts, element maps, zeros. One launch serves many tables.
//
// NVRTC compiles this file to `move.ptx` (`cargo xtask ptx`), without any header. The tests compile it with g++ as
// well and run one thread after another, so threads must not talk to each other: no shared memory, no barrier, no
// shuffle, no atomic. Entries are trusted; `table.rs` checks them and explains the numbers that it puts here.
//
// Floats are handled as their bits, and arithmetic is IEEE without contraction, so that every bit equals what
// `refit_translate::host` gives, those of a NaN included.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Independent loads of one thread before its first store.
#define UNROLL 4
#define ELEMENTS_UNROLL 2

// One move: equal runs at places that repeat in up to three dimensions. A run is made of units, each of which one
// thread loads, converts and stores at once. A tile is a piece of a long run, or several whole short runs.
struct Entry {
    u64 source;           // address of the first byte read, less the base of its table
    u64 target;           // address of the first byte written
    u64 source_stride[3]; // bytes between runs, innermost dimension first
    u64 target_stride[3];
    u64 run;      // units of a run
    u32 piece;    // units of a run that a tile holds, at most
    u32 pieces;   // tiles of a run; 1 where a tile holds whole runs
    u32 rows;     // runs of a tile, at most; 1 where a run takes several tiles
    u32 runs;     // below 2^31
    u32 first;    // number of the first tile in the table
    u32 op;       // what is done with a unit
    u32 code;     // more about it, for OP_ELEMENT
    u32 inner;    // count of the innermost dimension; 1 and a stride of 0 without one
    u32 middle;   // count of the next
    u32 by_piece; // factors that divide by `piece`, `inner` and `middle`
    u32 by_inner;
    u32 by_middle;
    u32 shifts; // and their shifts, a byte each, in this order
    u32 reserved;
};

// A table on the device.
struct Table {
    const Entry *entries;
    const u32 *owners; // the entry of every tile
    u64 base;          // added to every source; a multiple of 16
    u32 tiles;
    u32 start; // the first step at which all tables before this one are exhausted
};

#define MOST_TABLES 64

// Tables in ascending order of their tiles. Tiles are taken in turns from those that have some left, one a step, so
// that all sources are read at once.
struct Launch {
    u32 tables;
    u32 steps; // tiles of all tables; below 2^31
    u32 lanes; // threads that share a tile; divides the threads of a block
    u32 reserved;
    Table table[MOST_TABLES];
};

// What is done with a unit. Those of casts hold four elements.
#define OP_COPY_16 0
#define OP_COPY_8 1
#define OP_COPY_4 2
#define OP_ZERO_16 3
#define OP_F32_TO_BF16 4
#define OP_F32_TO_F16 5
#define OP_BF16_TO_F32 6
#define OP_F16_TO_F32 7
// Everything else: a unit is one element, and `code` says what becomes of it.
#define OP_ELEMENT 8

#define TYPE_F32 0
#define TYPE_BF16 1
#define TYPE_F16 2
#define TYPE_U8 3
#define TYPE_U16 4
#define TYPE_U32 5

#define MAP_NONE 0 // bits stay as they are
#define MAP_CAST 1
#define MAP_ADD_ONE 2
#define MAP_NEG_EXP 3
#define MAP_ZERO 4

// The parts of `code`.
#define CODE_FROM(code) ((code) & 15)
#define CODE_INTO(code) ((code) >> 4 & 15)
#define CODE_MAP(code) ((code) >> 8 & 15)
#define CODE_ALIGNED(code) ((code) >> 12 & 1) // addresses are multiples of the element on either side

// ---- Floats ----

__device__ inline bool is_nan(u32 bits) { return (bits & 0x7fffffff) > 0x7f800000; }

struct Bf16 {
    static __device__ inline u32 widen(u32 code) {
        u32 bits = code << 16;
        return is_nan(bits) ? bits | 0x00400000 : bits;
    }

    // To nearest even; a NaN keeps its sign and the upper bits of its payload.
    static __device__ inline u32 narrow(u32 bits) {
        u32 upper = bits >> 16;
        u32 rounded = (bits + 0x7fff + (upper & 1)) >> 16;
        return is_nan(bits) ? upper | 0x0040 : rounded;
    }
};

struct F16 {
    static __device__ inline u32 widen(u32 code) {
        u32 sign = (code & 0x8000) << 16;
        u32 exponent = code & 0x7c00;
        u32 fraction = code & 0x03ff;
        u32 normal = ((exponent | fraction) << 13) + 0x38000000;
        // Exact: a fraction of 10 bits, and a power of two.
        u32 subnormal = __float_as_uint((float)fraction * 5.9604644775390625e-8f);
        u32 special = 0x7f800000 | fraction << 13 | (fraction ? 0x00400000 : 0);
        return sign | (exponent == 0x7c00 ? special : exponent ? normal : subnormal);
    }

    // To nearest even; a NaN keeps its sign and the upper bits of its payload.
    static __device__ inline u32 narrow(u32 bits) {
        u32 sign = bits >> 16 & 0x8000;
        u32 size = bits & 0x7fffffff;
        // Adding 0.5 moves the last place of a subnormal F16 to that of the sum, which rounds it.
        u32 subnormal = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000;
        u32 normal = (size - 0x38000000 + 0x0fff + (size >> 13 & 1)) >> 13;
        u32 special = is_nan(bits) ? 0x7e00 | (size >> 13 & 0x03ff) : 0x7c00;
        // 65520 and more round to infinity; below 2^-14 values are subnormal.
        return sign | (size >= 0x477ff000 ? special : size < 0x38800000 ? subnormal : normal);
    }
};

// ---- Units ----

template <class T> struct Copy {
    typedef T From;
    typedef T Into;
    static __device__ inline From load(const From *from) { return __ldcs(from); }
    static __device__ inline Into convert(From unit) { return unit; }
};

template <class T> struct Zero {
    typedef T From;
    typedef T Into;
    static __device__ inline From load(const From *) { return T(); }
    static __device__ inline Into convert(From unit) { return unit; }
};

template <class Half> struct Narrow {
    typedef uint4 From;
    typedef uint2 Into;
    static __device__ inline From load(const From *from) { return __ldcs(from); }
    static __device__ inline Into convert(From a) {
        uint2 b;
        b.x = Half::narrow(a.x) | Half::narrow(a.y) << 16;
        b.y = Half::narrow(a.z) | Half::narrow(a.w) << 16;
        return b;
    }
};

template <class Half> struct Widen {
    typedef uint2 From;
    typedef uint4 Into;
    static __device__ inline From load(const From *from) { return __ldcs(from); }
    static __device__ inline Into convert(From a) {
        uint4 b;
        b.x = Half::widen(a.x & 0xffff);
        b.y = Half::widen(a.x >> 16);
        b.z = Half::widen(a.y & 0xffff);
        b.w = Half::widen(a.y >> 16);
        return b;
    }
};

// ---- Tiles ----

// Divides a number below 2^31 by what `factor` and `shift` stand for.
__device__ inline u32 divide(u32 number, u32 factor, u32 shift) {
    return (u32)((u64)number * factor >> shift);
}

// Offsets of a run from the first one.
struct Offsets {
    u64 source;
    u64 target;
};

__device__ inline Offsets offsets(const Entry &entry, u32 run) {
    Offsets at;
    u32 outside = divide(run, entry.by_inner, entry.shifts >> 8 & 255);
    u32 inner = run - outside * entry.inner;
    u32 outer = divide(outside, entry.by_middle, entry.shifts >> 16 & 255);
    u32 middle = outside - outer * entry.middle;
    at.source = inner * entry.source_stride[0] + middle * entry.source_stride[1] +
                outer * entry.source_stride[2];
    at.target = inner * entry.target_stride[0] + middle * entry.target_stride[1] +
                outer * entry.target_stride[2];
    return at;
}

// The part of an entry that a tile is.
struct Tile {
    u64 skip;  // units of the run before it
    u32 run;   // the first run
    u32 rows;  // runs
    u32 width; // units of each
};

__device__ inline Tile tile_of(const Entry &entry, u32 number) {
    Tile tile;
    if (entry.pieces > 1) {
        tile.run = number / entry.pieces;
        tile.skip = (u64)(number - tile.run * entry.pieces) * entry.piece;
        u64 left = entry.run - tile.skip;
        tile.rows = 1;
        tile.width = left < entry.piece ? (u32)left : entry.piece;
    } else {
        u32 left;
        tile.run = number * entry.rows;
        tile.skip = 0;
        left = entry.runs - tile.run;
        tile.rows = left < entry.rows ? left : entry.rows;
        tile.width = entry.piece;
    }
    return tile;
}

// Units that follow each other in memory.
struct Line {
    u64 source;
    u64 target;

    __device__ inline Line(const Entry &entry, const Tile &tile, u32 source_unit, u32 target_unit) {
        Offsets at = offsets(entry, tile.run);
        source = entry.source + at.source + tile.skip * source_unit;
        target = entry.target + at.target + tile.skip * target_unit;
    }

    __device__ inline Offsets place(u32 unit, u32 source_unit, u32 target_unit) const {
        Offsets at;
        at.source = source + unit * source_unit;
        at.target = target + unit * target_unit;
        return at;
    }
};

// Units of several runs.
struct Rows {
    const Entry &entry;
    u32 run;

    __device__ inline Rows(const Entry &of, const Tile &tile, u32, u32) : entry(of), run(tile.run) {}

    __device__ inline Offsets place(u32 unit, u32 source_unit, u32 target_unit) const {
        u32 row = divide(unit, entry.by_piece, entry.shifts & 255);
        u32 column = unit - row * entry.piece;
        Offsets at = offsets(entry, run + row);
        at.source += entry.source + column * source_unit;
        at.target += entry.target + column * target_unit;
        return at;
    }
};

template <class Op, class Where>
__device__ inline void units(const Entry &entry, const Tile &tile, u32 lane, u32 lanes) {
    typedef typename Op::From From;
    typedef typename Op::Into Into;
    Where where(entry, tile, sizeof(From), sizeof(Into));
    u32 total = tile.rows * tile.width;
    for (u32 base = lane; base < total; base += UNROLL * lanes) {
        From from[UNROLL];
        u64 into[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            // Behind the end, the last unit is loaded once more and not stored: loads without a branch overlap.
            u32 unit = base + i * lanes;
            Offsets at = where.place(unit < total ? unit : total - 1, sizeof(From), sizeof(Into));
            from[i] = Op::load((const From *)at.source);
            into[i] = at.target;
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            if (base + i * lanes < total) {
                __stcs((Into *)into[i], Op::convert(from[i]));
            }
        }
    }
}

template <class Op> __device__ inline void carry(const Entry &entry, u32 number, u32 lane, u32 lanes) {
    Tile tile = tile_of(entry, number);
    if (tile.rows == 1) {
        units<Op, Line>(entry, tile, lane, lanes);
    } else {
        units<Op, Rows>(entry, tile, lane, lanes);
    }
}

// ---- Elements one at a time ----

__device__ inline u32 bytes_of(u32 type) { return 0x421224 >> 4 * type & 15; }

__device__ inline u32 load_element(u64 address, u32 bytes, u32 aligned) {
    if (aligned) {
        return bytes == 4   ? __ldcs((const u32 *)address)
               : bytes == 2 ? __ldcs((const u16 *)address)
                            : __ldcs((const u8 *)address);
    }
    u32 bits = 0;
    for (u32 i = 0; i < bytes; i++) {
        bits |= (u32)__ldcs((const u8 *)address + i) << 8 * i;
    }
    return bits;
}

__device__ inline void store_element(u64 address, u32 bytes, u32 aligned, u32 bits) {
    if (aligned && bytes == 4) {
        __stcs((u32 *)address, bits);
    } else if (aligned && bytes == 2) {
        __stcs((u16 *)address, (u16)bits);
    } else {
        for (u32 i = 0; i < bytes; i++) {
            __stcs((u8 *)address + i, (u8)(bits >> 8 * i));
        }
    }
}

__device__ inline u32 widen(u32 type, u32 bits) {
    return type == TYPE_F32 ? bits : type == TYPE_BF16 ? Bf16::widen(bits) : F16::widen(bits);
}

__device__ inline u32 narrow(u32 type, u32 bits) {
    return type == TYPE_F32 ? bits : type == TYPE_BF16 ? Bf16::narrow(bits) : F16::narrow(bits);
}

__device__ inline u32 convert_element(u32 code, u32 element) {
    u32 map = CODE_MAP(code);
    u32 from = CODE_FROM(code);
    if (map == MAP_NONE || map == MAP_ZERO) {
        return element;
    }
    u32 bits = widen(from, element);
    if (map == MAP_ADD_ONE) {
        // Which NaN a sum gives is not defined; the one that came is.
        bits = is_nan(bits) ? bits : __float_as_uint(__uint_as_float(bits) + 1.0f);
        // Rounded to the source's type first.
        bits = widen(from, narrow(from, bits));
    } else if (map == MAP_NEG_EXP) {
        // `refit_translate::host` proves that an f64 exponential within one of its last places rounds to f32 as the
        // exact value does.
        float rounded = (float)exp((double)__uint_as_float(bits));
        bits = is_nan(bits) ? bits : __float_as_uint(rounded) ^ 0x80000000;
    }
    return narrow(CODE_INTO(code), bits);
}

__device__ inline void carry_elements(const Entry &entry, u32 number, u32 lane, u32 lanes) {
    Tile tile = tile_of(entry, number);
    u32 source_unit = bytes_of(CODE_FROM(entry.code));
    u32 target_unit = bytes_of(CODE_INTO(entry.code));
    u32 aligned = CODE_ALIGNED(entry.code);
    u64 source = entry.source + tile.skip * source_unit;
    u64 target = entry.target + tile.skip * target_unit;
    u32 total = tile.rows * tile.width;
    for (u32 base = lane; base < total; base += ELEMENTS_UNROLL * lanes) {
        u32 from[ELEMENTS_UNROLL];
        u64 into[ELEMENTS_UNROLL];
#pragma unroll
        for (u32 i = 0; i < ELEMENTS_UNROLL; i++) {
            u32 unit = base + i * lanes;
            unit = unit < total ? unit : total - 1;
            u32 row = tile.rows == 1 ? 0 : divide(unit, entry.by_piece, entry.shifts & 255);
            u32 column = unit - row * entry.piece;
            Offsets at = offsets(entry, tile.run + row);
            from[i] = 0;
            if (CODE_MAP(entry.code) != MAP_ZERO) {
                from[i] = load_element(source + at.source + column * source_unit, source_unit, aligned);
            }
            into[i] = target + at.target + column * target_unit;
        }
#pragma unroll
        for (u32 i = 0; i < ELEMENTS_UNROLL; i++) {
            if (base + i * lanes < total) {
                store_element(into[i], target_unit, aligned, convert_element(entry.code, from[i]));
            }
        }
    }
}

__device__ inline void carry_tile(const Entry &entry, u32 number, u32 lane, u32 lanes) {
    switch (entry.op) {
    case OP_COPY_16: return carry<Copy<uint4> >(entry, number, lane, lanes);
    case OP_COPY_8: return carry<Copy<uint2> >(entry, number, lane, lanes);
    case OP_COPY_4: return carry<Copy<u32> >(entry, number, lane, lanes);
    case OP_ZERO_16: return carry<Zero<uint4> >(entry, number, lane, lanes);
    case OP_F32_TO_BF16: return carry<Narrow<Bf16> >(entry, number, lane, lanes);
    case OP_F32_TO_F16: return carry<Narrow<F16> >(entry, number, lane, lanes);
    case OP_BF16_TO_F32: return carry<Widen<Bf16> >(entry, number, lane, lanes);
    case OP_F16_TO_F32: return carry<Widen<F16> >(entry, number, lane, lanes);
    default: return carry_elements(entry, number, lane, lanes);
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) refit_move(const __grid_constant__ Launch launch) {
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    u32 groups = gridDim.x * blockDim.x / launch.lanes;
    u32 lane = thread % launch.lanes;
    u32 exhausted = 0;
    for (u32 step = thread / launch.lanes; step < launch.steps; step += groups) {
        while (exhausted + 1 < launch.tables && launch.table[exhausted + 1].start <= step) {
            exhausted++;
        }
        u32 left = launch.tables - exhausted;
        u32 round = (step - launch.table[exhausted].start) / left;
        u32 turn = step - launch.table[exhausted].start - round * left;
        u32 tile = round + (exhausted ? launch.table[exhausted - 1].tiles : 0);
        const Table &table = launch.table[exhausted + turn];
        // A copy, in registers: stores could change the original for all the compiler knows.
        Entry entry = table.entries[table.owners[tile]];
        entry.source += table.base;
        carry_tile(entry, tile - entry.first, lane, launch.lanes);
    }
}
