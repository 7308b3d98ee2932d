"""One real engine with the backend `refit`, refitted from a source that holds a whole Hugging Face model, for
`test_vllm_real.py`: `vllm_engine.py MODEL TP FOLDER` leaves `out.json` in the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPTS = [[1, 5, 9, 13], [200, 3, 77]]
TOKENS = 8


def config_of(model: str) -> Any:
    from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

    if model == "qwen2.5":
        return Qwen2Config(**{**COMMON, "hidden_size": 128}, tie_word_embeddings=True)
    if model == "qwen3-moe":
        return Qwen3MoeConfig(
            **COMMON,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    return Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=False)


def checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, which is what vLLM's loader is given: transformers' own names differ for experts."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def make(config: Any, seed: int, folder: Path) -> list[Any]:
    """A model's checkpoint, and how it goes on."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    for name, param in model.named_parameters():
        # Transformers begins norms with ones and biases with zeros, which would hide a wrong place.
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(param, 0.5, 1.5)
    model.save_pretrained(folder)
    return [greedy(model, prompt) for prompt in PROMPTS]


def greedy(model: Any, prompt: list[int]) -> list[Any]:
    """The likeliest tokens, and of each by what part of the largest logit it was likelier than the next best."""
    import torch

    ids, found = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(ids).logits[0, -1].float()
            best, second = logits.topk(2).values.tolist()
            found.append([int(logits.argmax()), (best - second) / logits.abs().max().item()])
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return found


def compare(worker: Any, info: dict[str, Any]) -> bool:
    """Whether a worker's captured layout is the built-in one."""
    from refit_rl.vllm.options import InitInfo

    receiver = worker.weight_transfer_engine._receiver
    return bool(canonical(receiver.captured(InitInfo(**info))) == canonical(receiver.layout))


def canonical(layout: Any) -> Any:
    """Bands in one order, and one way to write a default."""
    params = json.loads(layout.to_json())["ranks"][0]["params"]
    return {name: json.dumps(param, sort_keys=True) for name, param in params.items()}


def main() -> None:
    model, tp, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    import vllm

    from refit_rl import Source, layouts
    from refit_rl.vllm import update

    config = config_of(model)
    found: dict[str, Any] = {"tokens": {}, "reference": {}, "said": {}}
    for version in (0, 1, 2):
        found["reference"][str(version)] = make(config, version, folder / str(version))
    live = checkpoint(folder / "1")
    held = layouts.shards(
        {name: (tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in live.items()}, rank=0
    )
    meet = f"dir:{folder}/meet"
    llm = vllm.LLM(
        str(folder / "0"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        tensor_parallel_size=tp,
        weight_transfer_config={"backend": "refit"},
        seed=0,
    )

    def generate() -> list[list[int]]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        return [list(it.outputs[0].token_ids) for it in done]

    def says(what: str, call: Any) -> None:
        # With several workers vLLM 0.32 raises at the first one's error and leaves the others' unread, so that each later call
        # gets the answers of the one before it. One worker says all there is to say.
        if tp > 1:
            return
        try:
            call()
        except Exception as error:
            found["said"][what] = f"{type(error).__name__}: {error}"
        else:
            found["said"][what] = "nothing"

    found["tokens"]["0"] = generate()
    info = {"rendezvous": meet, "model": model, "prefix_cache": "caller_resets"}
    says("uninitialised", llm.start_weight_update)
    says("option", lambda: llm.init_weight_transfer_engine({"init_info": {**info, "no_such_option": 1}}))
    says("prefix cache", lambda: llm.init_weight_transfer_engine({"init_info": {"rendezvous": meet, "model": model}}))
    llm.init_weight_transfer_engine({"init_info": info})
    found["captured_equals_builtin"] = llm.collective_rpc(compare, args=(info,))
    says("not ready", lambda: update(llm, 1, timeout=1.0))
    with Source(meet, held, live, model=model) as source:
        source.publish(1)
        update(llm, 1)
        found["tokens"]["1"] = generate()
        with source.updating(2):
            for name, tensor in checkpoint(folder / "2").items():
                live[name].copy_(tensor)
        update(llm, 2)
        found["tokens"]["2"] = generate()
        says("stale", lambda: update(llm, 2, timeout=5.0))
        # Another name is another model; the same name and other shapes cannot be joined, and nothing is written.
        if tp == 1:
            llm.init_weight_transfer_engine({"init_info": {**info, "model": "other"}})
        says("other name", lambda: update(llm, 1, timeout=1.0))
        small = {name: tensor[:1].contiguous() for name, tensor in live.items()}
        boxes = {name: (tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in small.items()}
        with Source(meet, layouts.shards(boxes, rank=0), small, model="other") as wrong:
            wrong.publish(1)
            says("other model", lambda: update(llm, 1, timeout=10.0))
        if tp == 1:
            llm.start_weight_update()
        says("unreceived", llm.finish_weight_update)
    found["weight_version"] = llm.get_weight_version()
    found["tokens"]["after errors"] = generate()
    (folder / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
