"""One real engine with the backend `refit`, refitted from a source that holds a whole Hugging Face model, for
`test_vllm_real.py`: `vllm_engine.py MODEL TP FOLDER [QUANTIZATION]` leaves `out.json` in the folder. With a quantisation it
has besides what a fresh engine says, several times, that was loaded from the last version.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

# Kernels of vLLM 0.32 use the tiles of a CPU that has some without asking for them, which ends the process with SIGILL unless
# somebody has asked. An engine's processes import this file first.
torch.cpu._init_amx()
if any("refit_" in argument for argument in sys.argv[4:]):
    import vllm_kernels  # noqa: F401

#: Where the engine computes, and the trainer holds its model.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Sides are multiples of 128, which the blocks of FP8 kernels on GPUs take.
COMMON: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPTS = [[1, 5, 9, 13], [200, 3, 77]]
TOKENS = 8


def config_of(model: str) -> Any:
    from transformers import (
        DeepseekV3Config,
        NemotronHConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
        Qwen3NextConfig,
    )

    if model == "qwen2.5":
        return Qwen2Config(**COMMON, tie_word_embeddings=True)
    if model == "qwen3-moe":
        return Qwen3MoeConfig(
            **COMMON,
            head_dim=64,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    if model == "deepseek":
        return DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 4},
            q_lora_rank=32,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            topk_method="noaux_tc",
            tie_word_embeddings=False,
        )
    if model == "nemotron-h":
        layers = ["linear_attention", "full_attention", "mlp", "linear_attention"]
        return NemotronHConfig(
            **{**COMMON, "num_hidden_layers": len(layers)},
            layers_block_type=layers,
            head_dim=64,
            mamba_num_heads=8,
            mamba_head_dim=64,
            n_groups=2,
            ssm_state_size=64,
            chunk_size=64,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    if model == "qwen3-next":
        return Qwen3NextConfig(
            **COMMON,
            head_dim=64,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    return Qwen3Config(**COMMON, head_dim=64, tie_word_embeddings=False)


def checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, which is what vLLM's loader is given: transformers' own names differ for experts."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def make(config: Any, seed: int, folder: Path) -> list[Any]:
    """A model's checkpoint, and how it goes on."""
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
    ids, found = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(ids).logits[0, -1].float()
            best, second = logits.topk(2).values.tolist()
            found.append([int(logits.argmax()), (best - second) / logits.abs().max().item()])
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return found


def quantise(folder: Path) -> None:
    """Makes a checkpoint one whose linear layers are in int8 with a scale for each row, as `compressed-tensors` has it."""
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    for name, tensor in checkpoint(folder).items():
        found[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            found[name] = (tensor.float() / scale).round().to(torch.int8)
            found[f"{name}_scale"] = scale.to(torch.bfloat16)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    each = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**each, "strategy": "channel", "dynamic": False},
        "input_activations": {**each, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def compare(worker: Any, info: dict[str, Any]) -> bool | str:
    """Whether a worker's captured layout is the built-in one, or why there is none."""
    from refit_rl.errors import LayoutError
    from refit_rl.vllm.options import InitInfo

    receiver = worker.weight_transfer_engine._receiver
    try:
        return bool(canonical(receiver.captured(InitInfo(**info))) == canonical(receiver.layout))
    except LayoutError as error:
        return str(error)


def canonical(layout: Any) -> Any:
    """Bands in one order, and one way to write a default."""
    params = json.loads(layout.to_json())["ranks"][0]["params"]
    return {name: json.dumps(param, sort_keys=True) for name, param in params.items()}


def serve(folder: Path, tp: int, **options: Any) -> Any:
    import vllm

    return vllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        # On a GPU what is compiled and captured has to go on with what is refitted.
        enforce_eager=DEVICE == "cpu",
        # Of a GPU's memory or the host's: others have models there too, so vLLM cannot find out what is free.
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=1 << 28,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        tensor_parallel_size=tp,
        seed=0,
        **options,
    )


def greedily() -> Any:
    import vllm

    return vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)


def say(llm: Any) -> list[list[int]]:
    """What an engine goes on with."""
    done = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedily(), use_tqdm=False)
    return [list(it.outputs[0].token_ids) for it in done]


def pretend(worker: Any, what: str) -> None:
    """Has a worker's process lack something; the next call puts that back."""
    import vllm

    from refit_rl import _nixl

    kept = vars(worker).setdefault("refit_kept", (vllm.__version__, _nixl.candidates))
    vllm.__version__, _nixl.candidates = kept
    os.environ.pop("REFIT_NIXL_LIBRARY", None)
    if what == "no NIXL":
        os.environ["REFIT_NIXL_LIBRARY"] = "/nowhere/libnixl_capi.so"
        _nixl.candidates = lambda: []
    elif what == "another vLLM":
        vllm.__version__ = "0.99.0"


