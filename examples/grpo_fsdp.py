"""The loop of GRPO, small: vLLM samples groups of answers, FSDP2 learns from them, and refit moves the weights after every step.

    target/setup/e2e/bin/python examples/grpo_fsdp.py          # after `cargo xtask e2e`, which sets that Python up

Two trainer ranks and an engine, each a process of its own, on one machine and without a GPU. The model is tiny and knows nothing;
the reward is the share of tokens below 128, so that a few steps show whether what the trainer learned is what the engine says.
On a cluster the rendezvous is `etcd:..`, and the engine one of your own (docs/python.md); the lines about refit stay the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python/e2e"))

RANKS, GROUP, TOKENS = 2, 8, 12
PROMPTS = [[1, 2, 3], [50, 60, 70], [200, 100, 30], [9, 8, 7]]


def reward(answer: list[int]) -> float:
    return sum(token < 128 for token in answer) / len(answer)


def advantages(rewards: list[float]) -> list[float]:
    """Of a group: how much better than its mean each answer is."""
    spread = statistics.pstdev(rewards) or 1.0
    return [(one - statistics.mean(rewards)) / spread for one in rewards]


def learn(options: argparse.Namespace) -> None:
    """A rank of the trainer."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from refit_rl.torch import Publisher

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="eager")
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    orders = os.fdopen(options.in_fd) if rank == 0 else None
    answers = os.fdopen(options.out_fd, "w", buffering=1) if rank == 0 else None
    with Publisher(options.rendezvous, model.named_parameters(), model=options.name) as publisher:
        publisher.publish(1)
        while True:
            box: list[Any] = [json.loads(orders.readline() or '{"do": "stop"}') if orders else None]
            dist.broadcast_object_list(box)
            order = box[0]
            if order["do"] == "stop":
                break
            # Each rank learns from its share of the answers.
            ids = torch.tensor([row[0] + row[1] for row in order["rows"]][rank::RANKS])
            gain = torch.tensor([row[2] for row in order["rows"]][rank::RANKS])
            start = len(order["rows"][0][0])
            logits = model(ids[:, :-1]).logits.float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, start - 1 :]
            loss = -(gain[:, None] * chosen).mean()
            loss.backward()
            with publisher.updating(order["version"]):  # waits until no engine reads the last version
                optimizer.step()
            optimizer.zero_grad()
            if answers:
                print(json.dumps({"loss": loss.item()}), file=answers, flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="versions to publish (default: 6)")
    for name in ("--model", "--rendezvous", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--in-fd", "--out-fd"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        learn(options)
        return
    import run

    case = run.Case("qwen3")
    with tempfile.TemporaryDirectory(prefix="refit-grpo-") as temporary:
        folder = Path(temporary)
        run.initial(case, folder)
        (folder / "meet").mkdir()
        command = [sys.executable, str(Path(__file__).resolve()), *run.common(case, folder)]
        port = str(run.free_port())
        envs = [
            run.environment(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in range(RANKS)
        ]
        trainer = run.Talk("trainer", [command] * RANKS, envs, folder / "trainer.log")
        try:
            with run.serving(case, folder) as engine:
                engine.answer()
                loop(trainer, engine, options.steps)
        finally:
            trainer.close(30.0)


def loop(trainer: Any, engine: Any, steps: int) -> None:
    for version in range(1, steps + 1):
        refreshed = engine.ask(do="refresh", version=version)
        said = engine.ask(do="generate", prompts=PROMPTS, max_tokens=TOKENS, n=GROUP, temperature=1.0)["tokens"]
        rows, rewards = [], []
        for number, prompt in enumerate(PROMPTS):
            group = said[number * GROUP : (number + 1) * GROUP]
            earned = [reward(answer) for answer in group]
            rewards += earned
            rows += [[prompt, answer, gain] for answer, gain in zip(group, advantages(earned), strict=True)]
        print(
            f"version {version}: mean reward {statistics.mean(rewards):.3f}, "
            f"refresh {refreshed['seconds'] * 1000:.0f} ms",
            flush=True,
        )
        if version < steps:
            trainer.ask(do="learn", version=version + 1, rows=rows)


if __name__ == "__main__":
    main()
