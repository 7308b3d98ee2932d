"""`python -m refit_rl.bench`: refits tensors of your own shapes between processes of this host, over NIXL, and prints how that
compares with one `memcpy` of the same bytes. In host memory; `refit bench` of the command measures GPUs too."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import layouts
from ._core import Source, Target
from .errors import RefitError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["main"]

Shapes = dict[str, tuple[int, ...]]

#: What is refitted where nobody gives shapes: 256 MiB in bf16, as the layers of a small model have them.
DEFAULT = {
    f"layers.{layer}.{name}": shape
    for layer in range(4)
    for name, shape in (
        ("qkv", (3072, 2048)),
        ("o", (2048, 2048)),
        ("gate_up", (8192, 2048)),
        ("down", (2048, 3072)),
        ("norm", (2048,)),
    )
}

#: How numpy holds elements of these types, of which it knows no name for some.
RAW = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}

#: What each step may take.
TIMEOUT = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        shapes = _shapes(options)
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if any(shape and shape[0] < options.sources for shape in shapes.values()):
        print(f"bench: a tensor has fewer rows than there are {options.sources} --sources", file=sys.stderr)
        return 2
    if importlib.util.find_spec("numpy") is None:
        print("bench: its tensors are numpy's: pip install numpy", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="refit-bench-") as folder:
        try:
            figures = _run(f"dir:{folder}", shapes, options)
        except RefitError as error:
            print(f"bench: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    print(_table(shapes, figures, options))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refit_rl.bench", description=__doc__)
    parser.add_argument(
        "--tensor",
        action="append",
        default=[],
        metavar="NAME=4096x1024",
        help="a tensor; may be given several times (default: 256 MiB in 20 tensors)",
    )
    parser.add_argument("--shapes", type=Path, metavar="FILE", help='shapes as JSON: {"name": [4096, 1024], ..}')
    parser.add_argument("--dtype", choices=sorted(RAW), default="bfloat16", help="of all tensors (default: %(default)s)")
    parser.add_argument(
        "--sources", type=_positive, default=1, metavar="N", help="trainer ranks, which share out the rows (default: 1)"
    )
    parser.add_argument("--steps", type=_positive, default=5, metavar="N", help="versions (default: %(default)s)")
    parser.add_argument("--mode", choices=("staged", "direct"), default="direct", help="of the target (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON, too")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _shapes(options: argparse.Namespace) -> Shapes:
    shapes: Shapes = {}
    if options.shapes:
        given = json.loads(options.shapes.read_text())
        if not isinstance(given, dict):
            raise ValueError(f"{options.shapes} is no object of names and shapes")
        shapes |= {name: tuple(int(extent) for extent in shape) for name, shape in given.items()}
    for tensor in options.tensor:
        name, _, shape = tensor.rpartition("=")
        shapes[name or f"tensor.{len(shapes)}"] = tuple(int(extent) for extent in shape.split("x"))
    if any(extent < 1 for shape in shapes.values() for extent in shape):
        raise ValueError("a tensor has no elements")
    return shapes or dict(DEFAULT)


def _box(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and extents of a rank's rows."""
    if not shape:
        return (), ()
    start, stop = shape[0] * rank // ranks, shape[0] * (rank + 1) // ranks
    return (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])


def _fill(tensor: np.ndarray, version: int, salt: int) -> None:
    """Bytes that tell versions and tensors apart."""
    tensor.view("uint8").reshape(-1)[...] = (version * 31 + salt * 7) % 251


def _source(store: str, shapes: Shapes, dtype: str, rank: int, ranks: int, steps: int, pipe: Connection) -> None:
    with _telling(pipe):
        import numpy as np

        boxes = {name: _box(shape, rank, ranks) for name, shape in shapes.items()}
        held = {name: np.zeros(local, RAW[dtype]) for name, (_, local) in boxes.items()}
        layout = layouts.shards(
            {name: (shapes[name], dtype, offsets, local) for name, (offsets, local) in boxes.items()}, rank=rank
        )
        with Source(store, layout, held, model="bench", ranks=ranks) as source:
            for version in range(1, steps + 1):
                with source.updating(version, timeout=TIMEOUT):
                    for salt, tensor in enumerate(held.values()):
                        _fill(tensor, version, salt)
                pipe.recv()
        pipe.send(None)


