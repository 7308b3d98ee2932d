"""A rank as a process of its own that does what it is told, for tests: `ordered_rank.py source|target STORE OPTIONS`.

`OPTIONS` and every order are objects of JSON, an order a line; each is answered by a line. A source writes version `v` as the
numbers from `v * 1000` on; what a target answers says whether it holds exactly that of the version that it calls live.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from refit_rl import Source, Target, errors, layouts

ROWS, COLS = 512, 384
BYTES = ROWS * COLS * 4


def expected(version: int) -> np.ndarray:
    return (np.arange(ROWS * COLS, dtype=np.float32) + version * 1000).reshape(ROWS, COLS)


def layout(side: str) -> layouts.Layout:
    return layouts.shards({"w": ((ROWS, COLS), "float32", (0, 0), (ROWS, COLS))}, rank=0, side=side)


class Ordered:
    """One rank, and its orders by name."""

    def __init__(self, side: str, store: str, options: dict[str, Any]) -> None:
        self.held = np.full((ROWS, COLS), np.nan, np.float32)
        make = Source if side == "source" else Target
        self.rank: Any = make(store, layout(side), {"w": self.held}, model="m", **options)

    def begin(self) -> dict[str, Any]:
        return {"begun": self.rank.begin_update(timeout=60)}

    def commit(self, version: int, timeout: float = 60.0) -> dict[str, Any]:
        with self.rank.updating(version, timeout=timeout):
            self.held[...] = expected(version)
        return {"offers": self.rank.version}

    def refresh(self, version: int, timeout: float = 60.0) -> dict[str, Any]:
        report = self.rank.refresh(version, timeout=timeout)
        return {**report, **self.look()}

    def look(self) -> dict[str, Any]:
        live = self.rank.version
        whole = live is not None and np.array_equal(self.held, expected(live))
        return {"live": live, "whole": whole, "serving": self.rank.serving()}

    def stats(self) -> dict[str, Any]:
        return self.rank.stats()

    def close(self) -> dict[str, Any]:
        return {"closed": self.rank.close()}


def main() -> None:
    side, store, options = sys.argv[1:]
    rank = Ordered(side, store, json.loads(options))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(rank, order.pop("do"))(**order)
        except errors.RefitError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
