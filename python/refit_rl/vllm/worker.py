"""`worker_extension_cls="refit_rl.vllm.worker.RefitWorker"`: for a vLLM without weight-transfer backends.

::

    llm.collective_rpc("refit_init", kwargs={"init_info": {"rendezvous": .., "model": ..}})
    llm.collective_rpc("refit_update", kwargs={"update_info": {"version": 7}})
    llm.reset_prefix_cache()
"""

from __future__ import annotations

from typing import Any

from ..errors import NotFencedError
from .client import named
from .options import InitInfo, UpdateInfo, read
from .receiver import Receiver


class RefitWorker:
    """Mixed into vLLM's worker: names begin with `refit_`, so that they meet none of its own."""

    model_runner: Any
    vllm_config: Any

    def refit_init(self, init_info: dict[str, Any]) -> None:
        self.refit_close()
        with named():
            self.refit_receiver = Receiver(self.model_runner.get_model(), self.vllm_config, read(InitInfo, init_info))

    def refit_update(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """The report of this rank."""
        receiver = getattr(self, "refit_receiver", None)
        with named():
            if receiver is None:
                raise NotFencedError("call refit_init first")
            return dict(receiver.refresh(read(UpdateInfo, update_info)))

    def refit_close(self) -> None:
        receiver = getattr(self, "refit_receiver", None)
        self.refit_receiver = None
        if receiver is not None:
            receiver.close()
