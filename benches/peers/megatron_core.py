"""Times Megatron-Core's resharding planner (`megatron.core.resharding`) on layouts of ours.

    python megatron_core.py FOLDER

FOLDER is what `refit bench-plan --preset kimi-k2-256x128 --layouts FOLDER` wrote. The planner is given what its
collective would have gathered, the metadata of every parameter of every rank, with targets as ranks of their own. It
plans one target rank, as each rank of a job does; that it walks through the schedule of all target ranks for this is
its own doing.
"""

import sys
import time

import torch
from megatron.core.resharding.planner import build_plan_from_rosters, index_metadata_rosters
from megatron.core.resharding.utils import ParameterMetadata, assign_ep_resolved_name_inplace

from layouts import Side, peak_megabytes, sides

TYPES = {"Bf16": torch.bfloat16, "F32": torch.float32}


def groups(side: Side, rank: int, first: int) -> dict:
    """The parallel groups of one rank, as lists of global ranks; `first` is the side's first global rank."""
    tp_start, ep_start = rank // side.tp * side.tp, rank // side.ep * side.ep
    return {
        "tp": [first + r for r in range(tp_start, tp_start + side.tp)],
        "ep": [first + r for r in range(ep_start, ep_start + side.ep)],
        "dp": [first + r for r in range(rank % side.tp, side.ranks, side.tp)],
        "pp": [first + rank],
    }


def metadata(side: Side, rank: int, first: int, experts: int) -> list[ParameterMetadata]:
    layout, group = side.layout(rank), groups(side, rank, first)
    described = []
    for param in layout["params"]:
        band = param["bands"][0]
        tensor = layout["tensors"][band["tensor"]]
        by_rows = band["rows"]["end"] - band["rows"]["start"] < tensor["rows"]
        by_cols = band["cols"]["end"] - band["cols"]["start"] < tensor["cols"]
        is_expert = ".mlp.experts." in param["name"]
        dtype = TYPES[param["dtype"]]
        shape = (param["rows"], param["cols"]) if tensor["cols"] > 1 else (param["rows"],)
        meta = ParameterMetadata(
            name=param["name"],
            shape=shape,
            dtype=dtype,
            element_size=dtype.itemsize,
            is_tp=by_rows or by_cols,
            partition_dim=0 if by_rows or not by_cols else 1,
            # A gate above an up projection is sharded in two strides.
            partition_stride=len(param["bands"]) if by_rows else 1,
            is_ep=is_expert,
            num_experts=experts,
            owner_rank=first + rank,
            tensor_parallel_group_ranks=[first + rank] if is_expert else group["tp"],
            expert_parallel_group_ranks=group["ep"] if is_expert else None,
            data_parallel_group_ranks=group["dp"],
            pipeline_parallel_group_ranks=group["pp"],
        )
        assign_ep_resolved_name_inplace(meta)
        described.append(meta)
    return described


def main() -> None:
    source, target = sides(sys.argv[1])
    names = [param["name"] for param in source.layout(0)["params"]]
    local = sum(name.startswith("decoder.layers.10.mlp.experts.linear_fc1.") for name in names)
    experts = local * source.ep
    gathered = [(metadata(source, rank, 0, experts), []) for rank in range(source.ranks)]
    gathered += [([], metadata(target, rank, source.ranks, experts)) for rank in range(target.ranks)]
    params = sum(len(wanted) for _, wanted in gathered)
    before = peak_megabytes()

    started = time.perf_counter()
    rosters = index_metadata_rosters(gathered)
    indexed = time.perf_counter()
    plan = build_plan_from_rosters(*rosters, source.ranks)
    planned = time.perf_counter()
    print(
        f"{source.ranks} -> {target.ranks} ranks, {params} target parameters: index {indexed - started:.2f} s, "
        f"one rank {planned - indexed:.2f} s, {len(plan.recv_ops)} transfers, "
        f"peak {peak_megabytes()} MB ({before} MB of it before planning)"
    )


if __name__ == "__main__":
    main()
