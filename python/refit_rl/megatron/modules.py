"""Reads what a rank of a Megatron-Core trainer holds from its modules.

Nothing is computed that a module can tell: names repeat from stage to stage, so the number of a layer in the whole model is
its `layer_number`, whatever rule cut the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import LayoutError, RefusedError

__all__ = ["Held", "Span", "unwrap", "walk", "wrappers"]

#: The two names of a tied embedding on a rank that has both ends of the model.
_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
#: Settings of the model's configuration that change what parameters are, and from what value on.
_SETTINGS = (
    "moe_single_grouped_weight",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
)


@dataclass(frozen=True)
class Span:
    """Where a parameter lies: it must not move while it is published."""

    begin: int
    nbytes: int

    @classmethod
    def of(cls, tensor: Any) -> Span:
        return cls(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@dataclass
class Held:
    """What a rank holds, under the names that `refit_rl.layouts.megatron` knows."""

    #: Parameters: the trainer's own tensors.
    parameters: dict[str, Any] = field(default_factory=dict)
    #: Persistent buffers: the module and the attribute, since forward passes put other tensors in their place.
    buffers: dict[str, tuple[Any, str]] = field(default_factory=dict)
    #: Per model chunk the numbers of its layers in the whole model, from 0.
    chunks: list[list[int]] = field(default_factory=list)
    #: Numbers of the layers that predict tokens further ahead, from 0.
    mtp: list[int] = field(default_factory=list)
    #: `refit_rl.types.ParamFacts` of parameters.
    params: list[dict[str, Any]] = field(default_factory=list)
    #: Settings that names and shapes do not show, as of `refit_rl.types.TrainerFacts`.
    settings: dict[str, Any] = field(default_factory=dict)

    def facts(self, *, params_synced: bool) -> dict[str, Any]:
        return {**self.settings, "params_synced": params_synced, "params": self.params}

    def specs(self) -> dict[str, Any]:
        """Every tensor's shape and type, for a layout."""
        found = {name: (tuple(it.shape), it.dtype) for name, it in self.parameters.items()}
        for name, (module, attribute) in self.buffers.items():
            buffer = getattr(module, attribute)
            found[name] = (tuple(buffer.shape), buffer.dtype)
        return found


def walk(model_chunks: Any) -> Held:
    """What a rank holds.

    Args:
        model_chunks: the rank's model, or with virtual pipeline stages the list of its chunks, as Megatron's `get_model` gives
            them back: in their wrappers (`DistributedDataParallel`, `Float16Module`), which say how parameters are synced.

    Raises:
        RefusedError: a setting under which parameters are not what their names say; it says what to change.
        LayoutError: modules that are not those of a `GPTModel` or `HybridModel`.
    """
    chunks = list(model_chunks) if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    if not chunks:
        raise LayoutError("`model_chunks` is empty: pass the rank's model, or the list of its chunks")
    held = Held()
    for number, chunk in enumerate(chunks):
        _walk_chunk(held, chunk, f"model{number}." if len(chunks) > 1 else "")
    return held


def wrappers(chunk: Any) -> Iterator[Any]:
    """The module and what it wraps, from the outside to the inside."""
    while chunk is not None:
        yield chunk
        chunk = getattr(chunk, "module", None)


def unwrap(chunk: Any) -> Any:
    """The model in its wrappers."""
    *_, model = wrappers(chunk)
    return model


def _walk_chunk(held: Held, chunk: Any, prefix: str) -> None:
    model = unwrap(chunk)
    decoder = getattr(model, "decoder", None)
    if decoder is None or not hasattr(decoder, "layers"):
        raise LayoutError(
            f"{type(model).__qualname__} has no `decoder.layers`: pass a GPTModel or a HybridModel; of a multimodal model "
            "its language model"
        )
    held.chunks.append(_numbers(decoder.layers))
    predicting = getattr(getattr(model, "mtp", None), "layers", None)
    if predicting is not None:
        held.mtp.extend(_numbers(predicting))
    _settings(held.settings, chunk, model)
    seen: dict[int, str] = {}
    for path, module in model.named_modules():
        for attribute, tensor in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if _is_copy(seen, name, tensor):
                continue
            for full, part in _parts(prefix + name, tensor):
                held.parameters[full] = part
            held.params.append(_facts(prefix + name, tensor, module))
        # A router keeps its bias in f32, but casts it back only in its first forward pass.
        restore = getattr(module, "_maintain_float32_expert_bias", None)
        if restore is not None:
            restore()
        transient = getattr(module, "_non_persistent_buffers_set", ())
        for attribute, buffer in module.named_buffers(recurse=False):
            if buffer is not None and attribute not in transient:
                name = f"{path}.{attribute}" if path else attribute
                held.buffers[prefix + name] = (module, attribute)


