"""Two processes over real NIXL. `REFIT_PYTHON_ROUNDS` runs the whole several times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from refit_rl import Target, errors, layouts

SCRIPT = Path(__file__).with_name("rank_process.py")
ROUNDS = int(os.environ.get("REFIT_PYTHON_ROUNDS", "1"))


class Process:
    """A rank, whose lines are JSON."""

    def __init__(self, *arguments: str) -> None:
        # A file: a pipe that nobody reads would stop the process once it is full.
        self.trouble = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.trouble,
            text=True,
        )

    def line(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"the process ended: {self.said()}"
        return json.loads(line)

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> dict:
        # Not `communicate`, which would pass over what `readline` has read ahead.
        last = self.line()
        self.process.stdin.close()
        assert self.process.wait(timeout=120) == 0, self.said()
        return last

    def said(self) -> str:
        self.trouble.seek(0)
        return self.trouble.read()


@contextmanager
def rank(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process.trouble.close()


def test_the_library_is_the_one_that_was_fetched(nixl: str) -> None:
    assert nixl.endswith("libnixl_capi.so") and Path(nixl).is_file()


@pytest.mark.parametrize("mode", ["staged", "direct"])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_two_processes_refit(nixl: str, tmp_path: Path, mode: str, number: int) -> None:
    store, steps = f"dir:{tmp_path}", 4
    with rank("source", store, str(steps), mode) as source, rank("target", store, str(steps), mode) as target:
        for version in range(1, steps + 1):
            assert source.line() == {"offers": version}
            assert target.line() == {"installed": version}
            source.go_on()
        came_to = target.end()
        assert source.end()["commits"] == steps
    # Every version was read once, and nothing beside it.
    assert came_to["wire_bytes"] == [512 * 384 * 4] * steps


def small(side: str) -> tuple[layouts.Layout, dict[str, np.ndarray]]:
    boxes = {
        name: ((512, 384), "float32", (0, at), (512, 192)) for name, at in (("left", 0), ("right", 192))
    }
    tensors = {name: np.zeros((512, 192), np.float32) for name in boxes}
    return layouts.shards(boxes, rank=0, side=side), tensors


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_trainer_that_dies_leaves_the_old_version(nixl: str, tmp_path: Path, number: int) -> None:
    store = f"dir:{tmp_path}"
    layout, live = small("target")
    with rank("source", store, "2", "staged") as source, Target(store, layout, live, model="m") as target:
        assert source.line() == {"offers": 1}
        target.refresh(1, timeout=60)
        before = {name: tensor.copy() for name, tensor in live.items()}
        source.process.send_signal(signal.SIGKILL)
        source.process.wait()
        with pytest.raises(errors.TimeoutError):
            target.refresh(2, timeout=1)
        assert target.version == 1
        for name, tensor in live.items():
            np.testing.assert_array_equal(tensor, before[name])


def test_nixl_that_is_missing_is_told_with_every_place(tmp_path: Path) -> None:
    script = """
import refit_rl
try:
    refit_rl.nixl_library()
except refit_rl.errors.NixlUnavailableError as error:
    assert isinstance(error, refit_rl.errors.TransportError)
    print(error)
"""
    nowhere = tmp_path / "libnixl_capi.so"
    nowhere.write_bytes(b"not a library")
    environment = os.environ | {"REFIT_NIXL_LIBRARY": str(nowhere)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(nowhere) in done.stdout and "REFIT_NIXL_LIBRARY" in done.stdout


def test_an_installed_wheel_is_found(tmp_path: Path, nixl: str) -> None:
    """As pip lays `nixl-cu12` out, in a folder of its own, with the variable unset."""
    folder = tmp_path / ".nixl_cu12.mesonpy.libs"
    folder.symlink_to(Path(nixl).parent)
    info = tmp_path / "nixl_cu12-1.5.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nixl-cu12\nVersion: 1.5.1\n")
    environment = {name: value for name, value in os.environ.items() if name != "REFIT_NIXL_LIBRARY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    script = "import refit_rl._nixl as n, refit_rl; print(n.candidates()[0]); print(refit_rl.nixl_library())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(folder)
