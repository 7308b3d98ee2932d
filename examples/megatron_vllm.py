"""Megatron-Core learns, vLLM says what it has learned, and refit moves the weights after every step.

    target/setup/e2e/bin/python examples/megatron_vllm.py      # after `cargo xtask e2e`, which sets that Python up

Two tensor-parallel ranks of Megatron-Core (its modules, schedule and distributed optimizer) in processes of their own, and an
engine in this one, on one machine and without a GPU. The model is tiny. It learns two sequences by heart: behind every refit the
engine is given their beginnings, and says more of what follows. On a cluster the rendezvous is `etcd:..`, and the model what your
own `get_model` gives back (docs/python.md); the lines about refit stay the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python/e2e"))

#: Updates of the optimizer between two versions, and how much of a sequence the engine is given.
UPDATES, BEGINNING = 4, 4


def train(options: argparse.Namespace) -> None:
    """A rank of the trainer."""
    import cpu
    import torch
    import torch.distributed as dist
    import trainer

    from refit_rl.megatron import Publisher

    torch.set_num_threads(1)
    cpu.enter()
    dist.init_process_group("gloo")
    config = json.loads((Path(options.model) / "config.json").read_text())
    model, optimizer = trainer.build(options, config)
    tokens = trainer.batch(1, config["vocab_size"])
    first = dist.get_rank() == 0
    orders = os.fdopen(options.in_fd) if first else None
    answers = os.fdopen(options.out_fd, "w", buffering=1) if first else None
    with Publisher(model, options.model, rendezvous=options.rendezvous, model=options.name) as publisher:
        publisher.publish(1)  # what training starts from
        loss = None
        while True:
            if answers:
                print(json.dumps({"version": publisher.version, "loss": loss, "tokens": tokens.tolist()}), file=answers)
            order = trainer.everywhere(json.loads(orders.readline() or '{"do": "stop"}') if orders else None, 0)
            if order["do"] == "stop":
                break
            for _ in range(UPDATES):
                for chunk in model:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                loss = trainer.forward_backward(model, tokens, forward_only=False)
                publisher.before_step()  # waits until no engine reads
                optimizer.step()
            publisher.publish(order["version"])
    dist.destroy_process_group()


def serve(options: argparse.Namespace, trainer: Any, folder: Path, name: str) -> None:
    """The engine, from version to version."""
    import vllm

    from refit_rl.vllm import update

    llm = vllm.LLM(
        str(folder / "initial"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=8,
        gpu_memory_utilization=0.5,  # the trainer is on this machine too
        weight_transfer_config={"backend": "refit"},
        worker_extension_cls="worker_engine.Worker",  # for what vLLM's workers need on some CPUs
    )
    rendezvous = f"dir:{folder / 'meet'}"
    info = {"rendezvous": rendezvous, "model": name, "prefix_cache": "caller_resets"}
    llm.init_weight_transfer_engine({"init_info": info})
    for version in range(1, options.steps + 1):
        learned = trainer.answer() if version == 1 else trainer.ask(do="step", version=version)
        began = time.monotonic()
        update(llm, version)
        took = time.monotonic() - began
        wanted = [tokens[BEGINNING:] for tokens in learned["tokens"]]
        prompts = [{"prompt_token_ids": tokens[:BEGINNING]} for tokens in learned["tokens"]]
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=len(wanted[0]), ignore_eos=True, detokenize=False)
        said = [list(it.outputs[0].token_ids) for it in llm.generate(prompts, sampling, use_tqdm=False)]
        right = sum(a == b for one, other in zip(said, wanted, strict=True) for a, b in zip(one, other, strict=True))
        loss = "no loss yet" if learned["loss"] is None else f"loss {learned['loss']:.3f}"
        print(
            f"version {version}: {loss}, {right} of {sum(map(len, wanted))} tokens as learned, refresh {took * 1000:.0f} ms",
            flush=True,
        )
    llm.shutdown_weight_transfer_engine()
    llm.llm_engine.engine_core.shutdown()  # its process, which this one would wait for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="versions to publish (default: 10)")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks of the trainer (default: 2)")
    for name in ("--model", "--rendezvous", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--in-fd", "--out-fd"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.set_defaults(pp=1, vpp=1, ep=1, etp=None, overlap=False, te=False, bridge=False)
    options = parser.parse_args()
    if options.model:
        train(options)
        return
    import run

    os.environ.update(run.environment())
    case = run.Case("qwen3", tp=options.tp)
    with tempfile.TemporaryDirectory(prefix="refit-megatron-") as temporary:
        folder = Path(temporary)
        run.initial(case, folder)
        (folder / "meet").mkdir()
        command = [sys.executable, str(Path(__file__).resolve()), f"--tp={options.tp}", *run.common(case, folder)]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(run.free_port()), "WORLD_SIZE": str(options.tp)}
        envs = [run.environment(RANK=str(rank), **address) for rank in range(options.tp)]
        trainer = run.Talk("trainer", [command] * options.tp, envs, folder / "trainer.log")
        try:
            serve(options, trainer, folder, case.name)
        finally:
            trainer.close(30.0)


if __name__ == "__main__":
    main()
