"""Times ModelExpress's `plan_transfer` on layouts of ours.

    python model_express.py FOLDER

FOLDER is what `refit bench-plan --preset llama-70b-8to4 --layouts FOLDER` wrote, or that of another preset. The planner
is given what its capture and its rendezvous would have found: a copy for every band of the first target rank, a
published shard for every box of a tensor that source ranks hold, once, as it keeps them. It plans one target rank.
"""

import sys
import time

from modelexpress.refit.reshard.slice_plan import Shard
from modelexpress.refit.reshard.transfer_plan import SourceInfo, plan_transfer
from modelexpress.refit.reshard.types import CaptureResult, RecordedCopy

from layouts import Side, peak_megabytes, sides

SIZES = {"Bf16": 2, "F32": 4}


def box(band: dict, tensor: dict) -> tuple[tuple, tuple]:
    """First element and shape; vectors have one dimension."""
    start = (band["rows"]["start"], band["cols"]["start"])
    shape = (band["rows"]["end"] - start[0], band["cols"]["end"] - start[1])
    dims = 2 if tensor["cols"] > 1 else 1
    return start[:dims], shape[:dims]


def bands(layout: dict):
    for param in layout["params"]:
        for band in param["bands"]:
            tensor = layout["tensors"][band["tensor"]]
            dims = 2 if tensor["cols"] > 1 else 1
            yield param, band, tensor, (tensor["rows"], tensor["cols"])[:dims]


def published(side: Side) -> dict[str, SourceInfo]:
    sources, known = {}, set()
    for rank, layout in enumerate(side.layouts):
        base = 0
        for param, band, tensor, shape in bands(layout):
            name, size = tensor["name"], SIZES[param["dtype"]]
            start, extent = box(band, tensor)
            if (name, start, extent) in known:
                continue
            known.add((name, start, extent))
            # Its shards are contiguous: bands as wide as their parameter, in consecutive rows.
            assert band["row_step"] == 1 and param["cols"] == (extent[1:] or (1,))[0], name
            address = base + band["at_row"] * param["cols"] * size
            base += 1 << 32
            source = sources.setdefault(name, SourceInfo(shape, param["dtype"], size, []))
            source.shards.append(Shard(start, extent, f"rank-{rank}", address, size))
    return sources


def captured(layout: dict) -> CaptureResult:
    copies = []
    for param, band, tensor, _ in bands(layout):
        start, extent = box(band, tensor)
        narrow = tuple(
            ("narrow", (dim, at, length), ()) for dim, (at, length) in enumerate(zip(start, extent))
        )
        strides = (param["cols"], 1) if len(extent) == 2 else (1,)
        offset = band["at_row"] * param["cols"] + band["at_col"]
        copies.append(
            RecordedCopy(tensor["name"], narrow, param["name"], offset, extent, strides, param["dtype"])
        )
    return CaptureResult(copies=copies)


def main() -> None:
    source, target = sides(sys.argv[1])
    sources, capture = published(source), captured(target.layout(0))
    plan_transfer(CaptureResult(copies=capture.copies[:1]), sources)  # It imports torch when first used.
    before = peak_megabytes()
    started = time.perf_counter()
    plan = plan_transfer(capture, sources)
    planned = time.perf_counter()
    assert not plan.fallback, plan.fallback
    print(
        f"{len(source.layouts)} -> {len(target.layouts)} layouts, {len(capture.copies)} copies of one target rank: "
        f"{planned - started:.2f} s, {plan.descriptor_count()} descriptors ({plan.exact_descriptor_count} before "
        f"bounding), {plan.bytes_planned() / 1e9:.2f} GB, peak {peak_megabytes()} MB ({before} MB of it before planning)"
    )


if __name__ == "__main__":
    main()
