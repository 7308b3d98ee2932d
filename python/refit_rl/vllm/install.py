"""From what was written to what the engine computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import EngineError, RefusedError
from ..types import PostAction


def process(module: Any, tensors: dict[str, Any], parameter: Any) -> None:
    """Puts load-time tensors into a module and has its `quant_method` process them, as behind loading a checkpoint.

    What is staged is written again by the next pull, so the module gets copies: some kernels keep what they are given.

    Args:
        parameter: makes a parameter of a tensor.
    """
    for name, tensor in tensors.items():
        before = module._parameters[name]
        fresh = parameter(tensor.clone())
        fresh.__dict__.update(before.__dict__)
        if before.shape == fresh.shape and before.dtype == fresh.dtype:
            # Same memory, so that a tied twin has it too.
            before.data.copy_(fresh.data)
        else:
            module._parameters[name] = fresh
    method = module.quant_method
    if getattr(method, "moe_kernel", None) is not None:
        # With a kernel there already, vLLM 0.32 takes the weights for an update of packed ones and leaves them unpacked.
        method.moe_kernel = None
    method.process_weights_after_loading(module)


def sharers(model: Any, staged: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    """Modules that share a staged parameter with another one (a tied head), and pack a copy of it of their own."""
    owners = {id(module) for module, _ in staged}
    shared = {id(module._parameters[name]) for module, tensors in staged for name in tensors}
    return [
        module
        for module in model.modules()
        if id(module) not in owners
        and getattr(module, "quant_method", None) is not None
        and any(id(value) in shared for value in module._parameters.values() if value is not None)
    ]


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
                owners = [
                    it
                    for it in modules.values()
                    if getattr(it, "kv_b_proj", None) is projection
                    and hasattr(it, "kv_lora_rank")
                    and hasattr(it, "impl")
                    and callable(getattr(it, "process_weights_after_loading", None))
                ]
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
