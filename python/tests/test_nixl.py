"""Two processes over real NIXL. `REFIT_PYTHON_ROUNDS` runs the whole several times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ordered_rank import BYTES
from processes import ordered, running

from refit_rl import Target, errors, layouts

SCRIPT = "rank_process.py"
ROUNDS = int(os.environ.get("REFIT_PYTHON_ROUNDS", "1"))


def test_the_library_is_the_one_that_was_fetched(nixl: str) -> None:
    assert nixl.endswith("libnixl_capi.so") and Path(nixl).is_file()


@pytest.mark.parametrize("mode", ["staged", "direct"])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_two_processes_refit(nixl: str, tmp_path: Path, mode: str, number: int) -> None:
    store, steps = f"dir:{tmp_path}", 4
    arguments = (store, str(steps), mode)
    with running(SCRIPT, "source", *arguments) as source, running(SCRIPT, "target", *arguments) as target:
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
    with running(SCRIPT, "source", store, "2", "staged") as source, Target(store, layout, live, model="m") as target:
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


@pytest.mark.parametrize("mode", ["staged", "direct"])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_relay_serves_while_the_source_is_stopped(nixl: str, tmp_path: Path, mode: str, number: int) -> None:
    store = f"dir:{tmp_path}"
    with (
        ordered("source", store) as source,
        ordered("target", store, replica="relay", mode=mode, relay=True) as relay,
        ordered("target", store, replica="other", mode=mode) as other,
    ):
        for version in (1, 2):
            source.ask("commit", version=version)
            assert relay.ask("refresh", version=version)["group"] == "trainer"
            # Its process answers nobody now, and its version is on offer still: relays are read rather than a trainer.
            source.stop()
            report = other.ask("refresh", version=version)
            assert (report["group"], report["wire_bytes"], report["whole"]) == ("relay", BYTES, True), report
            source.resume()
        assert relay.ask("stats")["commits"] == 2
        assert relay.ask("close") == {"closed": None}
        source.ask("commit", version=3)
        assert other.ask("refresh", version=3)["group"] == "trainer"


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
