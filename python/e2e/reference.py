"""What a trainer's ranks held, as a Hugging Face model: the reference that an engine is compared with.

Written from Megatron-Core's documentation of its layouts alone, and shares no line with refit: shards are put together as whole
tensors, which are then taken apart. That it is right is seen from the loss, which the trainer computed with its own modules, and
where Megatron-Bridge has built the model from what that exports.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from models import head_dim


def load(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("rank*.pt"))
    if not files:
        raise SystemExit(f"{folder}: no rank left anything")
    return [torch.load(file, weights_only=True) for file in files]


def whole(stage: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors of a stage, of what its ranks hold, without tensor parallelism, from its first copy.

    Experts are named by their numbers in the whole model, as `decoder.layers.0.mlp.experts.3.linear_fc1.weight`.
    """
    shards: dict[int, dict[str, Any]] = {}
    for rank in stage:
        shards.setdefault(rank["tp"], rank["params"])
    by_tp = [shards[tp] for tp in sorted(shards)]
    dense = [name for name in by_tp[0] if ".mlp.experts." not in name]
    return {name: _joined(name, [params[name] for params in by_tp]) for name in dense} | _experts(stage)


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith("linear_fc1.weight"):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
        return torch.cat(parts)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if any(not torch.equal(part, parts[0]) for part in parts):
        raise SystemExit(f"copies of {name} differ")
    return parts[0]


#: An expert is a module of its own, or one of the numbered weights of a module for all of a rank's.
_EXPERT = re.compile(
    r"(.*\.mlp\.experts)\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))"
)


def _experts(stage: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The ranks of a stage each have equally many experts, and may cut each of them."""
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for rank in stage:
        held = []
        for name, value in rank["params"].items():
            if match := _EXPERT.fullmatch(name):
                layer, number, fc, other_fc, other_number = match.groups()
                held.append((layer, int(number or other_number), fc or other_fc, value))
        count = 1 + max((number for _, number, _, _ in held), default=-1)
        for layer, number, fc, value in held:
            to = f"{layer}.{rank['ep'] * count + number}.{fc}.weight"
            shards.setdefault(to, {}).setdefault(rank["etp"], value)
    return {name: _joined(name, [by[etp] for etp in sorted(by)]) for name, by in shards.items()}


def stages(ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The ranks of each stage in the order of the model's layers. A virtual stage is one chunk of a rank, and the chunks of one
    number lie on all pipeline stages before those of the next do."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for rank in ranks:
        for number, chunk in enumerate(rank["chunks"]):
            found.setdefault((number, rank["pp"]), []).append({**rank, **chunk})
    return [found[at] for at in sorted(found)]


def state(ranks: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Hugging Face's state dictionary."""
    found: dict[str, torch.Tensor] = {}
    done = 0
    every = stages(ranks)
    for stage in every:
        params = whole(stage)
        layers = stage[0]["layers"]
        if layers != list(range(done, done + len(layers))):
            raise SystemExit(f"layers {layers} follow on {done} of them")
        if stage is every[0]:
            # Rows behind these belong to no token.
            found["model.embed_tokens.weight"] = params["embedding.word_embeddings.weight"][: config["vocab_size"]]
        if stage is every[-1]:
            found["model.norm.weight"] = params["decoder.final_layernorm.weight"]
            if config["tie_word_embeddings"]:
                head = params.get("output_layer.weight", found["model.embed_tokens.weight"])
                if not torch.equal(head[: config["vocab_size"]], found["model.embed_tokens.weight"]):
                    raise SystemExit("the two ends of the tied embedding differ")
            else:
                found["lm_head.weight"] = params["output_layer.weight"][: config["vocab_size"]]
        for local, number in enumerate(layers):
            _layer(found, params, f"decoder.layers.{local}.", f"model.layers.{number}.", config)
        done += len(layers)
    return found


def _norm(params: dict[str, torch.Tensor], alone: str, fused: str) -> torch.Tensor:
    """A norm is a module, or a part of the linear layer behind it."""
    return params[f"{alone}.weight"] if f"{alone}.weight" in params else params[f"{fused}.layer_norm_weight"]


def _layer(
    found: dict[str, torch.Tensor], params: dict[str, torch.Tensor], of: str, to: str, config: dict[str, Any]
) -> None:
    found[f"{to}input_layernorm.weight"] = _norm(params, f"{of}input_layernorm", f"{of}self_attention.linear_qkv")
    found[f"{to}post_attention_layernorm.weight"] = _norm(params, f"{of}pre_mlp_layernorm", f"{of}mlp.linear_fc1")
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
    for expert in range(config["num_experts"]):
        at = f"{of}mlp.experts.{expert}."
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


def same(tensors: dict[str, torch.Tensor], file: Path) -> bool:
    """Whether a file of safetensors has exactly these. A tied head may be there again."""
    from safetensors.torch import load_file

    found = load_file(file)
    if "lm_head.weight" not in tensors and "lm_head.weight" in found:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    wrong = [name for name in {*tensors, *found} if not _equal(tensors.get(name), found.get(name))]
    if wrong:
        print(f"{file}: {len(wrong)} tensors differ, such as {sorted(wrong)[0]}", flush=True)
    return not wrong


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


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