def _target(store: str, shapes: Shapes, dtype: str, mode: Any, steps: int, pipe: Connection) -> None:
    with _telling(pipe):
        import numpy as np

        live = {name: np.zeros(shape, RAW[dtype]) for name, shape in shapes.items()}
        layout = layouts.shards(
            {name: (shape, dtype, (0,) * len(shape), shape) for name, shape in shapes.items()}, rank=0, side="target"
        )
        memcpy = _memcpy(live)
        with Target(store, layout, live, model="bench", mode=mode, lease=TIMEOUT, attempt=TIMEOUT) as target:
            for version in range(1, steps + 1):
                offer = target.wait_for(version, timeout=TIMEOUT)
                report: Any = target.refresh(version, timeout=TIMEOUT)
                expected = np.zeros(1, "uint8")
                for salt, (name, tensor) in enumerate(live.items()):
                    _fill(expected, version, salt)
                    if not (tensor.view("uint8") == expected[0]).all():
                        raise RefitError(f"`{name}` of version {version}, offered as {offer}, is not what was sent", [name])
                pipe.send(report)
        pipe.send(memcpy)


def _memcpy(live: dict[str, np.ndarray]) -> float:
    """Seconds for one copy of all tensors on one thread, the best of three, into memory that was written before."""
    import numpy as np

    copies = [np.ones_like(tensor) for tensor in live.values()]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for copy, tensor in zip(copies, live.values(), strict=True):
            np.copyto(copy, tensor)
        best = min(best, time.perf_counter() - began)
    return best


class _telling:
    """Sends what is raised to the other end, as the last thing."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        told = error if isinstance(error, RefitError) else RefitError(f"{type(error).__name__}: {error}")
        self.pipe.send(told)
        return True


def _run(store: str, shapes: Shapes, options: argparse.Namespace) -> dict[str, Any]:
    # Not forked: NIXL's threads would not be in the child.
    context = multiprocessing.get_context("spawn")
    processes: list[multiprocessing.process.BaseProcess] = []
    pipes: list[Connection] = []

    def start(function: Any, *arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
        return ours

    common = (store, shapes, options.dtype)
    try:
        sources = [
            start(_source, *common, rank, options.sources, options.steps) for rank in range(options.sources)
        ]
        target = start(_target, *common, options.mode, options.steps)
        reports = []
        for _ in range(options.steps):
            reports.append(_receive(target, pipes))
            for source in sources:
                source.send(None)
        memcpy = _receive(target, pipes)
        return {"bytes": reports[0]["bytes"], "memcpy_seconds": memcpy, "steps": reports}
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _receive(wanted: Connection, pipes: list[Connection]) -> Any:
    """The next of one process, unless one of them fails first."""
    from multiprocessing.connection import wait

    while True:
        ready = wait(pipes)
        for pipe in [pipe for pipe in pipes if pipe in ready]:
            try:
                received = pipe.recv()
            except EOFError:
                raise RefitError("a process of the bench ended; what it said is above") from None
            if isinstance(received, RefitError):
                raise received
            if received is None:
                # A source that has done all it had to: that it ends now is no failure.
                pipes.remove(pipe)
            if pipe is wanted:
                return received


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield ("step", "total", "wire", "landing", "planning", "set-up", "GB/s", "of memcpy")
    for report in figures["steps"]:
        seconds = report["seconds"]
        moving = seconds["wire_transfer"] + seconds["transformation"]
        rate = figures["bytes"] / moving / 1e9 if moving else float("nan")
        copy = figures["bytes"] / figures["memcpy_seconds"] / 1e9
        stages = ("total", "wire_transfer", "transformation", "transfer_planning", "setup_registration")
        times = [f"{seconds[stage] * 1e3:.1f} ms" for stage in stages]
        yield (str(report["version"]), *times, f"{rate:.2f}", f"{rate / copy:.2f} x")


def _table(shapes: Shapes, figures: dict[str, Any], options: argparse.Namespace) -> str:
    rows = list(_rows(figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    copy = figures["bytes"] / figures["memcpy_seconds"] / 1e9
    head = (
        f"{len(shapes)} tensors of {options.dtype}, {figures['bytes'] / 2**20:.1f} MiB, {options.sources} trainer "
        f"rank(s) -> 1 engine rank, {options.mode}, over NIXL; every byte compared\n"
        f"one memcpy of them takes {figures['memcpy_seconds'] * 1e3:.1f} ms ({copy:.2f} GB/s); GB/s counts wire and landing\n"
    )
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return head + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
