"""Shapes of what goes in and out. Plain data only: nothing here needs the compiled module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict, Union

__all__ = [
    "Config",
    "EngineFacts",
    "LayerFacts",
    "Offer",
    "ParamFacts",
    "PostAction",
    "Report",
    "Shard",
    "Stats",
    "TensorSpec",
    "TrainerFacts",
]

#: A Hugging Face configuration: the parsed `config.json`, the file, or the folder it lies in.
Config = Union[Mapping[str, Any], str, "PathLike[str]"]

#: A tensor as its framework reports it: anything with `shape` and `dtype`, or the pair `(shape, dtype)`. A dtype is torch's,
#: numpy's, or a name: `bfloat16`, `torch.bfloat16` and safetensors' `BF16` are the same.
TensorSpec = Union[Any, tuple[Sequence[int], Any]]


class ParamFacts(TypedDict, total=False):
    """What a trainer says about one parameter. `name`, `class` and `layer` have to be there.

    `class` is a keyword of Python: write `ParamFacts(**{"name": .., "class": .., "layer": ..})` or a plain dict.
    """

    name: str
    #: The class of the layer that holds it, with or without its module.
    layer: str
    #: `is_gtp_weight_remat`.
    gtp_weight_remat: bool
    #: Of a blockwise FP8 tensor: `_is_2D_scaled`.
    scaled_2d: bool


class TrainerFacts(TypedDict, total=False):
    """Settings of a trainer that names and shapes do not show, under Megatron-Core's names. What is left out is off."""

    megatron_fsdp: bool
    gtp_weight_remat_size: int
    moe_single_grouped_weight: bool
    moe_mlp_glu_interleave_size: int | None
    moe_shared_expert_glu_interleave_size: int | None
    overlap_param_gather: bool
    #: Whether parameters are complete in spite of `overlap_param_gather` when they are published.
    params_synced: bool
    reuse_grad_buf_for_mxfp8_param_ag: bool
    params: Sequence[Mapping[str, Any]]


class LayerFacts(TypedDict, total=False):
    """What an engine says about a layer that has a `quant_method`. `name` and `quant_method` have to be there."""

    name: str
    #: The class of its `quant_method`, with or without its module.
    quant_method: str
    #: Of experts: `unquantized_backend` or `fp8_backend` of the `quant_method`. Of blockwise FP8: the class of
    #: `quant_method.fp8_linear`.
    kernel: str | None
    #: The live tensors, which is the default; or such as a checkpoint is loaded into, which the engine processes after every
    #: refit: in the model's type (`load_time`), in e4m3 with a scale for each block, or quantised in another way.
    written: Literal["live", "load_time", "load_time_blocks", "load_time_quantized"]


class EngineFacts(TypedDict, total=False):
    """How an engine keeps what it has loaded, under vLLM's names. What is left out is off."""

    device: Literal["cuda", "rocm", "cpu", "xpu"]
    enable_eplb: bool
    redundant_experts: int
    fused_shared_experts: bool
    layers: Sequence[LayerFacts]


class Shard(TypedDict):
    """One rank's box of a tensor: elements `offsets .. offsets + local_shape` of `global_shape`, contiguous."""

    global_shape: Sequence[int]
    dtype: Any
    offsets: Sequence[int]
    local_shape: Sequence[int]


class PostAction(TypedDict):
    """What an engine derives from parameters, and has to derive anew once they are written.

    - `absorb_mla`: recompute `W_UK_T` and `W_UV` of the layers of these `kv_b_proj.weight`;
    - `copy_sinks`: copy these attention sinks to the f32 twins of them that kernels read;
    - `drop_caches`: drop the prefix cache, running requests' state, and calculated KV-cache scales (`params` is empty).
    """

    kind: Literal["absorb_mla", "copy_sinks", "drop_caches"]
    params: list[str]


class Report(TypedDict):
    """One refresh."""

    version: int
    #: The group that it was read from; `None` where nothing was read, because it was there already.
    group: str | None
    #: The size of the rank's parameters.
    bytes: int
    #: What crossed the wire, and how much of it was needed: equal where nothing is read beside what is wanted.
    wire_bytes: int
    needed_bytes: int
    #: Reads posted.
    reads: int
    #: By stage: `transfer_planning`, `setup_registration`, `wire_transfer`, `transformation`, and `total` of the whole
    #: call, waiting for offers and for other ranks included.
    seconds: dict[str, float]
    #: Attempts that failed, by cause: `torn`, `stale`, `vanished`, `late`, `damaged`, `refused`, `failed`,
    #: `quarantined`, `lost`. Causes that did not happen are left out.
    retries: dict[str, int]
    #: How often the rank joined again because the store had taken its process for dead.
    rejoins: int
    #: What was carried out by the target's `post_actions`.
    post_actions: list[PostAction]


class Offer(TypedDict):
    """A version that somebody offers."""

    version: int
    group: str


class Stats(TypedDict):
    """Counters since the object was made."""

    #: Of a source, and of a target that is a relay.
    commits: int
    reader_waits: int
    reader_wait_seconds: float
    leases_expired: int
    #: Of a target.
    refits: int
    installs: int
    aborts: int
    crowded: int
    retries: dict[str, int]
    pulls: int
    wire_bytes: int
    needed_bytes: int
    reads: int
    seconds: dict[str, float]
    #: Of both.
    rejoins: int
    pool_bytes: int
    registrations: int
    quarantined_bytes: int
