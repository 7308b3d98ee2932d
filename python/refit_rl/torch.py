"""Trainers whose parameters are torch's own: FSDP2, any other user of `DTensor`, or plain modules.

torch is imported when a `Publisher` is made, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from . import layouts
from ._core import Layout, Source
from .errors import LayoutError
from .types import Stats

if TYPE_CHECKING:
    import torch

__all__ = ["Publisher", "shards"]


class Publisher:
    """One rank of a trainer whose parameters are torch tensors, whole or sharded by `DTensor`.

    ::

        publisher = Publisher("etcd:http://store:2379", model.named_parameters(), model="qwen3-4b")
        for version in range(1, steps):
            loss.backward()
            with publisher.updating(version):
                optimizer.step()

    Each rank publishes the shard that it holds, so nothing is gathered. A tensor that several ranks hold (replicated
    placements, or no `DTensor` at all) is published by each of them, and engines share their reads out among these. Every
    rank has to make a publisher, and to commit every version.

    FSDP2 keeps its shards in `DTensor`s in place: between `backward` and `step` they are what `named_parameters` gives.
    Whatever makes new ones (`model.to(..)`, `fully_shard` once more, CPU offload that moves parameters) needs a new publisher.

    Args:
        rendezvous: as for `Source`.
        parameters: names and tensors, such as `model.named_parameters()`. Of several names of one tensor (tied
            embeddings) the first counts.
        model: the model's name at the rendezvous.
        rename: the name in the checkpoint's terms (Hugging Face's) of one of these, or `None` to leave it out. Left out:
            `_orig_mod.`, `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` are taken off.
        rank, ranks: this process's rank and how many there are; those of `torch.distributed` by default, or 0 of 1.
        options: as for `Source`: `group`, `job`, `key_file`, `transport`, `insecure_tcp`, `timeout`, `ttl`, `lease`, `drain`.

    Raises:
        LayoutError: a placement that is no shard (`Partial`); two tensors of one name.
        TensorError: parameters that are not contiguous, or on several devices.
    """

    def __init__(
        self,
        rendezvous: str,
        parameters: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
        *,
        model: str,
        rename: Callable[[str], str | None] | None = None,
        rank: int | None = None,
        ranks: int | None = None,
        **options: Any,
    ) -> None:
        import torch

        here, world = _world(torch)
        boxes, tensors = shards(parameters, rename)
        #: What this rank holds.
        self.layout: Layout = layouts.shards(boxes, rank=here if rank is None else rank)
        held = {name: tensors[name] for name in self.layout.names}
        #: What does the work.
        self.source: Source = Source(
            rendezvous, self.layout, held, model=model, ranks=world if ranks is None else ranks, **options
        )

    @property
    def version(self) -> int | None:
        """The version on offer."""
        return self.source.version

    def updating(self, version: int | None = None, timeout: float = 30.0) -> AbstractContextManager[Source]:
        """Around whatever writes the parameters, `optimizer.step()` as a rule; see `Source.updating`."""
        return self.source.updating(version, timeout)

    def begin_update(self, timeout: float = 30.0) -> None:
        """Waits until nobody reads; see `Source.begin_update`."""
        self.source.begin_update(timeout)

    def commit(self, version: int) -> None:
        """Offers what was written; see `Source.commit`, which waits for the device."""
        self.source.commit(version)

    def publish(self, version: int, timeout: float = 30.0) -> None:
        """Offers what the parameters hold; see `Source.publish`."""
        self.source.publish(version, timeout)

    def stats(self) -> Stats:
        """Counters; see `Source.stats`."""
        return self.source.stats()

    def close(self, timeout: float | None = None) -> int:
        """Withdraws what is on offer; see `Source.close`."""
        return self.source.close(timeout)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shards(
    parameters: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    rename: Callable[[str], str | None] | None = None,
) -> tuple[dict[str, tuple[tuple[int, ...], Any, tuple[int, ...], tuple[int, ...]]], dict[str, torch.Tensor]]:
    """What `layouts.shards` and `Source` take, of named parameters: this rank's boxes, and the tensors that hold them."""
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    boxes: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for given, parameter in pairs:
        name = _plain(given) if rename is None else rename(given)
        if name is None:
            continue
        if name in boxes:
            raise LayoutError(f"two parameters are called `{name}`, the second of them `{given}`", [name])
        if id(parameter) in seen:
            continue
        seen[id(parameter)] = name
        boxes[name], tensors[name] = _shard(name, parameter)
    return boxes, tensors


#: What wrappers put into names.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _shard(name: str, parameter: torch.Tensor) -> tuple[tuple[Any, ...], torch.Tensor]:
    shape = tuple(parameter.shape)
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return (shape, parameter.dtype, (0,) * len(shape), shape), parameter.detach()
    # The sum of what several ranks hold is in no rank's memory.
    if any(placement.is_partial() for placement in placements):
        raise LayoutError(
            f"`{name}` is placed as {tuple(placements)}: redistribute partial tensors before they are published", [name]
        )
    local = parameter.to_local().detach()
    held, offsets = _box(parameter)
    if tuple(local.shape) != held:
        raise LayoutError(
            f"`{name}` holds {tuple(local.shape)} of {shape}, and its placements {tuple(placements)} say {held}", [name]
        )
    return (shape, parameter.dtype, offsets, held), local


def _box(parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Extents and offsets of the local box, by torch's own arithmetic: uneven shards and FSDP over tensor parallelism follow
    rules that are not written down here."""
    from importlib import import_module

    try:
        utilities: Any = import_module("torch.distributed.tensor._utils")
    except ImportError:  # torch before 2.5
        utilities = import_module("torch.distributed._tensor._utils")
    held, offsets = utilities.compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(held), tuple(offsets)


def _world(torch: Any) -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
