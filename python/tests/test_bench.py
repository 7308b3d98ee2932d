"""The bench runs, tells the truth and explains itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refit_rl.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_shapes_of_ones_own_are_refitted_and_compared(nixl: str, tmp_path: Path) -> None:
    shapes, figures = tmp_path / "shapes.json", tmp_path / "figures.json"
    shapes.write_text(json.dumps({"a": [64, 33], "b": [7]}))
    done = bench("--shapes", str(shapes), "--tensor", "c=5x4x3", "--sources", "2", "--steps", "2", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    head, _, columns, *steps = done.stdout.splitlines()
    assert head.startswith("3 tensors of bfloat16") and "of memcpy" in columns and len(steps) == 2
    told = json.loads(figures.read_text())
    assert told["bytes"] == 2 * (64 * 33 + 7 + 60) and told["memcpy_seconds"] > 0
    assert [step["version"] for step in told["steps"]] == [1, 2]
    assert all(step["wire_bytes"] == told["bytes"] for step in told["steps"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tensor", "a=0x4"], "no elements"),
        (["--tensor", "a=fourxfour"], "invalid literal"),
        (["--shapes", "no-such-file"], "no-such-file"),
        (["--tensor", "a=2x4", "--sources", "3"], "fewer rows"),
        (["--dtype", "int4"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], part: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2 and part in done.stderr


def test_help_says_what_it_does() -> None:
    done = bench("--help")
    assert done.returncode == 0 and "memcpy" in done.stdout and "--sources" in done.stdout
