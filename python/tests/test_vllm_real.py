"""The backend in real vLLM engines, on a CPU or on what GPUs there are. Skipped, and counted as skipped, where vLLM is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

GPUS = torch.cuda.device_count()
on_a_cpu = pytest.mark.skipif(GPUS > 0, reason="kernels of the tests' own, for a CPU")
on_a_gpu = pytest.mark.skipif(GPUS == 0, reason="no GPU")

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


def engine(tmp_path: Path, model: str, tp: int, *quantization: str) -> dict[str, Any]:
    if 0 < GPUS < tp:
        pytest.skip(f"{tp} ranks need as many GPUs")
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
        [sys.executable, str(DRIVER), model, str(tp), str(tmp_path), *quantization],
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
    assert found["weight_version"] == ("2" if hasattr(vllm.LLM, "get_weight_version") else None)
    assert found["relayed"] == {"group": "engine", "differ": []}
    assert found["captured_equals_builtin"] == [True] * tp
    # Errors left the engine as it was.
    assert found["tokens"]["after errors"] == found["tokens"]["2"]
    if tp > 1:
        return
    # What a person would do wrong, what is raised, and what it says.
    for what, (error, text) in WRONG.items():
        said = found["said"][what]
        assert said.startswith(f"{error}: ") and text in said, said
    if model == "qwen3":
        for what in ("quantised checkpoint", "quantised checkpoint, captured"):
            assert found["said"][what].startswith("RefusedError: ")
            assert "start the engine from the unquantised checkpoint" in found["said"][what]


WRONG = {
    "uninitialised": ("NotFencedError", "init_weight_transfer_engine first"),
    "option": ("ConfigError", "`no_such_option` is not known; there is rendezvous, model"),
    "no model": ("ConfigError", "`model` has to be there"),
    "prefix cache": ("RefusedError", "enable_prefix_caching=False"),
    "no NIXL": ("NixlUnavailableError", "set REFIT_NIXL_LIBRARY"),
    "another vLLM": ("ConfigError", "vLLM 0.99.0 was not checked"),
    "not ready": ("NotReadyError", "no group offers one"),
    "stale": ("VersionError", "version 2 was asked for, and 2 is live: ask for a newer one"),
    "busy": ("EngineError", "requests are under way"),
    "other name": ("NotReadyError", "no group offers one"),
    "half a trainer": ("NotReadyError", "of its 2 ranks [1] are not there; start them"),
    "other model": ("PlanError", "the sides hold different models"),
    "unreceived": ("Exception", "NotFencedError: finish_weight_update: nothing was received"),
}


@pytest.mark.parametrize(
    ("model", "tp", "quantization"),
    [
        # Kernels of `vllm_kernels.py`: rows and biases in another order in the same shape, heads too; gate and up swapped.
        pytest.param("qwen3", 1, "refit_permuted", marks=on_a_cpu),
        pytest.param("qwen2.5", 2, "refit_permuted", marks=on_a_cpu),
        # Other names, shapes and types; experts as above.
        pytest.param("qwen3-moe", 1, "refit_packed", marks=on_a_cpu),
        # vLLM's own, of which the second asks the other rank for the largest element.
        ("qwen3", 1, "fp8_per_block"),
        ("qwen3", 2, "fp8_per_channel"),
        pytest.param("qwen3-moe", 1, "fp8_per_block", marks=on_a_gpu),
        pytest.param("qwen3", 1, "fp8_per_tensor", marks=on_a_gpu),
        # Latent attention, absorbed anew: on a CPU vLLM says one of several things on the same weights, and not transformers'.
        ("deepseek", 1, None),
        # A view of a convolution's weight that is no parameter; gated delta nets.
        ("nemotron-h", 1, None),
        ("qwen3-next", 1, None),
    ],
)
def test_an_engine_whose_kernels_repack_says_what_a_fresh_one_says(
    tmp_path: Path, model: str, tp: int, quantization: str | None
) -> None:
    found = engine(tmp_path, model, tp, *([quantization] if quantization else []))
    # As the trainer published them, whatever was made of them here; but for what was cast on the way.
    casts = model in ("deepseek", "nemotron-h", "qwen3-next")
    assert found["relayed"] == {"group": "trainer" if casts else "engine", "differ": []}
    said = found["tokens"]
    for version in ("2", "after errors"):
        for number, tokens in enumerate(said[version]):
            assert tokens in [fresh[number] for fresh in found["fresh"]]
    assert model == "deepseek" or all(fresh == said["2"] == said["after errors"] for fresh in found["fresh"])
    assert said["0"] != said["1"] != said["2"]
    if (model, quantization) == ("qwen2.5", "refit_permuted"):
        # Its head is tied until it is permuted, which the names of a checkpoint do not tell.
        assert found["captured_equals_builtin"] == ["the checkpoint has nothing for the engine's `lm_head.weight`"] * tp
    elif model == "nemotron-h":
        assert "does more than copy" in found["captured_equals_builtin"][0]
    else:
        assert found["captured_equals_builtin"] == [True] * tp
    # All that is not in place was written as it is loaded, and something was, but for unquantised layers on a GPU.
    written = {"load_time"} if not GPUS else {"load_time", "live"} if quantization else {"live"}
    assert set(found["methods"].values()) == written
    if quantization == "refit_permuted":
        # Nothing is lost by another order.
        for version in ("0", "1", "2"):
            assert agreeing(said[version], found["reference"][version]) >= LEAST
