"""Torch's own copies between GPUs that can map each other: `copy_` of every needed slice, in one process.

And the ceiling: one contiguous copy of 8 GiB.
"""

import statistics
import time
from contextlib import ExitStack

import torch

from common import Side, completed, device, free, jobs, main, measured, result, skipped

METHOD = "torch_peer_copy"
CEILING_BYTES = 8 << 30
# Copies of one receiver before the next one's: choosing streams costs as much time on the CPU as a copy does.
TURN = 16


def synchronize_all(args):
    if not args.cpu:
        for gpu in range(args.gpus):
            torch.cuda.synchronize(gpu)


def agree_alone(args):
    """There is one process; what it waits for are the GPUs."""

    def agree(times):
        synchronize_all(args)
        return 0.0 if times is None else time.perf_counter() - times[0]

    return agree


def streams_of(args, count: int):
    """For each receiver a stream on every GPU: a copy waits for the current streams of both its GPUs, so receivers
    that share streams would take turns.
    """
    if args.cpu:
        return [[] for _ in range(count)]
    return [[torch.cuda.Stream(gpu) for gpu in range(args.gpus)] for _ in range(count)]


def measure(args, model, pair) -> list[float]:
    sources = [Side(pair, model, rank, True, device(args, pair.source_gpu(rank))) for rank in range(pair.source_tp)]
    targets = [Side(pair, model, rank, False, device(args, pair.target_gpu(rank))) for rank in range(pair.target_tp)]
    copies = [
        [
            (target.target_view(p.index, piece), source.source_view(p.index, piece))
            for p in target.parameters
            for source in sources
            for piece in p.pieces(source.rank, pair.source_tp, target.rank, pair.target_tp)
        ]
        for target in targets
    ]
    streams = streams_of(args, len(targets))

    def step():
        # Some copies of each receiver in turn, so that all links are busy from the start.
        for start in range(0, max(map(len, copies)), TURN):
            for own, ours in zip(copies, streams):
                with current(ours):
                    for into, out in own[start : start + TURN]:
                        into.copy_(out, non_blocking=True)

    return measured(args, sources + targets, step, agree_alone(args))


def current(streams) -> ExitStack:
    """Makes each the current stream of its GPU."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        return stack.pop_all()


def ceilings(args) -> list[dict]:
    """One contiguous copy over a link, alone and with its opposite at the same time."""
    length = 1 << 20 if args.cpu else CEILING_BYTES
    if not args.cpu:
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in (0, 1))
        length = min(length, free // 4)
    buffers = {
        gpu: [torch.full((length,), gpu + at, dtype=torch.uint8, device=device(args, gpu)) for at in (0, 10)]
        for gpu in (0, 1)
    }
    streams = streams_of(args, 2)
    found = []
    for what, ways in (("one copy", [(0, 1)]), ("one copy each way at once", [(0, 1), (1, 0)])):
        seconds = []
        for _ in range(3 + args.cycles):
            synchronize_all(args)
            start = time.perf_counter()
            for ours, (out, into) in zip(streams, ways):
                with current(ours):
                    buffers[into][1].copy_(buffers[out][0], non_blocking=True)
            synchronize_all(args)
            seconds.append(time.perf_counter() - start)
        for out, into in ways:
            if not bool((buffers[into][1] == out).all()):
                raise RuntimeError(f"{what}: bytes are wrong on GPU {into}")
        seconds = seconds[3:]
        gbps = length / statistics.median(seconds) / 1e9
        found.append({"what": what, "bytes": length, "seconds": seconds, "gbps": gbps})
        for out, into in ways:
            buffers[into][1].fill_(into + 10)
    return found


def run(args, deadline: float) -> dict:
    found, why, ceiling = [], None, []
    try:
        ceiling = ceilings(args)
        free(args)
        for model, pair in jobs(args):
            problem = pair.problem(model)
            if problem is None and time.monotonic() > deadline:
                problem = f"the limit of {args.limit:g} s was reached"
            if problem is None:
                found.append(result(METHOD, model, pair, measure(args, model, pair)))
            else:
                found.append(skipped(METHOD, model.name, (pair.source_tp, pair.target_tp), problem))
            free(args)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        print(f"{METHOD}: {why}")
    return completed(args, METHOD, found, why) | {"ceilings": ceiling}


if __name__ == "__main__":
    main(__doc__, run)
