"""NCCL: exact send and receive of the slices that each engine rank needs.

The best that can be had from NCCL: no byte is sent twice. Slices that are contiguous on a side are sent from, or
received, where they are; the others are packed and put in their places, a gigabyte at a time, so that packing one
part overlaps with sending the one before.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from common import BYTES, Side, World, buckets, distributed, main, measured
from shapes import parameters

METHOD = "nccl_p2p"


@dataclass
class Part:
    """What one process does for some of the parameters."""

    pack: list = field(default_factory=list)
    operations: list = field(default_factory=list)
    local: list = field(default_factory=list)
    unpack: list = field(default_factory=list)

    def start(self):
        for scratch, view in self.pack:
            scratch.copy_(view)
        works = dist.batch_isend_irecv(self.operations) if self.operations else []
        for into, view in self.local:
            into.copy_(view)
        return works

    def finish(self, works):
        for work in works:
            work.wait()
        for into, scratch in self.unpack:
            into.copy_(scratch)


def measure(world: World, model, pair) -> list[float]:
    gpu = world.gpu
    source_rank, target_rank = pair.source_rank(gpu), pair.target_rank(gpu)
    source = None if source_rank is None else Side(pair, model, source_rank, True, world.device)
    target = None if target_rank is None else Side(pair, model, target_rank, False, world.device)
    all_parameters = parameters(model)

    def part(indices: list[int]) -> Part:
        # In one order on both sides: operations between two processes match by their order.
        found = Part()
        for index in indices:
            for sender in range(pair.source_tp):
                for receiver in range(pair.target_tp):
                    pieces = all_parameters[index].pieces(sender, pair.source_tp, receiver, pair.target_tp)
                    for piece in pieces:
                        add(found, index, sender, receiver, piece)
        return found

    def scratch(piece) -> torch.Tensor:
        return torch.empty(piece.shape, dtype=torch.bfloat16, device=world.device)

    def add(found: Part, index: int, sender: int, receiver: int, piece):
        from_gpu, to_gpu = pair.source_gpu(sender), pair.target_gpu(receiver)
        if from_gpu == to_gpu:
            if from_gpu == gpu:
                found.local.append((target.target_view(index, piece), source.source_view(index, piece)))
        elif from_gpu == gpu:
            view = source.source_view(index, piece)
            if not view.is_contiguous():
                packed = scratch(piece)
                found.pack.append((packed, view))
                view = packed
            found.operations.append(dist.P2POp(dist.isend, view, to_gpu))
        elif to_gpu == gpu:
            view = target.target_view(index, piece)
            if not view.is_contiguous():
                packed = scratch(piece)
                found.unpack.append((view, packed))
                view = packed
            found.operations.append(dist.P2POp(dist.irecv, view, from_gpu))

    def size(parameter) -> int:
        rows, cols = parameter.source_shape(pair.source_tp)
        return BYTES * rows * cols

    parts = [part(group) for group in buckets(model, size, world.args.bucket_bytes)]

    def step():
        before = None
        for part in parts:
            works = part.start()
            if before:
                before[0].finish(before[1])
            before = (part, works)
        before[0].finish(before[1])

    return measured(world.args, [side for side in (source, target) if side], step, world.agree)


def run(args, deadline: float) -> dict:
    return distributed(args, METHOD, measure, deadline)


if __name__ == "__main__":
    main(__doc__, run)
