"""What a trainer's ranks held, as a Hugging Face model: the reference that an engine is compared with.

Written from Megatron-Core's documentation of its layouts alone, and shares no line with refit: shards are put together as whole
tensors, which are then taken apart. That it is right is seen from the loss, which the trainer computed with its own modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models import head_dim


def load(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("rank*.pt"))
    if not files:
        raise SystemExit(f"{folder}: no rank left anything")
    return [torch.load(file, weights_only=True) for file in files]


def whole(ranks: list[dict[str, Any]], pp: int) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline stage, without tensor parallelism, from its first copy."""
    stage = [rank for rank in ranks if rank["pp"] == pp]
    shards: dict[int, dict[str, Any]] = {}
    for rank in stage:
        shards.setdefault(rank["tp"], rank["params"])
    by_tp = [shards[tp] for tp in sorted(shards)]
    found = {}
    for name, first in by_tp[0].items():
        parts = [params[name] for params in by_tp]
        if "local_experts" in name:
            continue
        if name.endswith("linear_fc1.weight"):
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            found[name] = torch.cat([*gates, *ups])
        elif name.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
            found[name] = torch.cat(parts)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            found[name] = torch.cat(parts, dim=1)
        else:
            if any(not torch.equal(part, first) for part in parts):
                raise SystemExit(f"copies of {name} differ")
            found[name] = first
    # Experts are whole on their rank.
    for rank in stage:
        for name, value in rank["params"].items():
            if "local_experts" in name:
                found[f"ep{rank['ep']}:{name}"] = value
    return found


def state(ranks: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Hugging Face's state dictionary."""
    found: dict[str, torch.Tensor] = {}
    stages = 1 + max(rank["pp"] for rank in ranks)
    for pp in range(stages):
        params = whole(ranks, pp)
        layers = next(rank["layers"] for rank in ranks if rank["pp"] == pp)
        if pp == 0:
            found["model.embed_tokens.weight"] = params["embedding.word_embeddings.weight"]
        if pp == stages - 1:
            found["model.norm.weight"] = params["decoder.final_layernorm.weight"]
            if config["tie_word_embeddings"]:
                head = params.get("output_layer.weight", found["model.embed_tokens.weight"])
                if not torch.equal(head, found["model.embed_tokens.weight"]):
                    raise SystemExit("the two ends of the tied embedding differ")
            else:
                found["lm_head.weight"] = params["output_layer.weight"]
        for local, number in enumerate(layers):
            _layer(found, params, f"decoder.layers.{local}.", f"model.layers.{number}.", config)
    return found


def _layer(
    found: dict[str, torch.Tensor], params: dict[str, torch.Tensor], of: str, to: str, config: dict[str, Any]
) -> None:
    found[f"{to}input_layernorm.weight"] = params[f"{of}input_layernorm.weight"]
    found[f"{to}post_attention_layernorm.weight"] = params[f"{of}pre_mlp_layernorm.weight"]
    found[f"{to}self_attn.o_proj.weight"] = params[f"{of}self_attention.linear_proj.weight"]
    for norm in ("q", "k"):
        name = f"{of}self_attention.{norm}_layernorm.weight"
        if name in params:
            found[f"{to}self_attn.{norm}_norm.weight"] = params[name]
    for kind in ("weight", "bias"):
        name = f"{of}self_attention.linear_qkv.{kind}"
        if name in params:
            for letter, part in zip("qkv", _qkv(params[name], config), strict=True):
                found[f"{to}self_attn.{letter}_proj.{kind}"] = part
    if not config.get("num_experts"):
        gate, up = params[f"{of}mlp.linear_fc1.weight"].chunk(2)
        found[f"{to}mlp.gate_proj.weight"], found[f"{to}mlp.up_proj.weight"] = gate, up
        found[f"{to}mlp.down_proj.weight"] = params[f"{of}mlp.linear_fc2.weight"]
        return
    found[f"{to}mlp.gate.weight"] = params[f"{of}mlp.router.weight"]
    groups = sorted({int(name[2 : name.index(":")]) for name in params if name.startswith("ep")})
    per_group = config["num_experts"] // len(groups)
    for expert in range(config["num_experts"]):
        at = f"ep{groups[expert // per_group]}:{of}mlp.experts.local_experts.{expert % per_group}."
        gate, up = params[f"{at}linear_fc1.weight"].chunk(2)
        into = f"{to}mlp.experts.{expert}."
        found[f"{into}gate_proj.weight"], found[f"{into}up_proj.weight"] = gate, up
        found[f"{into}down_proj.weight"] = params[f"{at}linear_fc2.weight"]


def _qkv(fused: torch.Tensor, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Per group of heads: its queries, then its key, then its value."""
    groups = config["num_key_value_heads"]
    queries = config["num_attention_heads"] // groups
    rest = fused.shape[1:]
    grouped = fused.view(groups, queries + 2, head_dim(config), *rest)
    parts = grouped[:, :queries], grouped[:, queries : queries + 1], grouped[:, queries + 1 :]
    return tuple(part.reshape(-1, *rest) for part in parts)


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """A checkpoint that `from_pretrained` and vLLM load."""
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value and key != "mismatched_keys"}
    if info.get("missing_keys") or info.get("unexpected_keys") or info.get("mismatched_keys"):
        raise SystemExit(f"{folder}: {wrong}")
    return loaded.eval()


@torch.no_grad()
def loss(of: Any, tokens: list[list[int]]) -> float:
    ids = torch.tensor(tokens)
    logits = of(ids[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@torch.no_grad()
def greedy(of: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, and by how much each was likelier than the next best."""
    ids, tokens, margins = torch.tensor([prompt]), [], []
    for _ in range(count):
        logits = of(ids).logits[0, -1].float()
        best, second = logits.topk(2).values.tolist()
        token = int(logits.argmax())
        tokens.append(token)
        margins.append(best - second)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokens, margins
