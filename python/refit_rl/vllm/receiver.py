"""One rank of a vLLM engine as a `Target`: what it holds, where that is written, and what follows."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from typing import Any

from .. import Layout, Target, layouts
from ..errors import ConfigError, InvalidTargetError, NotReadyError, RefitError, RefusedError, VersionError
from ..types import PostAction, Report
from . import install, places, reload
from .graphs import Captured
from .options import InitInfo, UpdateInfo, check_version


class Receiver:
    """Joins the rendezvous when it is made.

    Raises:
        ConfigError, RefusedError, LayoutError: with what to change. Nothing was joined then.
        As `refit_rl.Target` besides.
    """

    def __init__(self, model: Any, vllm_config: Any, info: InitInfo) -> None:
        import torch
        import vllm

        check_version(vllm.__version__, info.allow_unknown_vllm)
        device = platform()
        check_settings(vllm_config, info, device)
        check_hooks(model)
        self._model, self._config, self._torch = model, vllm_config, torch
        on = next(model.parameters()).device

        def empty(shape: Any, dtype: Any) -> Any:
            return torch.zeros(tuple(shape), dtype=dtype, device=on)

        parallel = vllm_config.parallel_config
        facts = {
            "enable_eplb": bool(getattr(parallel, "enable_eplb", False)),
            "redundant_experts": int(getattr(getattr(parallel, "eplb_config", None), "num_redundant_experts", 0) or 0),
            "fused_shared_experts": any(getattr(it, "num_fused_shared_experts", 0) for it in model.modules()),
        }
        self._places = places.find(model, device, reload.as_loaded, empty, facts)
        self.rank, self.ranks = world()
        self.layout = self._layout(info)
        #: What this layout calls for, or, where it says nothing, what its modules call for.
        self._actions = self.layout.post_actions or install.actions_of(model, self.layout.names)
        self._views = install.views(model, self._places.processed)
        self._captured = self._graphs(device)
        self._installed = False
        #: Whether the ranks have told each other that they hold what is to be installed.
        self._landed = False
        self._target = Target(
            info.rendezvous,
            self.layout,
            {name: self._places.by_name[name].tensor for name in self.layout.names},
            model=info.model,
            ranks=self.ranks,
            replica=info.replica,
            mode=info.mode,
            pause=self._begin,
            post_actions=self._install,
            # A captured layout calls for no actions itself, and has to be installed all the same.
            resume=lambda _: None if self._installed else self._install(self._actions),
            checks=info.checks,
            job=info.job,
            key_file=info.key_file,
            transport=info.transport,
            insecure_tcp=info.insecure_tcp,
            timeout=info.timeout,
            ttl=info.ttl,
            lease=info.lease,
            attempt=info.attempt,
            fanout=info.fanout,
            relay=info.relay,
            drain=info.drain,
        )

    @property
    def version(self) -> int | None:
        return self._target.version

    def refresh(self, info: UpdateInfo) -> Report:
        """Makes a version live, the same one on every rank of the engine.

        Raises:
            VersionError: not newer than what is live.
            NotReadyError: the trainer offers no such version in time.
            As `Target.refresh` besides.
        """
        live = everywhere(self._target.version)
        if info.version is not None and all(version is not None and info.version <= version for version in live):
            raise VersionError(
                f"version {info.version} was asked for, and {min(live)} is live: ask for a newer one, or leave `version` out"
            )
        deadline = time.monotonic() + info.timeout
        report, seen = self._together(info.version, info.timeout)
        # Ranks read by themselves, and the trainer may have gone on between two of them.
        while (newest := max(seen)) != min(seen):
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotReadyError(
                    f"ranks of the engine hold versions {sorted(set(seen))}: the trainer publishes faster than they read",
                    ranks=[rank for rank, version in enumerate(seen) if version < newest],
                )
            report, seen = self._together(newest, left, report)
        return report

    def _together(self, version: int | None, timeout: float, held: Report | None = None) -> tuple[Report, list[int]]:
        """One refresh, unless such a version is held; and what each rank has then. All raise where one does."""
        report, failed = held, None
        self._landed = False
        try:
            if report is None or version is None or report["version"] < version:
                report = self._target.refresh(version, timeout=timeout)
            if not self._landed:
                # Nothing was read here. Processing may need all ranks, so this one takes part.
                self._install(self._actions)
        except Exception as error:  # Every rank has to come to the exchanges, or the others would wait there.
            failed = error.__cause__ if isinstance(error.__cause__, RefitError) else error
        said = failed and f"{type(failed).__name__}: {failed}"
        if not self._landed:
            everywhere(said)
        outcomes = everywhere((report["version"] if report else 0, said))
        if failed is not None:
            raise failed
        for rank, (_, text) in enumerate(outcomes):
            if text is not None:
                raise _not_together(rank, text)
        assert report is not None
        return report, [version for version, _ in outcomes]

    def close(self) -> None:
        self._target.close()

    def _begin(self) -> None:
        self._installed = False

    def _install(self, actions: list[PostAction]) -> None:
        # Quantising as it is loaded asks the other ranks for the largest element, so none begins before all have landed.
        self._landed = True
        for rank, text in enumerate(everywhere(None)):
            if text is not None:
                raise _not_together(rank, text)
        self._process(actions)
        self._installed = True

    def _process(self, actions: list[PostAction]) -> None:
        from vllm.config import set_current_vllm_config

        model_config = self._config.model_config
        with self._torch.no_grad(), set_current_vllm_config(self._config), self._as_when_loading():
            for _, module, tensors in self._places.processed:
                reload.process(module, tensors, model_config)
            for view, tensor in self._views:
                view.copy_(tensor.view(view.shape))
            install.post_actions(self._model, actions, model_config.dtype)
            if self._captured is not None:
                self._captured.refill()

    def _as_when_loading(self) -> AbstractContextManager[None]:
        from vllm.utils.torch_utils import set_default_torch_dtype

        return set_default_torch_dtype(self._config.model_config.dtype)

    def _graphs(self, device: str) -> Captured | None:
        """What CUDA graphs read of modules that are processed anew, where there may be some."""
        if device == "cpu" or getattr(self._config.model_config, "enforce_eager", False):
            return None
        processed = [(name, module) for name, module, _ in self._places.processed]
        modules = [*processed, *install.latent_attention(self._model)]
        return Captured(modules, self._torch.is_tensor) if modules else None

    def _layout(self, info: InitInfo) -> Layout:
        stages = int(getattr(self._config.parallel_config, "pipeline_parallel_size", 1))
        if info.layout != "capture" and stages == 1:
            try:
                return layouts.vllm(
                    hf_config(self._config),
                    {name: place.tensor for name, place in self._places.by_name.items()},
                    rank=self.rank,
                    facts=self._places.facts,  # type: ignore[arg-type]
                    **coordinates(self._config),
                )
            except ConfigError as error:
                if info.layout == "builtin" or "support" not in str(error):
                    raise
        elif info.layout == "builtin":
            raise ConfigError('an engine with pipeline stages has no built-in layout: say "layout": "capture" in init_info')
        return self.captured(info)

    def captured(self, info: InitInfo) -> Layout:
        """The layout as the engine's own loader writes it."""
        from .capture import capture, checkpoint_of

        # Whether a trainer has such elements the built-in layouts alone can tell.
        quantized: Any = [
            {"name": name, "quant_method": "captured", "written": "load_time_quantized"} for name in self._places.quantized
        ]
        layouts.check_engine({"layers": quantized})
        folder = info.checkpoint or self._config.model_config.model
        document = capture(self._model, checkpoint_of(folder), reload.as_loaded, rank=self.rank)
        return layouts.bands(json.dumps(document), rank=self.rank)


