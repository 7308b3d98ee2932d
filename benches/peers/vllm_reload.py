"""The same weights into the same vLLM engine on a CPU, twice: pulled by the backend `refit`, and read by vLLM's own
`reload_weights` from a gathered checkpoint. Needs vllm (a CPU build), torch, transformers and the package of this repository:

    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind python vllm_reload.py [--model qwen3-moe]

Behind each the engine's tokens are compared with transformers'. Writing the checkpoint is timed apart: `reload_weights` needs
it, with whatever gathers it from the trainer's ranks on top, which is not counted here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, TOKENS = [1, 5, 9, 13], 8


def config_of(model: str, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model == "qwen3":
        return Qwen3Config(**common)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
    return Qwen3MoeConfig(**common, **experts, mlp_only_layers=[], norm_topk_prob=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("qwen3", "qwen3-moe"), default="qwen3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = json.dumps(measure(options, Path(folder)), indent=1)
    # Behind vLLM's own log, which goes to the same place.
    print(found)


def measure(options: Any, folder: Path) -> dict[str, Any]:
    import torch
    import vllm
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from refit_rl import Source, layouts
    from refit_rl.vllm import update

    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(options.model, options.layers), dtype=torch.bfloat16).eval()
        model.save_pretrained(folder / str(seed), max_shard_size="100GB")
        with torch.no_grad():
            ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
        expected.append(ids[0, len(PROMPT) :].tolist())
        del model
    weights = [load_file(folder / str(seed) / "model.safetensors") for seed in (0, 1)]
    live = {name: tensor.clone() for name, tensor in weights[0].items()}
    llm = vllm.LLM(
        str(folder / "0"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=2,
        weight_transfer_config={"backend": "refit"},
        seed=0,
    )

    def generated() -> list[int]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
        return list(done[0].outputs[0].token_ids)

    info = {"rendezvous": f"dir:{folder}/meet", "model": "bench"}
    llm.init_weight_transfer_engine({"init_info": info})
    boxes = {name: (tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in live.items()}
    seconds: dict[str, list[float]] = {"refit": [], "save_file": [], "reload_weights": []}
    tokens: dict[str, list[list[int]]] = {"refit": [], "reload_weights": []}
    with Source(info["rendezvous"], layouts.shards(boxes, rank=0), live, model="bench") as source:
        # One more than is counted: the first plans and registers.
        for version in range(1, options.rounds + 2):
            with source.updating(version):
                for name, tensor in weights[version % 2].items():
                    live[name].copy_(tensor)
            began = time.monotonic()
            update(llm, version)
            seconds["refit"].append(time.monotonic() - began)
            tokens["refit"].append(generated())
    for version in range(1, options.rounds + 2):
        into = folder / str(version % 2)
        began = time.monotonic()
        save_file(weights[version % 2], into / "model.safetensors", metadata={"format": "pt"})
        seconds["save_file"].append(time.monotonic() - began)
        began = time.monotonic()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(into)})
        seconds["reload_weights"].append(time.monotonic() - began)
        tokens["reload_weights"].append(generated())
    return {
        "vllm": vllm.__version__,
        "model": options.model,
        "bytes": sum(tensor.nbytes for tensor in live.values()),
        "first": {what: round(of[0], 3) for what, of in seconds.items()},
        "median": {what: round(statistics.median(of[1:]), 3) for what, of in seconds.items()},
        "least": {what: round(min(of[1:]), 3) for what, of in seconds.items()},
        # Between vLLM and transformers a close pair of logits may change places; between the two ways nothing may differ.
        "refit_equals_reload": tokens["refit"] == tokens["reload_weights"],
        "tokens": {**tokens, "transformers": [expected[version % 2] for version in range(1, options.rounds + 2)]},
    }


if __name__ == "__main__":
    main()
