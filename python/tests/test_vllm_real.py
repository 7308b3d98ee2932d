"""The backend in real vLLM engines on a CPU. Skipped, and counted as skipped, where vLLM is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

DRIVER = Path(__file__).parent / "vllm_engine.py"
#: Starting an engine takes minutes where two cores are shared.
PATIENCE = 900

#: vLLM and transformers round differently, and of two tokens that are closer than three units in the last place of bf16's largest
#: logit either may be chosen. What follows is another sequence, so comparing ends there; so many tokens have to be left.
CLOSE, LEAST = 3 * 2.0**-8, 4


def agreeing(tokens: list[list[int]], reference: list[list[tuple[int, float]]]) -> int:
    """How many tokens were compared, and equal."""
    compared = 0
    for said, wanted in zip(tokens, reference, strict=True):
        for token, (best, margin) in zip(said, wanted, strict=True):
            if margin < CLOSE:
                break
            assert token == best, (tokens, reference)
            compared += 1
    return compared


def engine(tmp_path: Path, model: str, tp: int) -> dict[str, Any]:
    out = tmp_path / "out.json"
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        # The driver sends functions of its own to workers.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    done = subprocess.run(
        [sys.executable, str(DRIVER), model, str(tp), str(tmp_path)],
        env=env,
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    ("model", "tp"), [("qwen3", 1), ("qwen2.5", 2), ("qwen3-moe", 1), ("qwen3-moe", 2)]
)
def test_an_engine_says_what_transformers_says_behind_every_update(tmp_path: Path, model: str, tp: int) -> None:
    found = engine(tmp_path, model, tp)
    for version in ("0", "1", "2"):
        assert agreeing(found["tokens"][version], found["reference"][version]) >= LEAST
    assert found["tokens"]["1"] != found["tokens"]["2"] != found["tokens"]["0"]
    assert found["weight_version"] == "2"
    assert found["captured_equals_builtin"] == [True] * tp
    # Errors left the engine as it was.
    assert found["tokens"]["after errors"] == found["tokens"]["2"]
    if tp > 1:
        return
    # What a person would do wrong, and what is said.
    said = found["said"]
    assert "version 2 was asked for, and 2 is live" in said["stale"]
    assert "no group offers one" in said["not ready"]
    assert "no group offers one" in said["other name"]
    assert "the sides hold different models" in said["other model"]
    assert "nothing was received" in said["unreceived"]
    assert "init_weight_transfer_engine first" in said["uninitialised"]
    assert "no_such_option" in said["option"]
    assert "enable_prefix_caching=False" in said["prefix cache"]
