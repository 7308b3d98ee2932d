"""vLLM as a target: the weight-transfer backend `refit`.

vLLM loads it by itself where this package is installed (entry point `vllm.general_plugins`)::

    llm = LLM(path, weight_transfer_config={"backend": "refit"}, enable_prefix_caching=False)
    llm.init_weight_transfer_engine({"init_info": {"rendezvous": "dir:/tmp/meet", "model": "qwen3-4b"}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"version": 7}})
    llm.finish_weight_update("7")

or, with everything that belongs to them and with errors of `refit_rl.errors`, `refit_rl.vllm.init` and `refit_rl.vllm.update`. For a vLLM that has no weight-transfer
backends there is `worker_extension_cls="refit_rl.vllm.worker.RefitWorker"`.

Nothing here imports vLLM before one of its processes asks for it.
"""

from __future__ import annotations

from .client import init, update
from .options import InitInfo, UpdateInfo

__all__ = ["InitInfo", "UpdateInfo", "init", "update"]
