"""From what was written to what the engine computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EngineError, RefusedError
from ..types import PostAction


def actions_of(model: Any, names: Sequence[str]) -> list[PostAction]:
    """What has to be derived behind a refit of these parameters, of a model whose layout does not say so itself."""
    absorbed = {id(it.kv_b_proj) for it in model.modules() if _is_latent(it)}
    latent = [f"{path}.weight" for path, module in model.named_modules() if id(module) in absorbed]
    sinks = [name for name in names if name.rpartition(".")[2] == "sinks"]
    found: list[PostAction] = []
    if latent:
        found.append({"kind": "absorb_mla", "params": latent})
    if sinks:
        found.append({"kind": "copy_sinks", "params": sinks})
    return found


def latent_attention(model: Any) -> list[tuple[str, Any]]:
    """Attention that absorbs a projection into tensors of its own, by name."""
    return [(path, module) for path, module in model.named_modules() if _is_latent(module)]


def views(model: Any, processed: Sequence[tuple[str, Any, Mapping[str, Any]]]) -> list[tuple[Any, Any]]:
    """Tensors that a module has of a child's parameter as it is loaded (`conv_weights` of Mamba), and what that is loaded from.

    They were made as views. Where processing gave the parameter other memory they go on with what was loaded first, and vLLM's
    reload passes them over.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module, tensors in processed:
        owner = modules[path.rpartition(".")[0]]
        for name, tensor in tensors.items():
            live = module._parameters.get(name)
            for held in (*owner._buffers.values(), *vars(owner).values()):
                if hasattr(held, "untyped_storage") and _is_view(held, tensor) and not (live is not None and _share(held, live)):
                    found.append((held, tensor))
    return found


def _is_view(held: Any, tensor: Any) -> bool:
    sides = [[side for side in it.shape if side != 1] for it in (held, tensor)]
    return held.dtype == tensor.dtype and len(sides[0]) > 1 and sides[0] == sides[1]


def _share(one: Any, other: Any) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


def _is_latent(module: Any) -> bool:
    return (
        getattr(module, "kv_b_proj", None) is not None
        and hasattr(module, "kv_lora_rank")
        and hasattr(module, "impl")
        and callable(getattr(module, "process_weights_after_loading", None))
    )


def post_actions(model: Any, actions: Sequence[PostAction], dtype: Any) -> None:
    """Derives anew what the engine computed from its parameters.

    Raises:
        EngineError: a module that an action is about is not there.
        RefusedError: an action that is not known.
    """
    modules = dict(model.named_modules())
    for action in actions:
        if action["kind"] == "absorb_mla":
            for param in action["params"]:
                projection = modules.get(param.rpartition(".")[0])
                owners = [it for it in modules.values() if _is_latent(it) and it.kv_b_proj is projection]
                if projection is None or not owners:
                    raise EngineError(f"no latent attention was found that absorbs `{param}`", tensors=[param])
                for owner in owners:
                    owner.process_weights_after_loading(dtype)
        elif action["kind"] == "copy_sinks":
            for param in action["params"]:
                _copy_sinks(modules, param)
        elif action["kind"] != "drop_caches":
            # Dropping caches is the scheduler's, which no worker reaches: `Receiver` has seen to it that somebody does.
            raise RefusedError(f"this release does not know how to carry out {action['kind']}")


def _copy_sinks(modules: dict[str, Any], param: str) -> None:
    path, _, name = param.rpartition(".")
    owner = modules.get(path)
    sinks = None if owner is None else getattr(owner, name, None)
    if sinks is None:
        raise EngineError(f"`{param}` is not in the engine", tensors=[param])
    for module in owner.modules():
        twin = getattr(getattr(module, "impl", None), "sinks", None)
        if twin is None or twin.data_ptr() == sinks.data_ptr():
            continue
        if twin.shape != sinks.shape:
            raise RefusedError(f"the attention kernel keeps `{param}` in another shape: choose another backend", tensors=[param])
        twin.data.copy_(sinks.data)
