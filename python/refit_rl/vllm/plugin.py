"""What vLLM calls in each of its processes."""

from __future__ import annotations

import logging

BACKEND = "refit"

_log = logging.getLogger(__name__)


def register() -> None:
    """Makes `weight_transfer_config={"backend": "refit"}` known. May be called many times, and never raises."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory
    except ImportError:
        # An older vLLM: `worker_extension_cls` is the way there, and asking for the backend is an error of vLLM's own.
        _log.info("this vLLM has no weight-transfer backends; use worker_extension_cls=refit_rl.vllm.worker.RefitWorker")
        return
    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "refit_rl.vllm.engine", "RefitWeightTransferEngine")
