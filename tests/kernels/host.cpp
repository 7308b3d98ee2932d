// Runs the kernel on the host, thread after thread.

#include "shim.hpp"

#include "move.cu"

extern "C" void run_launch(const Launch *launch, unsigned int blocks, unsigned int threads, Watch *report) {
    watch = *report;
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {
            refit_move(*launch);
        }
    }
    *report = watch;
}

// Where the fields of what the host encodes are, in the order of their declarations, each followed by the size.
extern "C" const std::size_t LAYOUT[] = {
    offsetof(Entry, source),
    offsetof(Entry, target),
    offsetof(Entry, source_stride),
    offsetof(Entry, target_stride),
    offsetof(Entry, run),
    offsetof(Entry, piece),
    offsetof(Entry, pieces),
    offsetof(Entry, rows),
    offsetof(Entry, runs),
    offsetof(Entry, first),
    offsetof(Entry, op),
    offsetof(Entry, code),
    offsetof(Entry, inner),
    offsetof(Entry, middle),
    offsetof(Entry, by_piece),
    offsetof(Entry, by_inner),
    offsetof(Entry, by_middle),
    offsetof(Entry, shifts),
    offsetof(Entry, reserved),
    sizeof(Entry),
    offsetof(Table, entries),
    offsetof(Table, owners),
    offsetof(Table, base),
    offsetof(Table, tiles),
    offsetof(Table, start),
    sizeof(Table),
    offsetof(Launch, tables),
    offsetof(Launch, steps),
    offsetof(Launch, lanes),
    offsetof(Launch, reserved),
    offsetof(Launch, table),
    sizeof(Launch),
};

static_assert(sizeof(LAYOUT) / sizeof(LAYOUT[0]) == 32, "the test reads so many");
