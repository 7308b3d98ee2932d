"""vLLM's own layerwise reload, of a module whose tensors are laid out as loaded already. Imports vLLM where it is called.

vLLM writes down what each module is loaded into. Its reload puts such tensors back, has weights loaded into them, processes them, and
copies what comes out to where kernels (and CUDA graphs) read. Loading is what is taken over here: a copy of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import RefusedError

#: Made behind the others, so vLLM remembers nothing of it; some kernels permute or convert it.
_LATE = "bias"


def as_loaded(module: Any) -> dict[str, Any] | None:
    """A module's parameters as a checkpoint is loaded into them, on the meta device, with their loaders; `None` where vLLM does
    not remember.

    What vLLM never moves (`e_score_correction_bias`) is the live parameter itself.
    """
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    if module not in LAYERWISE_INFO:
        return None
    remembered = LAYERWISE_INFO[module].restore_metadata[0]
    attention = is_attention(module)
    found: dict[str, Any] = {}
    for name, like in remembered.items():
        # Scales of the KV cache, which no trainer has, are taken in and deleted.
        if attention and module._parameters.get(name) is None:
            continue
        # A copy: what vLLM remembers must not hold on to the module.
        found[name] = restore_layer_refs(to_meta_tensor(like), module)
        if hasattr(found[name], "weight_loader"):
            found[name].weight_loader = _own_loader(found[name].weight_loader)
    for name, live in module._parameters.items():
        if live is not None and name not in found and name in SKIP_TENSORS:
            found[name] = _late(module, live, remembered.get("weight")) if name == _LATE else live
    return found


def _late(module: Any, live: Any, weight: Any) -> Any:
    """As it is made, of the type of the weight: a CPU may keep it in f32."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    late = to_meta_tensor(live)
    if not hasattr(late, "weight_loader") and hasattr(module, "weight_loader"):
        # A kernel that made it anew has not kept what it is loaded by.
        late.output_dim, late.weight_loader = 0, module.weight_loader
    if weight is None or weight.dtype == live.dtype or weight.dtype.itemsize == 1:
        return late
    cast = late.to(weight.dtype)
    cast.__class__ = late.__class__
    cast.__dict__.update(late.__dict__)
    return cast


def _own_loader(loader: Any) -> Any:
    """A parameter's loader without what counts and keeps what it loads."""
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__
    return loader


def is_attention(module: Any) -> bool:
    """Whether vLLM derives what this needs from other modules, once those are processed."""
    from vllm.model_executor.layers import attention

    deferred = getattr(attention, "is_deferred_attention_layer", None)
    if deferred is not None:
        return bool(deferred(module))
    # vLLM 0.25.
    return isinstance(module, (attention.Attention, attention.MLAAttention))


def has_own_hook(module: Any) -> bool:
    """Whether something is derived from a module's weights that is neither attention's nor that of a `quant_method`, which may be
    modules themselves.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    own = callable(getattr(module, "process_weights_after_loading", None))
    return own and not isinstance(module, QuantizeMethodBase) and not is_attention(module)


class _Only:
    """A model of one module: vLLM's reload goes over `modules()`, and this one's children are not meant."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def modules(self) -> list[Any]:
        return [self._module]


def process(module: Any, tensors: Mapping[str, Any], model_config: Any) -> None:
    """Loads these tensors, which are all that it has, into a module and has vLLM process them, as behind loading a checkpoint.

    Whatever happens, the module's parameters lie where they lay before, and vLLM can reload it by itself.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    only = _Only(module)
    # A buffer is what the module was made with, and would be left as its memory was found.
    loaded = {**module._buffers, **tensors}
    with _put_back(module) as remembered:
        _have_kernel_made(module)
        _have_room_made(module, remembered)
        for like in remembered.values():
            like.weight_loader = _fill
        initialize_layerwise_reload(only)
        for name, tensor in tensors.items():
            # vLLM takes what was made late for loaded. A copy: the next pull writes `tensor`, and some kernels keep what they get.
            if name not in remembered:
                module._parameters[name] = type(module._parameters[name])(tensor.clone(), requires_grad=False)
        for name in remembered:
            like = getattr(module, name)
            if loaded[name] is None or loaded[name].shape != like.shape:
                raise RefusedError(f"`{name}` of {type(module.quant_method).__name__} is not what it was made with")
            like.weight_loader(like, loaded[name])
        finalize_layerwise_reload(only, model_config)


def _fill(param: Any, loaded_weight: Any) -> None:
    param.data.copy_(loaded_weight)


def _have_kernel_made(module: Any) -> None:
    """Experts that have a kernel would be taken for packed ones, and those whose kernel packs them be left as they are loaded."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    method = module.quant_method
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    own = getattr(type(experts), "process_weights_after_loading", None)
    if own is not None and own is not getattr(FusedMoEExperts, "process_weights_after_loading", None):
        method.moe_kernel = None


def _have_room_made(module: Any, remembered: Mapping[str, Any]) -> None:
    """A projection that latent attention has packed on a CPU was emptied by that, and what is loaded has to lie there until the
    attention packs it anew.
    """
    if not getattr(module, "_cpu_skip_gemm_dispatch", False):
        return
    for name, live in module._parameters.items():
        if live is not None and name in remembered and not live.numel():
            live.data = live.data.new_empty(remembered[name].shape, dtype=remembered[name].dtype)


@contextmanager
def _put_back(module: Any) -> Iterator[Mapping[str, Any]]:
    """What vLLM remembers of a module, which may be changed inside.

    Loaders are the module's own again afterwards. What fails leaves the module with its own tensors, not with half of those that
    it is loaded into.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    info = get_layerwise_info(module)
    remembered = {
        name: like
        for names in info.restore_metadata
        for name, like in names.items()
        # Some releases remember that there was none.
        if like is not None and name not in SKIP_TENSORS
    }
    params, buffers = dict(module._parameters), dict(module._buffers)
    kept = [it for it in (*remembered.values(), *params.values(), *buffers.values()) if it is not None]
    attributes = [(it, dict(it.__dict__)) for it in kept]
    try:
        yield remembered
    except BaseException:
        for live, were in ((module._parameters, params), (module._buffers, buffers)):
            live.clear()
            live.update(were)
        info.reset()
        raise
    finally:
        for it, were in attributes:
            it.__dict__.clear()
            it.__dict__.update(were)
