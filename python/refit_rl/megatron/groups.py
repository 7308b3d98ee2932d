"""Which part of the model a rank has, and which ranks together have all of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError, LayoutError

__all__ = ["Coordinates", "Place", "coordinates", "gather", "place"]


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in Megatron-Core's groups.

    Dense layers and routed experts factor the ranks each in their own way, so nothing of one is derived from the other.
    Data and context parallel ranks hold copies: they do not appear.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1

    def arguments(self) -> dict[str, int]:
        """As keyword arguments of `refit_rl.layouts.megatron`."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where a rank publishes."""

    #: Number of the copy of the model, from 0.
    copy: int
    #: How many copies there are.
    copies: int
    #: The rank's number in its copy, from 0.
    rank: int
    #: How many ranks the copy has.
    ranks: int


# `ProcessGroupCollection`'s name of a group, and `parallel_state`'s of the functions that tell rank and size.
_GROUPS = {
    "tp": ("tp", "tensor_model_parallel"),
    "pp": ("pp", "pipeline_model_parallel"),
    "ep": ("ep", "expert_model_parallel"),
    "etp": ("expt_tp", "expert_tensor_parallel"),
}


def coordinates(module: Any) -> Coordinates:
    """The coordinates of the rank that has this module, of a `GPTModel` or `HybridModel`.

    They come from the groups that the module was built with (`pg_collection`). Groups that it does not carry are those of
    `parallel_state`; where that is not in use either, the rank is alone in them.
    """
    collection = getattr(module, "pg_collection", None)
    # Whoever uses it has imported it.
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and not state.model_parallel_is_initialized():
        state = None
    found: dict[str, int] = {}
    for name, (field, function) in _GROUPS.items():
        group = getattr(collection, field, None)
        if group is not None:
            rank, size = group.rank(), group.size()
        elif state is not None:
            rank = getattr(state, f"get_{function}_rank")()
            size = getattr(state, f"get_{function}_world_size")()
        else:
            rank, size = 0, 1
        found[f"{name}_rank"], found[f"{name}_size"] = rank, size
    return Coordinates(**found)


def gather(own: Coordinates, process_group: Any = None) -> tuple[int, list[Coordinates]]:
    """This rank's number and the coordinates of all ranks of the trainer: a collective over `process_group` (by default all
    processes that `torch.distributed` knows)."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, [own]
    every: list[Any] = [None] * distributed.get_world_size(process_group)
    distributed.all_gather_object(every, own, group=process_group)
    return distributed.get_rank(process_group), every


def place(every: Sequence[Coordinates], rank: int) -> Place:
    """In which copy of the model a rank publishes, and as what.

    Of every pipeline stage a copy has equally many ranks, consecutive ones, as few as have all shards of dense layers and all
    experts between them. That follows the order in which Megatron-Core numbers ranks whatever its `order` says, since it is
    the shards that are counted.

    Raises:
        LayoutError: stages of different sizes, or shards that nobody has.
    """
    own = every[rank]
    sizes = [field.name for field in fields(Coordinates) if field.name.endswith("_size")]
    for number, other in enumerate(every):
        if any(getattr(other, size) != getattr(own, size) for size in sizes):
            raise LayoutError(
                f"rank {number} says {other}, rank {rank} says {own}: the sizes of all ranks of a trainer have to be "
                "equal. Give `process_group` if other processes than this trainer's are in the default one",
                ranks=(number, rank),
            )
    stages = [
        [number for number, at in enumerate(every) if at.pp_rank == stage] for stage in range(own.pp_size)
    ]
    counts = {len(stage) for stage in stages}
    if len(counts) != 1:
        raise LayoutError(f"pipeline stages have {sorted(counts)} ranks: they have to have equally many")
    (count,) = counts
    for block in (size for size in range(1, count + 1) if count % size == 0):
        cuts = [stage[at : at + block] for stage in stages for at in range(0, count, block)]
        if all(_complete([every[number] for number in cut]) for cut in cuts):
            break
    else:
        raise LayoutError(
            f"of {count} ranks of a pipeline stage none has some shard of dense layers or experts: {every}"
        )
    index = stages[own.pp_rank].index(rank)
    return Place(
        copy=index // block,
        copies=count // block,
        rank=own.pp_rank * block + index % block,
        ranks=own.pp_size * block,
    )


def _complete(ranks: Sequence[Coordinates]) -> bool:
    """Whether these ranks of a stage have all of it."""
    one = ranks[0]
    dense = {at.tp_rank for at in ranks}
    experts = {(at.ep_rank, at.etp_rank) for at in ranks}
    return len(dense) == one.tp_size and len(experts) == one.ep_size * one.etp_size


def group_name(group: str, where: Place) -> str:
    """The name of the group that a copy of the model commits as: `trainer`, or of several copies `trainer-0`, `trainer-1`, .."""
    if not group:
        raise ConfigError("`group` is empty: say under which name the trainer publishes")
    return group if where.copies == 1 else f"{group}-{where.copy}"
