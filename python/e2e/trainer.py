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
SEQUENCE, SEQUENCES, UPDATES = 24, 2, 24


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of config.json")
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--dump", required=True, help="folder for what every rank holds, for the reference")
    parser.add_argument("--in-fd", type=int)
    parser.add_argument("--out-fd", type=int)
    parser.add_argument("--overlap", action="store_true", help="overlap_param_gather")
    parser.add_argument(
        "--te", action="store_true", help="layers of Transformer Engine, as python/e2e/te stands in for it"
    )
    parser.add_argument("--bridge", action="store_true", help="Megatron-Bridge builds the model from the checkpoint")
    for size in ("tp", "pp", "vpp", "ep"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--etp", type=int, help="tensor parallelism of experts, if not that of everything else")
    return parser.parse_args()


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "virtual_pipeline_model_parallel_size": options.vpp if options.vpp > 1 else None,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.etp,
    }


def parallel(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `TransformerConfig` about the ranks."""
    import models

    # Megatron-Core trains experts under tensor parallelism in no other way.
    sequences = models.experts(config) is not None and options.tp > 1
    return {**sizes(options), "sequence_parallel": sequences, "pipeline_dtype": torch.bfloat16}


def build(options: argparse.Namespace, config: dict[str, Any]) -> tuple[list[Any], Any]:
    """The chunks of the model in their wrappers, and their optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import bridge

    parallel_state.initialize_model_parallel(**sizes(options))
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    if DEVICE == "cuda":
        model_parallel_cuda_manual_seed(1)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_param_gather=options.overlap,
        overlap_grad_reduce=options.overlap,
    )
    if options.bridge:
        model = bridge.build(options.model, parallel(options, config), ddp)
    else:
        model = wrapped(chunks(options, config), ddp)
    for chunk in model:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=4e-3,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=options.overlap,
        ),
        model,
    )
    return model, optimizer


def wrapped(bare: list[Any], ddp: Any) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    model = []
    for number, chunk in enumerate(bare):
        inner = Float16Module(chunk.config, chunk.to(DEVICE))
        model.append(DistributedDataParallel(chunk.config, ddp, inner, disable_bucketing=number > 0))
    # Copies begin equal; on a real trainer a checkpoint sees to that.
    for chunk in model:
        chunk.broadcast_params()
    return model


def chunks(options: argparse.Namespace, config: dict[str, Any]) -> list[Any]:
    """What a rank has of the model: one module, or with virtual pipeline stages several."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import TransformerConfig

    import models

    of_model = models.megatron(config)
    experts = of_model.get("num_moe_experts")
    transformer = TransformerConfig(
        **of_model,
        **parallel(options, config),
        activation_func=torch.nn.functional.silu,
        bf16=True,
        params_dtype=torch.bfloat16,
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
    if options.te:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=True, qk_layernorm=of_model["qk_layernorm"]
        )
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=experts, qk_layernorm=of_model["qk_layernorm"], normalization="RMSNorm"
        )
    return [
        GPTModel(
            transformer,
            spec,
            vocab_size=models.vocabulary(config, options.tp),
            max_sequence_length=config["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            position_embedding_type="rope",
            rotary_base=config["rope_theta"],
            vp_stage=number if options.vpp > 1 else None,
        )
        for number in range(options.vpp)
    ]


def batch(seed: int, vocabulary: int) -> torch.Tensor:
    """Tokens and, one further, what is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (SEQUENCES, SEQUENCE + 1), generator=generator).to(DEVICE)


def forward_backward(model: list[Any], tokens: torch.Tensor, *, forward_only: bool) -> float | None:
    """Megatron's own schedule. The loss, where the last stage is."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # The schedule of virtual stages wants a batch for every pipeline stage.
    batches = tokens.chunk(model[0].config.pipeline_model_parallel_size if len(model) > 1 else 1)

    def forward(data: Any, of: Any) -> Any:
        part = next(data)
        positions = torch.arange(SEQUENCE, device=DEVICE).expand(len(part), -1)
        mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=DEVICE), 1)
        output = of(part[:, :-1], positions, mask, labels=part[:, 1:].contiguous())

        def loss(losses: torch.Tensor) -> Any:
            mean = losses.float().mean()
            return mean, {"loss": mean.item()}

        return output, loss

    data = [iter(batches) for _ in model]
    reduced = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=data if len(model) > 1 else data[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=len(batches[0]),
        forward_only=forward_only,
    )
    return sum(part["loss"] for part in reduced) / len(reduced) if reduced else None


def leave(model: list[Any], options: argparse.Namespace, version: int) -> None:
    """A version in files: what each rank holds, and what Bridge makes of it."""
    folder = Path(options.dump) / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    dump(model, folder)
    if options.bridge:
        import bridge

        bridge.export(options.model, model, folder / "bridge.safetensors")
    dist.barrier()


def dump(model: list[Any], folder: Path) -> None:
    """What this rank holds, under Megatron's names and without any help of refit's."""
    from megatron.core import parallel_state as state

    inner = [chunk.module.module for chunk in model]
    torch.save(
        {
            "tp": state.get_tensor_model_parallel_rank(),
            "pp": state.get_pipeline_model_parallel_rank(),
            "ep": state.get_expert_model_parallel_rank(),
            "etp": state.get_expert_tensor_parallel_rank(),
            "dp": state.get_data_parallel_rank(),
            "chunks": [
                {
                    "layers": [layer.layer_number - 1 for layer in chunk.decoder.layers],
                    "params": {name: param.detach().cpu().clone() for name, param in chunk.named_parameters()},
                }
                for chunk in inner
            ],
        },
        folder / f"rank{dist.get_rank()}.pt",
    )


def everywhere(value: Any, source: int) -> Any:
    """An object of one rank, on all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def step(model: list[Any], optimizer: Any, publisher: Any, version: int, options: Any, config: Any) -> dict[str, Any]:
    tokens = batch(version, config["vocab_size"])
    losses, waited = [], 0.0
    for _ in range(UPDATES):
        for chunk in model:
            chunk.zero_grad_buffer()
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
    leave(model, options, version)
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
    model, optimizer = build(options, config)

    from refit_rl.megatron import Publisher

    if options.bridge:
        leave(model, options, 0)
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
