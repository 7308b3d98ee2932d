"""A real vLLM engine whose workers are targets, for `run.py`. It takes orders from a pipe, an object of JSON a line.

An engine on a CPU packs what it loads, so live parameters are no target. Each worker therefore reads into tensors of the shapes
that a checkpoint is loaded into, which vLLM keeps for its own reload, puts them in the place of the live ones and has
vLLM process them again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch


class Worker:
    """What a worker of vLLM can do besides (`worker_extension_cls`)."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def refit_open(self, config: str, rendezvous: str, name: str) -> int:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        from refit_rl import Target, layouts

        model = self.model_runner.model
        #: Where a tensor goes: the module and the name of its parameter.
        self.places: dict[str, tuple[Any, str]] = {}
        self.staged: dict[str, torch.Tensor] = {}
        for path, module in model.named_modules():
            loaded = get_layerwise_info(module).restore_metadata[0]
            # What vLLM does not process it does not remember either.
            for parameter, tensor in {**module._parameters, **loaded}.items():
                if tensor is not None:
                    full = f"{path}.{parameter}"
                    self.places[full] = module, parameter
                    self.staged[full] = torch.zeros(tuple(tensor.shape), dtype=tensor.dtype)
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        layers = [
            {
                "name": path,
                "quant_method": type(module.quant_method).__name__,
                "kernel": getattr(getattr(module.quant_method, "unquantized_backend", None), "name", None),
            }
            for path, module in model.named_modules()
            if getattr(module, "quant_method", None) is not None
        ]
        layout = layouts.vllm(
            config,
            self.staged,
            rank=rank,
            tp_rank=rank,
            tp_size=size,
            facts={"device": "cpu", "load_time": True, "layers": layers},  # type: ignore[typeddict-item]
        )
        self.target = Target(
            rendezvous,
            layout,
            {name: self.staged[name] for name in layout.names},
            model=name,
            ranks=size,
            mode="direct",
            # The engine is idle while it is told to refresh, and has no prefix cache.
            post_actions=lambda actions: self.install(),
        )
        return len(layout)

    def install(self) -> None:
        from vllm.config import set_current_vllm_config

        by_module: dict[int, tuple[Any, dict[str, torch.Tensor]]] = {}
        for full, (module, parameter) in self.places.items():
            by_module.setdefault(id(module), (module, {}))[1][parameter] = self.staged[full]
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            for module, tensors in by_module.values():
                self.place(module, tensors)

    def place(self, module: Any, tensors: dict[str, torch.Tensor]) -> None:
        method = getattr(module, "quant_method", None)
        process = getattr(method, "process_weights_after_loading", None)
        if getattr(method, "moe_kernel", None) is not None:
            # Processed a second time, experts would be copied as they are over those that were packed for CPUs.
            method.moe_kernel = None
        for parameter, tensor in tensors.items():
            live = module._parameters[parameter]
            if process is None:
                live.data.copy_(tensor)
            else:
                fresh = torch.nn.Parameter(tensor.clone(), requires_grad=False)
                fresh.__dict__.update(live.__dict__)
                module._parameters[parameter] = fresh
        if process is not None:
            process(module)

    def refit_refresh(self, version: int) -> dict[str, Any]:
        return dict(self.target.refresh(version, timeout=120.0))

    def refit_close(self) -> None:
        self.target.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--rendezvous", "--name"):
        parser.add_argument(name, required=True)
    for name in ("--tp", "--prompts-max", "--max-model-len", "--in-fd", "--out-fd"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    orders = os.fdopen(options.in_fd, "r")
    answers = os.fdopen(options.out_fd, "w", buffering=1)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    import vllm

    llm = vllm.LLM(
        options.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        # What it would keep belongs to older weights.
        enable_prefix_caching=False,
        dtype="bfloat16",
        max_model_len=options.max_model_len,
        max_num_seqs=options.prompts_max,
        tensor_parallel_size=options.tp,
        worker_extension_cls="worker_engine.Worker",
        seed=0,
    )
    llm.collective_rpc("refit_open", args=(options.model, options.rendezvous, options.name))
    answer(ready=True, vllm=vllm.__version__)
    for line in orders:
        order = json.loads(line)
        if order["do"] == "stop":
            break
        try:
            if order["do"] == "generate":
                sampling = vllm.SamplingParams(
                    temperature=order.get("temperature", 0.0),
                    n=order.get("n", 1),
                    max_tokens=order["max_tokens"],
                    ignore_eos=True,
                    detokenize=False,
                )
                prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
                done = llm.generate(prompts, sampling, use_tqdm=False)
                answer(tokens=[list(one.token_ids) for it in done for one in it.outputs])
            elif order["do"] == "refresh":
                began = time.monotonic()
                reports = llm.collective_rpc("refit_refresh", args=(order["version"],))
                took = time.monotonic() - began
                answer(version=reports[0]["version"], seconds=took, reports=reports)
            else:
                answer(error=f"no such order: {order}")
        except Exception as error:  # The driver has to hear of everything.
            answer(error=f"{type(error).__name__}: {error}")
    llm.collective_rpc("refit_close")


if __name__ == "__main__":
    main()
