"""Tensors in the memory of a GPU. Where there is none these tests say so; `REFIT_REQUIRE_CUDA=1` makes that a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_memory import Driver, Tensor

from refit_rl import Source, Target, errors, layouts

SCRIPT = """
import sys
import numpy as np
from cuda_memory import Driver, Tensor
from refit_rl import Source, layouts
held = Tensor(Driver(), np.zeros((64, 32)))
layout = layouts.shards({"w": ((64, 32), "float32", (0, 0), (64, 32))}, rank=0)
with Source(sys.argv[1], layout, {"w": held}, model="m", transport=sys.argv[2]) as source:
    for version in (1, 2, 3):
        with source.updating(version, timeout=60):
            held.write(np.arange(2048).reshape(64, 32) + version)
        sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    try:
        yield Driver()
    except OSError as error:
        if os.environ.get("REFIT_REQUIRE_CUDA"):
            raise
        pytest.skip(f"no GPU: {error}")


def layout(side: str, rows: tuple[int, int] = (0, 64)) -> layouts.Layout:
    box = ((64, 32), "float32", (rows[0], 0), (rows[1] - rows[0], 32))
    return layouts.shards({"w": box}, rank=0, side=side)


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_a_gpu_reads_another_processs(driver: Driver, tmp_path: Path, mode: str) -> None:
    live = Tensor(driver, np.full((64, 32), np.nan))
    store = f"dir:{tmp_path}"
    command = [sys.executable, "-c", SCRIPT, store, "peer"]
    folder = Path(__file__).parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as source:
        try:
            with Target(store, layout("target"), {"w": live}, model="m", mode=mode, transport="peer") as target:
                for version in (1, 2, 3):
                    report = target.refresh(version, timeout=60)
                    np.testing.assert_array_equal(live.read(), np.arange(2048).reshape(64, 32) + version)
                    assert report["wire_bytes"] == 64 * 32 * 4
                    source.stdin.write("\n")
                    source.stdin.flush()
            _, trouble = source.communicate(timeout=60)
            assert source.returncode == 0, trouble
        finally:
            source.kill()


def test_the_host_and_a_gpu_are_two_places(driver: Driver, store: str) -> None:
    both = layouts.shards({name: ((4, 2), "float32", (0, 0), (4, 2)) for name in "ab"}, rank=0)
    tensors = {"a": Tensor(driver, np.zeros((4, 2))), "b": np.zeros((4, 2), np.float32)}
    with pytest.raises(errors.TensorError, match="all tensors of a rank are in one place"):
        Source(store, both, tensors, model="m")


def test_a_host_pointer_that_says_it_is_a_gpus_is_refused(driver: Driver, store: str) -> None:
    liar = Tensor(driver, np.zeros((64, 32)))
    host = np.zeros((64, 32), np.float32)
    liar.pointer.value = host.ctypes.data
    with pytest.raises(errors.TensorError) as caught:
        Source(store, layout("source"), {"w": liar}, model="m", transport="peer")
    assert caught.value.tensors == ("w",)
