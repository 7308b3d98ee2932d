"""Real Megatron-Core trainers (modules, process groups, schedules, distributed optimizer) in processes of their own, byte for byte.

They need Megatron-Core, torch and transformers: `cargo xtask e2e` runs these with them. Elsewhere they are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: `cargo xtask e2e` runs this with it")
torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

import models  # noqa: E402
import reference  # noqa: E402
import run  # noqa: E402

from refit_rl import Target, layouts  # noqa: E402


#: What is only there as a part of something.
FUSED = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "up_proj", "gate_proj", "experts")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def padded(tensor: Any) -> Any:
    """vLLM has a multiple of 64 rows."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))


def engine(state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A vLLM rank alone, from a checkpoint: fused projections one below the other."""
    found = {}
    for name, tensor in state.items():
        for part, fused, parts in (
            ("q_proj", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("gate_proj", "gate_up_proj", ("gate_proj", "up_proj")),
            ("q_a_proj", "fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
        ):
            if f".{part}." in name and ".experts." not in name:
                whole = [state[name.replace(part, other)] for other in parts]
                found[name.replace(part, fused)] = torch.cat(whole)
                break
        else:
            if not any(f".{other}." in name for other in FUSED):
                found[name] = padded(tensor) if name in VOCABULARY else tensor
    count = models.experts(config) or 0
    for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"] if count else 0):
        at = f"model.layers.{layer}.mlp.experts."
        every = [
            {part: state[f"{at}{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            for expert in range(count)
        ]
        found[f"{at}routed_experts.w13_weight"] = torch.stack([torch.cat([it["gate"], it["up"]]) for it in every])
        found[f"{at}routed_experts.w2_weight"] = torch.stack([it["down"] for it in every])
    return found


def checkpoint(case: run.Case, folder: Path, version: int) -> dict[str, Any]:
    """A version under Hugging Face's names: what Megatron-Bridge exports, or the reference."""
    if case.bridge:
        return load_file(run.exported(folder, version))
    return reference.state(reference.load(folder / "held" / str(version)), models.MODELS[case.model])


@pytest.mark.parametrize(
    "case",
    [
        run.Case("qwen3", tp=2),
        run.Case("qwen2.5", pp=2),
        run.Case("qwen3-moe", ep=2),
        run.Case("qwen3", dp=2, overlap=True),
        # Chunks whose parameters are completed in the next forward pass.
        run.Case("qwen3", pp=2, vpp=2, dp=2, overlap=True),
        run.Case("qwen3", tp=2, te=True),
        run.Case("qwen3-moe", tp=2, etp=2, te=True),
        run.Case("qwen3-moe", tp=2, ep=2, etp=1, bridge=True),
        # A router's bias, which is a buffer.
        run.Case("deepseek-v3", tp=2, ep=2, etp=1, bridge=True),
    ],
    ids=lambda case: case.name,
)
def test_what_a_real_trainer_holds_arrives_byte_for_byte(case: run.Case, tmp_path: Path) -> None:
    config = models.MODELS[case.model]
    if case.bridge:
        run.initial(case, tmp_path)
    with run.training(case, tmp_path) as trainer:
        ready = trainer.answer()
        assert (ready["copies"], ready["ranks"]) == (case.dp, case.ranks)
        before: dict[str, Any] = {}
        target = None
        for version in (1, 2):
            trainer.ask(do="step", version=version)
            wanted = engine(checkpoint(case, tmp_path, version), config)
            if target is None:
                live = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
                target = Target(
                    f"dir:{tmp_path / 'meet'}",
                    layouts.vllm(config, live, rank=0),
                    live,
                    model=case.name,
                    post_actions=lambda _: None,
                )
            report = target.refresh(version, timeout=60.0)
            assert report["version"] == version
            assert report["wire_bytes"] >= report["needed_bytes"] > 0
            for name, tensor in wanted.items():
                assert torch.equal(live[name], tensor), name
            changed = [name for name in wanted if name in before and not torch.equal(before[name], wanted[name])]
            assert version == 1 or len(changed) > len(wanted) // 2
            before = wanted
        assert target is not None
        target.close()
        stopped = trainer.ask(do="stop")
        assert stopped["stats"]["commits"] == 2
