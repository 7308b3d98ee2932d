"""The loops in `examples`: they are what people begin from, so they run. Where Megatron-Core and vLLM are installed (`cargo xtask
e2e` runs this with them) they run as they are, for a few versions; elsewhere as far as they go without."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
NEEDS = ("megatron.core", "torch", "transformers", "vllm")
#: Starting an engine takes minutes where two cores are shared.
PATIENCE = 900
RUNNABLE = all(importlib.util.find_spec(name.partition(".")[0]) for name in NEEDS)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The package is the installed one, and not that of a folder that the caller names.
    given = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | given)


def test_they_are_found() -> None:
    assert NAMES == ["grpo_fsdp.py", "megatron_vllm.py"]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_how_they_are_run(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"examples/{name}" in done.stdout and "--steps" in done.stdout


@pytest.mark.skipif(not RUNNABLE, reason="Megatron-Core or vLLM is not installed: `cargo xtask e2e` runs this with them")
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("grpo_fsdp.py", r"version (\d+): mean reward ([\d.]+), refresh \d+ ms"),
        ("megatron_vllm.py", r"version (\d+): .*, (\d+) of 42 tokens as learned, refresh \d+ ms"),
    ],
)
def test_an_engine_says_what_was_learned(name: str, line: str) -> None:
    done = run(name, "--steps", "6")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    said = [(int(version), float(figure)) for version, figure in re.findall(line, done.stdout)]
    assert [version for version, _ in said] == [1, 2, 3, 4, 5, 6], done.stdout
    # Every version is better than the first one, which has learned nothing.
    assert said[-1][1] > said[0][1], said