def _not_together(rank: int, text: str) -> InvalidTargetError:
    return InvalidTargetError(f"rank {rank} of the engine has not got the version, so none may go on: {text}", ranks=[rank])


def platform() -> str:
    from vllm.platforms import current_platform

    for device in ("cpu", "rocm", "xpu", "cuda"):
        if getattr(current_platform, f"is_{device}")():
            return device
    raise RefusedError(f"{type(current_platform).__name__} is not supported: use a CPU or an NVIDIA GPU")


def check_settings(config: Any, info: InitInfo, device: str) -> None:
    """Raises `RefusedError` for an engine that would go on computing with what is old."""
    cache = config.cache_config
    if getattr(cache, "enable_prefix_caching", False) and info.prefix_cache == "off":
        raise RefusedError(
            "the engine's prefix cache would go on with keys and values of old weights: start it with "
            'enable_prefix_caching=False, or say "prefix_cache": "caller_resets" in init_info and reset it behind every '
            "update, as refit_rl.vllm.update does"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise RefusedError(
            "scales of the KV cache belong to the weights they were calculated under: turn calculate_kv_scales off"
        )
    offload = getattr(config, "offload_config", None)
    settings = (cache, offload, getattr(offload, "uva", None), getattr(offload, "prefetch", None))
    if any(getattr(of, name, 0) for of in settings for name in ("cpu_offload_gb", "offload_group_size")):
        raise RefusedError(
            "weights that are offloaded to the host are moved while the engine runs: turn cpu_offload_gb and offload_group_size off"
        )
    if info.relay and info.mode == "direct" and getattr(config.model_config, "enable_sleep_mode", False):
        raise RefusedError(
            'others would read parameters whose memory goes when the engine sleeps: say "mode": "staged" in init_info, whose second '
            "set stays, leave `relay` out, or start the engine with enable_sleep_mode=False"
        )
    if device == "cpu" and not getattr(config.model_config, "enforce_eager", False):
        raise RefusedError(
            "compiled code on a CPU keeps the packed weights that it was compiled with: start the engine with enforce_eager=True"
        )


def check_hooks(model: Any) -> None:
    """Raises `RefusedError` for a model that derives state from its weights in ways that are its own."""
    for path, module in model.named_modules():
        if reload.has_own_hook(module):
            raise RefusedError(
                f"`{path}` ({type(module).__name__}) derives state from weights in a way of its own, which would stay that of the old "
                "ones: serve a model whose class in vLLM has no process_weights_after_loading",
                tensors=[path],
            )


def hf_config(config: Any) -> dict[str, Any]:
    """Hugging Face's configuration as plain data."""
    found = getattr(config.model_config, "hf_text_config", None) or config.model_config.hf_config
    whole: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
    if not whole.get("architectures"):
        whole["architectures"] = list(config.model_config.hf_config.architectures)
    return whole


def world() -> tuple[int, int]:
    """This worker's number in its replica, and how many there are."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    return group.rank_in_group, group.world_size


def coordinates(config: Any) -> dict[str, Any]:
    """Sizes and places from vLLM's own groups."""
    from vllm.distributed import parallel_state as state

    parallel = config.parallel_config
    tp = state.get_tp_group()
    found: dict[str, Any] = {"tp_rank": tp.rank_in_group, "tp_size": tp.world_size}
    if getattr(parallel, "data_parallel_size", 1) > 1:
        dp = state.get_dp_group()
        found |= {"dp_rank": dp.rank_in_group, "dp_size": dp.world_size}
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        pcp = state.get_pcp_group()
        found |= {"pcp_rank": pcp.rank_in_group, "pcp_size": pcp.world_size}
    if getattr(parallel, "enable_expert_parallel", False):
        found["expert_parallel"] = getattr(parallel, "expert_placement_strategy", "linear")
    found["sequence_parallel_moe"] = bool(getattr(parallel, "use_sequence_parallel_moe", False))
    return found


def everywhere(said: Any) -> list[Any]:
    """What each rank of the engine says."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return [said]
    found: list[Any] = [None] * group.world_size
    dist.all_gather_object(found, said, group=group.cpu_group)
    return found
