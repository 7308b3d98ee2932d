"""A rank as a process of its own, for tests: `rank_process.py source|target STORE STEPS MODE`.

The source writes version `v` as the numbers from `v * 1000` on; the target compares every element. Each says in its last line
what it came to.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from refit_rl import Source, Target, layouts

ROWS, COLS = 512, 384


def expected(version: int) -> np.ndarray:
    return (np.arange(ROWS * COLS, dtype=np.float32) + version * 1000).reshape(ROWS, COLS)


def source(store: str, steps: int) -> dict:
    boxes = {
        "left": ((ROWS, COLS), "float32", (0, 0), (ROWS, COLS // 2)),
        "right": ((ROWS, COLS), "float32", (0, COLS // 2), (ROWS, COLS // 2)),
    }
    layout = layouts.shards(boxes, rank=0)
    held = {name: np.zeros(local, np.float32) for name, (_, _, _, local) in boxes.items()}
    with Source(store, layout, held, model="m") as there:
        for version in range(1, steps + 1):
            with there.updating(version, timeout=60):
                for name, (_, _, offsets, local) in boxes.items():
                    held[name][...] = expected(version)[:, offsets[1] : offsets[1] + local[1]]
            print(json.dumps({"offers": version}), flush=True)
            if sys.stdin.readline() == "":  # the test has gone
                break
        stats = there.stats()
    return {"commits": stats["commits"], "registrations": stats["registrations"]}


def target(store: str, steps: int, mode: str) -> dict:
    boxes = {
        name: ((ROWS, COLS), "float32", (0, at), (ROWS, COLS // 2)) for name, at in (("left", 0), ("right", COLS // 2))
    }
    layout = layouts.shards(boxes, rank=0, side="target")
    live = {name: np.full((ROWS, COLS // 2), np.nan, np.float32) for name in boxes}
    reads = []
    with Target(store, layout, live, model="m", mode=mode) as here:
        for version in range(1, steps + 1):
            report = here.refresh(version, timeout=60)
            if report["version"] != version:
                raise SystemExit(f"version {report['version']} was installed, {version} was on offer")
            for name, at in (("left", 0), ("right", COLS // 2)):
                np.testing.assert_array_equal(live[name], expected(version)[:, at : at + COLS // 2])
            reads.append(report["wire_bytes"])
            print(json.dumps({"installed": version}), flush=True)
    return {"wire_bytes": reads}


def main() -> None:
    side, store, steps, mode = sys.argv[1:]
    if side == "vanish":
        steps = "1"
    done = source(store, int(steps)) if side in ("source", "vanish") else target(store, int(steps), mode)
    print(json.dumps(done | {"pid": os.getpid(), "at": time.time()}), flush=True)


if __name__ == "__main__":
    main()
