"""A rank of a trainer with DTensors, for tests: `torch_ranks.py STORE MESH INIT_FILE RANK`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import refit_rl.torch

SHAPES = {"even": (8, 6), "uneven": (7, 5), "small": (2, 3), "vector": (10,), "cube": (5, 4, 3)}
RANKS = 4


def value(name: str, shape: tuple[int, ...], version: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count, dtype=torch.float32) + 1000 * version + len(name)).reshape(shape)


def placed(kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if kind == "fsdp":
        return distribute_tensor(tensor, init_device_mesh("cpu", (RANKS,)), [Shard(0)])
    if kind == "tensor":
        last = Shard(tensor.dim() - 1)
        return distribute_tensor(tensor, init_device_mesh("cpu", (2, 2)), [Replicate(), last])
    if kind == "fsdp-and-tensor":
        dims = [Shard(0), Shard(min(1, tensor.dim() - 1))]
        return distribute_tensor(tensor, init_device_mesh("cpu", (2, 2)), dims)
    # Some whole, some replicated by a mesh.
    if name in ("even", "vector"):
        return tensor.clone()
    return distribute_tensor(tensor, init_device_mesh("cpu", (RANKS,)), [Replicate()])


def train(store: str, init: str) -> None:
    """Steps of an optimizer on a module of FSDP2; rank 0 saves what the parameters are, gathered by torch."""
    torch.manual_seed(7)
    module = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in module:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with refit_rl.torch.Publisher(store, module.named_parameters(), model="m") as publisher:
        for version in (1, 2):
            module(torch.full((5, 6), float(dist.get_rank() + version))).sum().backward()
            with publisher.updating(version, timeout=240):
                optimizer.step()
                whole = {name: value.full_tensor().detach() for name, value in module.named_parameters()}
                if dist.get_rank() == 0:
                    torch.save(whole, f"{init}.{version}")
            optimizer.zero_grad()
            if sys.stdin.readline() == "":
                break
        dist.barrier()


def main() -> None:
    store, kind, init, rank = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=RANKS)
    if kind == "fsdp2":
        train(store, init)
        dist.destroy_process_group()
        return
    parameters = {name: placed(kind, name, value(name, shape, 0)) for name, shape in SHAPES.items()}
    with refit_rl.torch.Publisher(store, parameters, model="m") as publisher:
        for version in (1, 2):
            with publisher.updating(version, timeout=240), torch.no_grad():
                for name, shape in SHAPES.items():
                    fresh = placed(kind, name, value(name, shape, version))
                    held = parameters[name]
                    if isinstance(held, DTensor):
                        held.to_local().copy_(fresh.to_local())
                    else:
                        held.copy_(fresh)
            if sys.stdin.readline() == "":
                break
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
