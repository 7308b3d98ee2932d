"""Publishers of torch tensors. torch itself is not among what the package is tested with by default: these tests say so where it
is missing, and `REFIT_REQUIRE_TORCH=1` makes that a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import refit_rl.torch
from refit_rl import Target, errors, layouts

try:
    import torch
except ImportError:
    if os.environ.get("REFIT_REQUIRE_TORCH") == "1":
        raise
    pytest.skip("torch is not installed", allow_module_level=True)

SCRIPT = Path(__file__).with_name("torch_ranks.py")


def test_plain_modules_are_whole_tensors(store: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2, bias=False)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    live = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    layout = layouts.shards(
        {name: (value.shape, value.dtype, (0,) * value.dim(), value.shape) for name, value in live.items()},
        rank=0,
        side="target",
    )
    with refit_rl.torch.Publisher(store, module.named_parameters(), model="m") as publisher:
        with Target(store, layout, live, model="m") as target:
            for version in (1, 2):
                with publisher.updating(version):
                    module(torch.ones(3, 6, dtype=torch.bfloat16)).sum().backward()
                    optimizer.step()
                assert target.refresh(version)["version"] == publisher.version == version
                for name, value in module.state_dict().items():
                    assert torch.equal(live[name], value), name
    assert publisher.layout.spec("0.weight") == ("BF16", 4, 6)


def test_names_are_those_of_the_checkpoint(store: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    given = {"_orig_mod.a._fsdp_wrapped_module.w": weight, "tied": weight, "b": torch.nn.Parameter(torch.ones(3))}
    boxes, tensors = refit_rl.torch.shards(given)
    assert list(boxes) == ["a.w", "b"] and tensors["a.w"].data_ptr() == weight.data_ptr()
    boxes, _ = refit_rl.torch.shards(given, lambda name: None if name == "tied" else "x." + name[-1])
    assert list(boxes) == ["x.w", "x.b"]
    with pytest.raises(errors.LayoutError, match="two parameters are called `x`"):
        refit_rl.torch.shards(given, lambda _: "x")


def test_a_parameter_that_is_not_contiguous_is_named(store: str) -> None:
    with pytest.raises(errors.TensorError, match="not contiguous") as caught:
        refit_rl.torch.Publisher(store, {"w": torch.ones(4, 6).t()}, model="m")
    assert caught.value.tensors == ("w",)


def expected(name: str, shape: tuple[int, ...], version: int) -> np.ndarray:
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.float32) + 1000 * version + len(name)).reshape(shape)


@contextmanager
def trainer(store: str, kind: str, init: Path) -> Iterator[list[subprocess.Popen]]:
    """Four processes of `torch.distributed` over gloo, each with its shards. They go on when they get a line."""
    arguments = [sys.executable, str(SCRIPT), store, kind, str(init)]
    ranks = [
        subprocess.Popen([*arguments, str(rank)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        yield ranks
        for rank in ranks:
            _, trouble = rank.communicate(timeout=120)
            assert rank.returncode == 0, trouble
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def refresh(target: Target, version: int, ranks: list[subprocess.Popen]) -> dict:
    try:
        return target.refresh(version, timeout=240)
    except errors.TimeoutError:
        ended = [rank.communicate(timeout=1)[1] for rank in ranks if rank.poll() is not None]
        raise AssertionError(f"ranks have ended: {ended}") from None


def go_on(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()


def whole(shapes: dict[str, tuple[int, ...]]) -> tuple[layouts.Layout, dict[str, np.ndarray]]:
    boxes = {name: (shape, "float32", (0,) * len(shape), shape) for name, shape in shapes.items()}
    live = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    return layouts.shards(boxes, rank=0, side="target"), live


@pytest.mark.parametrize("mesh", ["fsdp", "tensor", "fsdp-and-tensor", "replicas"])
def test_ranks_of_dtensors_reach_one_engine(nixl: str, tmp_path: Path, mesh: str) -> None:
    shapes = {"even": (8, 6), "uneven": (7, 5), "small": (2, 3), "vector": (10,), "cube": (5, 4, 3)}
    layout, live = whole(shapes)
    store = f"dir:{tmp_path / 'store'}"
    with trainer(store, mesh, tmp_path / "init") as ranks, Target(store, layout, live, model="m") as target:
        for version in (1, 2):
            report = refresh(target, version, ranks)
            for name, shape in shapes.items():
                np.testing.assert_array_equal(live[name], expected(name, shape, version), err_msg=name)
            assert report["wire_bytes"] == sum(value.nbytes for value in live.values())
            go_on(ranks)


def test_an_optimizer_of_fsdp2_reaches_one_engine(nixl: str, tmp_path: Path) -> None:
    layout, live = whole({"0.weight": (7, 6), "0.bias": (7,), "1.weight": (3, 7), "1.bias": (3,)})
    store, init = f"dir:{tmp_path / 'store'}", tmp_path / "init"
    with trainer(store, "fsdp2", init) as ranks, Target(store, layout, live, model="m") as target:
        before = None
        for version in (1, 2):
            refresh(target, version, ranks)
            gathered = torch.load(f"{init}.{version}")
            for name, value in gathered.items():
                np.testing.assert_array_equal(live[name], value.numpy(), err_msg=name)
            assert before is None or not np.array_equal(before, live["0.weight"])
            before = live["0.weight"].copy()
            go_on(ranks)
