"""One rank of a vLLM engine as a `Target`: what it holds, where that is written, and what follows."""

from __future__ import annotations

import json
import time
from typing import Any

from .. import Layout, Target, layouts
from ..errors import ConfigError, InvalidTargetError, NotReadyError, RefusedError, VersionError
from ..types import PostAction, Report
from . import install, places
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
        self._model, self._config, self._torch = model, vllm_config, torch
        on = next(model.parameters()).device

        def empty(shape: Any, dtype: Any) -> Any:
            return torch.zeros(tuple(shape), dtype=dtype, device=on)

        self._places = places.find(model, device, loaded_as, empty)
        parallel = vllm_config.parallel_config
        self._facts = {
            **self._places.facts,
            "enable_eplb": bool(getattr(parallel, "enable_eplb", False)),
            "redundant_experts": int(getattr(getattr(parallel, "eplb_config", None), "num_redundant_experts", 0) or 0),
        }
        self.rank, self.ranks = world()
        self.layout = self._layout(info)
        self._installed = False
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
            # A captured layout calls for no actions, and has to be installed all the same.
            resume=lambda _: None if self._installed else self._install([]),
            checks=info.checks,
            job=info.job,
            key_file=info.key_file,
            transport=info.transport,
            insecure_tcp=info.insecure_tcp,
            timeout=info.timeout,
            ttl=info.ttl,
            attempt=info.attempt,
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
        live = self._target.version
        if info.version is not None and live is not None and info.version <= live:
            raise VersionError(
                f"version {info.version} was asked for, and {live} is live: ask for a newer one, or leave `version` out"
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
        try:
            if report is None or version is None or report["version"] < version:
                report = self._target.refresh(version, timeout=timeout)
        except Exception as error:  # Every rank has to come to the exchange, or the others would wait there.
            failed = error
        outcomes = everywhere((report["version"] if report else 0, failed and f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        for rank, (_, text) in enumerate(outcomes):
            if text is not None:
                raise InvalidTargetError(
                    f"rank {rank} of the engine has not got the version, so none may go on: {text}", ranks=[rank]
                )
        assert report is not None
        return report, [version for version, _ in outcomes]

    def close(self) -> None:
        self._target.close()

    def _begin(self) -> None:
        self._installed = False

    def _install(self, actions: list[PostAction]) -> None:
        from vllm.config import set_current_vllm_config

        torch = self._torch
        staged = self._places.staged_modules

        def parameter(tensor: Any) -> Any:
            return torch.nn.Parameter(tensor, requires_grad=False)

        with torch.no_grad(), set_current_vllm_config(self._config):
            for module, tensors in staged:
                install.process(module, tensors, parameter)
            for module in install.sharers(self._model, staged):
                module.quant_method.process_weights_after_loading(module)
            install.post_actions(self._model, actions, self._config.model_config.dtype)
        self._installed = True

    def _layout(self, info: InitInfo) -> Layout:
        stages = int(getattr(self._config.parallel_config, "pipeline_parallel_size", 1))
        if info.layout != "capture" and stages == 1:
            try:
                return layouts.vllm(
                    hf_config(self._config),
                    {name: place.tensor for name, place in self._places.by_name.items()},
                    rank=self.rank,
                    facts=self._facts,  # type: ignore[arg-type]
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

        unknown = [layer["name"] for layer in self._facts["layers"] if not raw(layer, self._facts["device"])]
        if unknown or self._facts["enable_eplb"] or self._facts["redundant_experts"]:
            raise RefusedError(
                "what this engine has loaded is not what it computes with, so a captured layout would be wrong: serve the "
                'model unquantised, with moe_backend="triton" and without enable_eplb',
                tensors=unknown[:1],
            )
        folder = info.checkpoint or self._config.model_config.model
        document = capture(self._model, checkpoint_of(folder), loaded_as, rank=self.rank)
        return layouts.bands(json.dumps(document), rank=self.rank)


def raw(layer: dict[str, Any], device: str) -> bool:
    """Whether a layer that is not staged keeps what it has loaded."""
    if layer["quant_method"] == "UnquantizedFusedMoEMethod":
        return (layer["kernel"] or "").upper() in ("TRITON", "BATCHED_TRITON")
    if layer["quant_method"] == "UnquantizedLinearMethod":
        return device in ("cuda", "rocm")
    return layer["quant_method"] == "UnquantizedEmbeddingMethod"


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
    if device == "cpu" and not getattr(config.model_config, "enforce_eager", False):
        raise RefusedError(
            "compiled code on a CPU keeps the packed weights that it was compiled with: start the engine with enforce_eager=True"
        )


def loaded_as(module: Any) -> dict[str, Any]:
    """A module's parameters as a checkpoint is loaded into them; vLLM remembers them for its own reload."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return dict(get_layerwise_info(module).restore_metadata[0])


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