def _numbers(layers: Iterable[Any]) -> list[int]:
    found = []
    for local, layer in enumerate(layers):
        number = getattr(layer, "layer_number", None)
        if not isinstance(number, int) or number < 1:
            raise LayoutError(
                f"layer {local} of the rank, {type(layer).__qualname__}, has `layer_number` {number}: Megatron-Core's "
                "layers have their number in the whole model there, from 1"
            )
        found.append(number - 1)
    return found


def _is_copy(seen: dict[int, str], name: str, tensor: Any) -> bool:
    """Whether this is the tied head, which is one tensor with the embedding."""
    first = seen.setdefault(id(tensor), name)
    if first == name:
        return False
    if {first, name} == set(_TIED):
        return True
    raise LayoutError(f"`{first}` and `{name}` are one tensor: only embedding and head may be tied", (first, name))


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """A parameter, or the two tensors that a blockwise quantised one is made of."""
    if type(tensor).__name__ == "Float8BlockwiseQTensor":
        yield name, tensor._rowwise_data
        yield f"{name}_scale_inv", tensor._rowwise_scale_inv
    else:
        # Its own bytes, without the graph that it is part of.
        yield name, tensor.detach() if hasattr(tensor, "detach") else tensor


def _facts(name: str, tensor: Any, module: Any) -> dict[str, Any]:
    def path(of: Any) -> str:
        return f"{type(of).__module__}.{type(of).__qualname__}"

    return {
        "name": name,
        "class": path(tensor),
        "layer": path(module),
        "gtp_weight_remat": bool(getattr(tensor, "is_gtp_weight_remat", False)),
        "scaled_2d": bool(getattr(tensor, "_is_2D_scaled", False)),
    }


def _settings(settings: dict[str, Any], chunk: Any, model: Any) -> None:
    """What the configurations of a chunk and of its wrappers say. What one chunk has all have."""
    config = getattr(model, "config", None)
    for name in _SETTINGS:
        value = getattr(config, name, None)
        # No interleaving is `None`, no grouping `False`.
        if value is not None and value is not False:
            settings[name] = value
    shards = [getattr(config, name, 1) or 1 for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")]
    settings["gtp_weight_remat_size"] = max(*shards, settings.get("gtp_weight_remat_size", 1))
    ddp = next((it.ddp_config for it in wrappers(chunk) if hasattr(it, "ddp_config")), None)
    if ddp is None:
        _refuse_hidden(model)
        return
    flags = {
        "megatron_fsdp": "use_megatron_fsdp",
        "overlap_param_gather": "overlap_param_gather",
        "reuse_grad_buf_for_mxfp8_param_ag": "reuse_grad_buf_for_mxfp8_param_ag",
    }
    if getattr(ddp, "overlap_param_gather", False) and not getattr(ddp, "use_distributed_optimizer", True):
        raise RefusedError(
            "overlap_param_gather without use_distributed_optimizer (the layer-wise optimizer) completes parameters in the "
            "next forward pass only: set overlap_param_gather to false"
        )
    for fact, name in flags.items():
        settings[fact] = bool(settings.get(fact)) or bool(getattr(ddp, name, False))


def _refuse_hidden(model: Any) -> None:
    """Without its wrapper a model does not say how its parameters are synced."""
    for name, tensor in model.named_parameters():
        if getattr(tensor, "main_grad", None) is not None:
            raise RefusedError(
                f"`{name}` is in a buffer of DistributedDataParallel, but the model was passed without that wrapper, which "
                "says when parameters are complete: pass the chunks as `get_model` gives them back",
                (name,),
            )


def moved(parameters: dict[str, Any], model_chunks: Sequence[Any], spans: dict[str, Span]) -> list[str]:
    """Names of parameters whose memory is not where it was: somebody replaced `param.data`."""
    several = len(model_chunks) > 1
    found = []
    for number, chunk in enumerate(model_chunks):
        prefix = f"model{number}." if several else ""
        for name, tensor in unwrap(chunk).named_parameters():
            for full, part in _parts(prefix + name, tensor):
                if full in parameters and Span.of(part) != spans[full]:
                    found.append(full)
    return found