def whole(tensors: dict[str, Any], **side: Any) -> Any:
    """The layout of one rank that holds all of each tensor."""
    from refit_rl import layouts

    boxes = {name: (tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()}
    return layouts.shards(boxes, rank=0, **side)


def relayed(meet: str, model: str, like: dict[str, Any]) -> dict[str, Any]:
    """Another engine's read: whom it reads, and which tensors are not those of the trainer."""
    from refit_rl import Target

    read = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with Target(meet, whole(like, side="target"), read, model=model, replica="other", mode="direct") as target:
        group = target.refresh()["group"]
    return {"group": group, "differ": [name for name, tensor in like.items() if not torch.equal(tensor, read[name])]}


def methods(worker: Any) -> dict[str, str]:
    """How each layer is written, by what looks after its weights."""
    layers = worker.weight_transfer_engine._receiver._places.facts["layers"]
    return {layer["quant_method"]: layer.get("written", "live") for layer in layers}


def main() -> None:
    model, tp, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    quantization = sys.argv[4] if len(sys.argv) > 4 else None
    from refit_rl import Source
    from refit_rl.vllm import init, update

    config = config_of(model)
    found: dict[str, Any] = {"tokens": {}, "reference": {}, "said": {}}
    for version in (0, 1, 2):
        found["reference"][str(version)] = make(config, version, folder / str(version))
    live = {name: tensor.to(DEVICE) for name, tensor in checkpoint(folder / "1").items()}
    meet = f"dir:{folder}/meet"
    llm = serve(
        folder / "0",
        tp,
        enable_prefix_caching=True,
        weight_transfer_config={"backend": "refit"},
        quantization=quantization,
    )

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

    found["tokens"]["0"] = say(llm)
    info = {"rendezvous": meet, "model": model, "prefix_cache": "caller_resets", "relay": True}
    says("uninitialised", lambda: update(llm, 1))
    says("option", lambda: init(llm, **info, no_such_option=1))
    says("no model", lambda: init(llm, rendezvous=meet))
    says("prefix cache", lambda: init(llm, rendezvous=meet, model=model))
    if tp == 1:
        llm.collective_rpc(pretend, args=("no NIXL",))
        says("no NIXL", lambda: init(llm, **info, transport="nixl"))
        llm.collective_rpc(pretend, args=("another vLLM",))
        says("another vLLM", lambda: init(llm, **info))
        llm.collective_rpc(pretend, args=("nothing",))
    init(llm, **info)
    found["methods"] = llm.collective_rpc(methods)[0]
    found["captured_equals_builtin"] = llm.collective_rpc(compare, args=(info,))
    says("not ready", lambda: update(llm, 1, timeout=1.0))
    with Source(meet, whole(live), live, model=model) as source:
        source.publish(1)
        update(llm, 1)
        found["tokens"]["1"] = say(llm)
        with source.updating(2):
            for name, tensor in checkpoint(folder / "2").items():
                live[name].copy_(tensor)
        update(llm, 2)
        found["tokens"]["2"] = say(llm)
        found["relayed"] = relayed(meet, model, live)
        says("stale", lambda: update(llm, 2, timeout=5.0))
        if tp == 1:
            llm.llm_engine.add_request("busy", {"prompt_token_ids": PROMPTS[0]}, greedily())
        says("busy", lambda: update(llm, 3, timeout=5.0))
        if tp == 1:
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
            # Another name is another model; the same name and other shapes cannot be joined, and nothing is written.
            init(llm, **{**info, "model": "other"})
        says("other name", lambda: update(llm, 1, timeout=1.0))
        small = {name: tensor[:1].contiguous() for name, tensor in live.items()}
        wrong = whole(small)
        with Source(meet, wrong, small, model="other", group="half", ranks=2) as source:
            source.publish(1)
            says("half a trainer", lambda: update(llm, 1, timeout=1.0))
        with Source(meet, wrong, small, model="other") as source:
            source.publish(1)
            says("other model", lambda: update(llm, 1, timeout=5.0))
        if tp == 1:
            llm.start_weight_update()
        says("unreceived", llm.finish_weight_update)
    # Older releases have no name for what they hold.
    found["weight_version"] = getattr(llm, "get_weight_version", lambda: None)()
    found["tokens"]["after errors"] = say(llm)
    llm.llm_engine.engine_core.shutdown()
    if quantization is not None or model in ("deepseek", "nemotron-h", "qwen3-next"):
        llm = serve(folder / "2", tp, enable_prefix_caching=False, quantization=quantization)
        found["fresh"] = [say(llm) for _ in range(4)]
    elif model == "qwen3":
        quantise(folder / "0")
        llm = serve(folder / "0", tp, enable_prefix_caching=False, weight_transfer_config={"backend": "refit"})
        says("quantised checkpoint", lambda: init(llm, rendezvous=meet, model=model))
        says("quantised checkpoint, captured", lambda: init(llm, rendezvous=meet, model=model, layout="capture"))
    (folder / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
