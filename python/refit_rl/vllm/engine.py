"""vLLM's `WeightTransferEngine`, over a `Receiver`. Imported by vLLM alone."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine

from ..errors import ConfigError, NotFencedError
from ..types import Report
from .client import named
from .options import InitInfo, UpdateInfo, read
from .receiver import Receiver


class RefitWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[type-var]
    """One rank of an engine, whose parameters are pulled from the ranks of a trainer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    # A drafter is another module tree, with a target of its own.
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver: Receiver | None = None
        self._received = False
        #: Of the last update.
        self.report: Report | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        with named():
            return read(InitInfo, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        with named():
            return read(UpdateInfo, update_dict)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        with named():
            self._receiver = Receiver(self.model, self.vllm_config, init_info)

    def start_weight_update(self) -> None:
        self._opened()
        self._received = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base's `synchronize`: a refresh has landed when it returns, and there may be no accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        receiver = self._opened()
        with named():
            self.report = receiver.refresh(update_info)
        self._received = True

    def finish_weight_update(self) -> None:
        if not self._received:
            with named():
                raise NotFencedError(
                    "finish_weight_update: nothing was received. Call update_weights after start_weight_update"
                )

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """What releases before vLLM 0.32 have a trainer push its weights with."""
        with named():
            raise ConfigError("nothing is pushed: publish with refit_rl's Publisher or Source, and call update_weights on the engine")

    def shutdown(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    def _opened(self) -> Receiver:
        if self._receiver is None:
            with named():
                raise NotFencedError(
                    "not initialized: call init_weight_transfer_engine first, with rendezvous and model in init_info"
                )
        return self._receiver
