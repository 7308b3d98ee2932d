"""A real vLLM engine with refit's weight-transfer backend, for `run.py`. It takes orders from a pipe, an object of JSON a line."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch

# A process has to ask the kernel for AMX before it uses it. vLLM 0.32's attention does not, and where nothing else in a worker has,
# the first token ends it with an illegal instruction. Workers import this module.
torch.cpu._init_amx()


class Worker:
    """What a worker of vLLM can do besides (`worker_extension_cls`)."""

    weight_transfer_engine: Any

    def refit_report(self) -> dict[str, Any]:
        return dict(self.weight_transfer_engine.report)


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

    from refit_rl.vllm import update

    llm = vllm.LLM(
        options.model,
        skip_tokenizer_init=True,
        # On a GPU what is compiled and captured has to go on with what is refitted.
        enforce_eager=not torch.cuda.is_available(),
        # Of a GPU's memory or the host's: others have models there too, so vLLM cannot find out what is free.
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=1 << 28,
        # What it keeps belongs to older weights: `update` sees to that.
        enable_prefix_caching=True,
        dtype="bfloat16",
        max_model_len=options.max_model_len,
        max_num_seqs=options.prompts_max,
        tensor_parallel_size=options.tp,
        weight_transfer_config={"backend": "refit"},
        worker_extension_cls="worker_engine.Worker",
        seed=0,
    )
    info = {"rendezvous": options.rendezvous, "model": options.name, "prefix_cache": "caller_resets"}
    llm.init_weight_transfer_engine({"init_info": info})
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
                update(llm, order["version"], timeout=120.0)
                took = time.monotonic() - began
                reports = llm.collective_rpc("refit_report")
                answer(version=reports[0]["version"], seconds=took, reports=reports)
            else:
                answer(error=f"no such order: {order}")
        except Exception as error:  # The driver has to hear of everything.
            answer(error=f"{type(error).__name__}: {error}")
    llm.shutdown_weight_transfer_engine()


if __name__ == "__main__":
    main()
