"""The same weights into two vLLM engines on one GPU: pulled by the backend `refit`, and by vLLM's own backend `ipc`, which has
the engine load whole tensors that it maps from the trainer's memory. Needs vllm with torch for CUDA, transformers and the package of
this repository:

    python vllm_ipc.py [--config Qwen3-4B/config.json] [--rounds 7]

This process is the trainer: it holds whole tensors under Hugging Face's names on the GPU, as they are once they were gathered. That is
where `ipc` begins; what gathering takes on top is not counted. Both engines run with compiled code and CUDA graphs, get every
version in turn, and then have to hold the same bits in each of their own parameters. A round counts from `start_weight_update` to the end of
`finish_weight_update`, and for `refit` the publishing of the version besides.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS, TOKENS = [[1, 5, 9, 13], [200, 3, 77]], 8
#: Of Qwen3-4B.
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of a model (default: Qwen3-4B's)")
    parser.add_argument("--rounds", type=int, default=7, help="that count; one more goes before (default: 7)")
    parser.add_argument("--json", type=Path, help="where to write results")
    options = parser.parse_args()
    # The handles of `ipc` travel as a pickle.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if importlib.util.find_spec("ray") is None:
        parser.error("vLLM's `ipc` backend imports ray: install it, or put an empty ray.py on PYTHONPATH; nothing of it is used here")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        config = json.loads(options.config.read_text()) if options.config else QWEN3_4B
        (model / "config.json").write_text(json.dumps(config))
        found = measure(model, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    # Behind vLLM's own log, which goes to the same place.
    print(json.dumps(found, indent=1))


def tensors(model: Path) -> dict[str, Any]:
    """A model's parameters under the names of a checkpoint, on the GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    # One name of what is tied, as a checkpoint has it.
    return {name: torch.empty_like(like, device="cuda", requires_grad=False).detach() for name, like in made.named_parameters()}


def write(held: dict[str, Any], version: int) -> None:
    """A version of all weights. Norms stay about one, so that what an engine says hangs on all layers."""
    import torch

    generator = torch.Generator("cuda").manual_seed(version)
    for name, tensor in held.items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
    torch.cuda.synchronize()


def serve(model: Path, backend: str) -> Any:
    import vllm

    return vllm.LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=1 << 30,
        weight_transfer_config={"backend": backend},
        seed=0,
    )


def says(llm: Any) -> list[list[int]]:
    import vllm

    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(it.outputs[0].token_ids) for it in done]


def send_by_ipc(llm: Any, held: dict[str, Any]) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

    def send(info: Any) -> None:
        given = {name: value for name, value in vars(info).items() if value is not None}
        handles = base64.b64encode(pickle.dumps(given.pop("ipc_handles"))).decode()
        llm.update_weights({"update_info": {**given, "ipc_handles_pickled": handles}})

    llm.start_weight_update()
    IPCWeightTransferEngine.trainer_send_weights(iter(held.items()), IPCTrainerSendWeightsArgs(send_mode=send))
    # As refit's `update` does.
    llm.reset_prefix_cache()
    llm.finish_weight_update()


def timed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def report(worker: Any) -> Any:
    return dict(worker.weight_transfer_engine.report)


def digests(worker: Any) -> dict[str, int]:
    """A number for each of an engine's own parameters, that hangs on every bit and on where it is."""
    import torch

    found = {}
    for name, tensor in worker.model_runner.get_model().named_parameters():
        words = tensor.detach().contiguous().view(torch.int16).flatten()
        places = torch.arange(len(words), device=words.device, dtype=torch.int32)
        found[name] = int(((places * 2654435 + 1013904223) * (words.int() * 2 + 1)).long().sum())
    return found


def measure(model: Path, rounds: int) -> dict[str, Any]:
    import torch
    import vllm

    from refit_rl import Source, layouts
    from refit_rl.vllm import init, update

    held = tensors(model)
    ours, theirs = serve(model, "refit"), serve(model, "ipc")
    meet = f"dir:{model.parent}/meet"
    init(ours, rendezvous=meet, model="bench")
    theirs.init_weight_transfer_engine({"init_info": {}})
    boxes = {name: (tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in held.items()}
    seconds: dict[str, list[float]] = {"refit": [], "ipc": []}
    said: list[dict[str, list[list[int]]]] = []
    equal: list[bool] = []
    reports: list[Any] = []
    with Source(meet, layouts.shards(boxes, rank=0), held, model="bench") as source:
        for version in range(1, rounds + 2):
            source.begin_update()
            write(held, version)
            published = timed(lambda version=version: source.commit(version))
            ways = [
                ("refit", lambda version=version: update(ours, version)),
                ("ipc", lambda: send_by_ipc(theirs, held)),
            ]
            for name, way in ways if version % 2 else reversed(ways):
                seconds[name].append(timed(way) + (published if name == "refit" else 0.0))
            said.append({"refit": says(ours), "ipc": says(theirs)})
            equal.append(ours.collective_rpc(digests) == theirs.collective_rpc(digests))
            reports.append(ours.collective_rpc(report)[0])
    median = {name: statistics.median(of[1:]) for name, of in seconds.items()}
    count = sum(tensor.nbytes for tensor in held.values())
    # What a copy of the same bytes takes within this GPU.
    other = {name: torch.empty_like(tensor) for name, tensor in held.items()}

    def copy() -> None:
        for name, tensor in held.items():
            other[name].copy_(tensor)
        torch.cuda.synchronize()

    copies = [timed(copy) for _ in range(5)]
    return {
        "machine": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "bytes": count,
        "tensors": len(held),
        "first_s": {name: round(of[0], 4) for name, of in seconds.items()},
        "median_s": {name: round(value, 4) for name, value in median.items()},
        "seconds": {name: [round(one, 4) for one in of] for name, of in seconds.items()},
        "copy_s": round(statistics.median(copies), 4),
        "refit_report": reports[-1],
        "ipc_over_refit": round(median["ipc"] / median["refit"], 2),
        "parameters_equal": equal,
        # Each compiles its own kernels, so of two close tokens either may be chosen.
        "tokens_equal": [version["refit"] == version["ipc"] for version in said],
        "versions_differ": all(one["refit"] != other["refit"] for one, other in zip(said, said[1:], strict=False)),
    }


if __name__ == "__main__":
    main()
