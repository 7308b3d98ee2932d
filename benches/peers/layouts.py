"""Reads what `refit bench-plan --layouts FOLDER` wrote."""

import json
import resource
from pathlib import Path


class Side:
    """One side of a job: any rank's layout, and the groups that its sizes make."""

    def __init__(self, folder: Path, name: str):
        sizes = json.loads((folder / "sides.json").read_text())[name]
        self.ranks, self.tp, self.ep = sizes["ranks"], sizes["tp"], sizes["ep"]
        self.layouts = [
            json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(sizes["layouts"])
        ]

    def layout(self, rank: int) -> dict:
        return self.layouts[rank % len(self.layouts)]


def sides(folder: str) -> tuple[Side, Side]:
    return Side(Path(folder), "source"), Side(Path(folder), "target")


def peak_megabytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
