"""One rank of a real Megatron-Core trainer, which publishes after every step. `run.py` starts all of them.

Rank 0 takes orders from a pipe, an object of JSON a line, and passes them on:
`{"do": "step", "version": 1}`: train a step, publish, and leave every parameter in a file; `{"do": "stop"}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Where it trains: a GPU for each rank, where there are GPUs.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Tokens of a sequence, sequences of a batch, and how often the optimizer writes before a version is published: enough that the
#: model knows its batch by heart. Then the best next token is no matter of rounding.
SEQUENCE, SEQUENCES, UPDATES = 24, 2, 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of config.json")
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--dump", required=True, help="folder for what every rank holds, for the reference")
    parser.add_argument("--in-fd", type=int)
    parser.add_argument("--out-fd", type=int)
    parser.add_argument("--overlap", action="store_true", help="overlap_param_gather")
    for size in ("tp", "pp", "ep"):
        parser.add_argument(f"--{size}", type=int, default=1)
    return parser.parse_args()


def build(options: argparse.Namespace, config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model in its wrappers, its configuration and its optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    import models

    sizes = {
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": 1 if options.ep > 1 else options.tp,
    }
    parallel_state.initialize_model_parallel(**sizes)
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    of_model = models.megatron(config)
    transformer = TransformerConfig(
        **of_model,
        **sizes,
        activation_func=torch.nn.functional.silu,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # What these fuse are kernels for GPUs.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    transformer.finalize_model_grads_func = finalize_model_grads
    model: Any = GPTModel(
        transformer,
        get_gpt_layer_local_spec(
            num_experts=of_model.get("num_moe_experts"),
            qk_layernorm=of_model["qk_layernorm"],
            normalization="RMSNorm",
        ),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rope_theta"],
    )
    model = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_param_gather=options.overlap,
            overlap_grad_reduce=options.overlap,
        ),
        Float16Module(transformer, model.to(DEVICE)),
    )
    # Copies begin equal; on a real trainer a checkpoint sees to that.
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=options.overlap,
        ),
        [model],
    )
    return model, transformer, optimizer


def batch(seed: int, vocabulary: int) -> torch.Tensor:
    """Tokens and, one further, what is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (SEQUENCES, SEQUENCE + 1), generator=generator).to(DEVICE)


def forward_backward(model: Any, tokens: torch.Tensor, *, forward_only: bool) -> float | None:
    """Megatron's own schedule. The loss, where the last stage is."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(_: Any, of: Any) -> Any:
        positions = torch.arange(SEQUENCE, device=DEVICE).expand(SEQUENCES, -1)
        mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=DEVICE), 1)
        output = of(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous())

        def loss(losses: torch.Tensor) -> Any:
            mean = losses.float().mean()
            return mean, {"loss": mean.item()}

        return output, loss

    reduced = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=SEQUENCES,
        forward_only=forward_only,
    )
    return reduced[0]["loss"] if reduced else None


def dump(model: Any, folder: Path) -> None:
    """What this rank holds, under Megatron's names and without any help of refit's."""
    from megatron.core import parallel_state as state

    inner = model.module.module
    torch.save(
        {
            "tp": state.get_tensor_model_parallel_rank(),
            "pp": state.get_pipeline_model_parallel_rank(),
            "ep": state.get_expert_model_parallel_rank(),
            "dp": state.get_data_parallel_rank(),
            "layers": [layer.layer_number - 1 for layer in inner.decoder.layers],
            "params": {name: param.detach().cpu().clone() for name, param in inner.named_parameters()},
        },
        folder / f"rank{dist.get_rank()}.pt",
    )


def everywhere(value: Any, source: int) -> Any:
    """An object of one rank, on all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def step(model: Any, optimizer: Any, publisher: Any, version: int, options: Any, config: Any) -> dict[str, Any]:
    tokens = batch(version, config["vocab_size"])
    losses, waited = [], 0.0
    for _ in range(UPDATES):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(forward_backward(model, tokens, forward_only=False))
        began = time.monotonic()
        publisher.before_step()
        waited += time.monotonic() - began
        done, _, _ = optimizer.step()
        if not done:
            raise SystemExit("the optimizer made no step")
    publisher.publish(version)
    with torch.no_grad():
        after = forward_backward(model, tokens, forward_only=True)
    folder = Path(options.dump) / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    dump(model, folder)
    dist.barrier()
    last = dist.get_world_size() - 1
    said = {"version": version, "loss": losses[0], "loss_after": after, "tokens": tokens.tolist(), "waited": waited}
    # The last rank is of the last stage, which has the loss.
    return everywhere(said, last)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group("nccl")
    else:
        import cpu

        cpu.enter()
        dist.init_process_group("gloo")
    config = json.loads((Path(options.model) / "config.json").read_text())
    model, _, optimizer = build(options, config)

    from refit_rl.megatron import Publisher

    orders = os.fdopen(options.in_fd, "r") if dist.get_rank() == 0 else None
    answers = os.fdopen(options.out_fd, "w", buffering=1) if dist.get_rank() == 0 else None

    def answer(what: dict[str, Any]) -> None:
        if answers is not None:
            print(json.dumps(what), file=answers, flush=True)

    with Publisher(model, options.model, rendezvous=options.rendezvous, model=options.name) as publisher:
        place = publisher.place
        answer({"ready": True, "copies": place.copies, "ranks": place.ranks})
        while True:
            order = everywhere(json.loads(orders.readline() or '{"do": "stop"}') if orders else None, 0)
            if order["do"] == "stop":
                break
            answer(step(model, optimizer, publisher, order["version"], options, config))
        answer({"stopped": True, "stats": publisher.stats()})
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
