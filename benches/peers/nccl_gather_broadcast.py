"""NCCL: all-gather every tensor over the trainer's TP, broadcast packed buckets, slice into fused parameters.

What most RL frameworks do. Buckets of 1 GiB, two of them, so that one is filled while the other is on the wire.
"""

import torch
import torch.distributed as dist

from common import BYTES, Side, World, buckets, distributed, main, measured, strided
from shapes import parameters

METHOD = "nccl_gather_broadcast"


def measure(world: World, model, pair) -> list[float]:
    gpu = world.gpu
    source_rank, target_rank = pair.source_rank(gpu), pair.target_rank(gpu)
    source = None if source_rank is None else Side(pair, model, source_rank, True, world.device)
    target = None if target_rank is None else Side(pair, model, target_rank, False, world.device)
    trainers = world.group(list(range(pair.source_tp))) if pair.source_tp > 1 else None
    receivers = world.group([0, *pair.target_gpus()])
    in_receivers = gpu == 0 or target is not None
    all_parameters = parameters(model)

    def whole(parameter) -> int:
        """Elements of a parameter in a bucket: the tensors of all trainer ranks, or one of those that are alike."""
        rows, cols = parameter.source_shape(pair.source_tp)
        return rows * cols * (1 if parameter.role == "same" else pair.source_tp)

    groups = buckets(model, lambda parameter: BYTES * whole(parameter), world.args.bucket_bytes)
    largest = max(sum(whole(all_parameters[index]) for index in group) for group in groups)

    def pair_of_buffers():
        return [torch.empty(largest, dtype=torch.bfloat16, device=world.device) for _ in range(2)]

    gathered = pair_of_buffers() if source else []
    # Trainer 0 sends what it gathered; everyone else receives into buffers of their own.
    received = gathered if gpu == 0 else pair_of_buffers() if target else []

    def places(group: list[int]):
        at = 0
        for index in group:
            yield index, at, whole(all_parameters[index])
            at += whole(all_parameters[index])

    def gather(group: list[int], into: torch.Tensor):
        for index, at, size in places(group):
            tensor = source.tensors[index].view(-1)
            if size == tensor.numel():
                into[at : at + size].copy_(tensor)
            else:
                dist.all_gather_into_tensor(into[at : at + size], tensor, group=trainers)

    def slice_into_place(group: list[int], bucket: torch.Tensor):
        for index, at, _ in places(group):
            parameter = all_parameters[index]
            rows, cols = parameter.source_shape(pair.source_tp)
            for rank in range(pair.source_tp):
                # Of what is alike everywhere, the bucket has one.
                start = at if parameter.role == "same" else at + rank * rows * cols
                for piece in parameter.pieces(rank, pair.source_tp, target.rank, pair.target_tp):
                    offset = start + piece.source_offset
                    view = strided(bucket, offset, piece.source_strides, piece.shape)
                    target.target_view(index, piece).copy_(view)

    def step():
        before = None
        for number, group in enumerate(groups):
            if source:
                gather(group, gathered[number % 2])
            work = None
            if in_receivers:
                size = sum(whole(all_parameters[index]) for index in group)
                bucket = received[number % 2]
                work = dist.broadcast(bucket[:size], src=0, group=receivers, async_op=True)
            # The bucket before this one: on the wire while this one was gathered.
            finish(before)
            before = (group, number, work)
        finish(before)

    def finish(sent):
        if sent is None or sent[2] is None:
            return
        group, number, work = sent
        work.wait()
        if target:
            slice_into_place(group, received[number % 2])

    return measured(world.args, [side for side in (source, target) if side], step, world.agree)


def run(args, deadline: float) -> dict:
    return distributed(args, METHOD, measure, deadline)


if __name__ == "__main__":
    main(__doc__, run)
