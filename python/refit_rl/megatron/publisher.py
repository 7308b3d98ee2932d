"""A rank of a Megatron-Core trainer that engines read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from types import TracebackType
from typing import Any, Literal

from .. import layouts
from .._core import Layout, Source
from ..errors import ClosedError, NotFencedError, TensorError
from ..types import Config, Stats
from .groups import Place, coordinates, gather, group_name, place
from .modules import Held, Span, moved, unwrap, walk, wrappers

__all__ = ["Publisher"]


class Publisher:
    """Publishes a rank's parameters, where they lie. Every rank of the trainer makes one, at the same time: they tell each
    other which part of the model they have.

    Copies of the model (data parallelism) publish as groups of their own, `trainer-0`, `trainer-1`, .., and engines spread
    over them. Which ranks are a copy follows from the shards that they have; context parallel ranks are copies too.

    With `overlap_param_gather` parameters are completed bit by bit in the next forward pass. `publish` finishes that first;
    the hooks of that forward pass then find nothing left to do.

    Persistent buffers (a router's `expert_bias`) are small, and are written while gradients are finalised, before
    `before_step`: what is published is the copy that `publish` takes of them.

    Args:
        model_chunks: the rank's model or the list of its chunks, as `get_model` gives them back: in their wrappers.
        config: Hugging Face's configuration of the model: parsed, the file, or its folder.
        rendezvous, model, job, key_file, transport, insecure_tcp, timeout, ttl, lease, drain: as of `refit_rl.Source`.
        group: what the trainer is called at the rendezvous.
        process_group: the ranks of this trainer, if `torch.distributed` knows other processes too.

    Raises:
        RefusedError: settings of the trainer under which parameters are not what their names say; it says what to change.
        LayoutError: modules that are not those of the model that `config` describes, or of ranks that do not make one.
        TensorError: parameters that cannot be read in place.
        As `refit_rl.Source`.
    """

    def __init__(
        self,
        model_chunks: Any,
        config: Config,
        *,
        rendezvous: str,
        model: str,
        group: str = "trainer",
        process_group: Any = None,
        job: str = "refit",
        key_file: str | PathLike[str] | None = None,
        transport: Literal["auto", "nixl", "peer", "local"] = "auto",
        insecure_tcp: str | None = None,
        timeout: float = 30.0,
        ttl: float = 10.0,
        lease: float = 30.0,
        drain: float = 10.0,
    ) -> None:
        chunks = list(model_chunks) if isinstance(model_chunks, (list, tuple)) else [model_chunks]
        held = walk(chunks)
        own = coordinates(unwrap(chunks[0]))
        number, every = gather(own, process_group)
        self._place = place(every, number)
        self._chunks = chunks
        self._held = held
        self._spans = {name: Span.of(tensor) for name, tensor in held.parameters.items()}
        self._copies = {
            name: getattr(module, attribute).detach().clone()
            for name, (module, attribute) in held.buffers.items()
        }
        # This class syncs before it commits, so what is said of the sync holds whenever somebody reads.
        self._layout = layouts.megatron(
            config,
            held.specs(),
            rank=self._place.rank,
            chunks=held.chunks,
            mtp=held.mtp,
            facts=held.facts(params_synced=True),  # type: ignore[arg-type]
            **own.arguments(),
        )
        everything = {**held.parameters, **self._copies}
        self._source: Source | None = Source(
            rendezvous,
            self._layout,
            {name: everything[name] for name in self._layout.names},
            model=model,
            ranks=self._place.ranks,
            group=group_name(group, self._place),
            job=job,
            key_file=key_file,
            transport=transport,
            insecure_tcp=insecure_tcp,
            timeout=timeout,
            ttl=ttl,
            lease=lease,
            drain=drain,
        )

    @property
    def layout(self) -> Layout:
        """What this rank holds."""
        return self._layout

    @property
    def held(self) -> Held:
        """What the modules said."""
        return self._held

    @property
    def place(self) -> Place:
        """As which copy of the model, and as which of its ranks, this one publishes."""
        return self._place

    @property
    def version(self) -> int | None:
        """The step on offer; `None` while there is none, during an update too."""
        return self._open().version

    def before_step(self, timeout: float = 60.0) -> None:
        """Waits until nobody reads the parameters; from its return on they may be written. Call it before `optimizer.step()`,
        behind the backward pass: the longer engines may read, the better. Not a collective.

        Args:
            timeout: above `lease`, a reader that has gone silent cannot be the reason for running into it.

        Raises:
            BusyError: readers were left when the time was over. Nothing may be written.
        """
        self._open().begin_update(timeout)

    def publish(self, step: int, timeout: float = 60.0) -> None:
        """Offers what the parameters hold now as this version, once every rank of the copy has. Call it behind
        `optimizer.step()`, on all ranks: with `overlap_param_gather` it is a collective.

        Args:
            step: larger than of every earlier call, also after a restart from a checkpoint.

        Raises:
            NotFencedError: parameters may have been written while they were on offer: `before_step` was not called.
            VersionError: `step` is not above the last one. Nothing is on offer; call again.
            TensorError: parameters are elsewhere than they were (`param.data = ..`, `model.to(..)`): close this one and make a
                new one.
        """
        source = self._open()
        if source.version is not None:
            raise NotFencedError(
                f"version {source.version} is on offer, and its parameters may have been written: call `before_step` before "
                "`optimizer.step()`"
            )
        self._sync()
        gone = moved(self._held.parameters, self._chunks, self._spans)
        if gone:
            raise TensorError(
                f"`{gone[0]}` and {len(gone) - 1} more parameters were moved to other memory than the published one: "
                "close this publisher and make a new one behind whatever replaces parameters",
                gone,
            )
        for name, (module, attribute) in self._held.buffers.items():
            buffer, copy = getattr(module, attribute), self._copies[name]
            if buffer.dtype != copy.dtype or buffer.shape != copy.shape:
                raise TensorError(
                    f"`{name}` was {copy.dtype} {tuple(copy.shape)} and is {buffer.dtype} {tuple(buffer.shape)} now: "
                    "close this publisher and make a new one",
                    (name,),
                )
            copy.copy_(buffer.detach())
        _synchronize(self._held.parameters)
        source.publish(step, timeout)

    @contextlib.contextmanager
    def updating(self, step: int, timeout: float = 60.0) -> Iterator[None]:
        """`before_step` on entry and `publish(step)` on exit. A body that raises leaves nothing on offer."""
        self.before_step(timeout)
        yield
        self.publish(step, timeout)

    def stats(self) -> Stats:
        return self._open().stats()

    def close(self, timeout: float | None = None) -> int:
        """Withdraws what is on offer, waits for readers, and lets the parameters go.

        Gives back how many readers were left: if there are some, parameters are kept for as long as the process lives.
        """
        source, self._source = self._source, None
        return 0 if source is None else source.close(timeout)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Source:
        if self._source is None:
            raise ClosedError("this publisher was closed: make a new one")
        return self._source

    def _sync(self) -> None:
        """Completes parameters that the next forward pass would. Whoever gathers them again while they are on offer, as a
        checkpoint does, writes the bytes that are there."""
        for chunk in self._chunks:
            for wrapper in wrappers(chunk):
                if getattr(getattr(wrapper, "ddp_config", None), "overlap_param_gather", False):
                    import torch

                    with torch.no_grad():
                        wrapper.start_param_sync(force_sync=True)


def _synchronize(tensors: dict[str, Any]) -> None:
    """Waits for everything that was launched on the parameters' devices, on whichever stream."""
    devices = {str(tensor.device): tensor.device for tensor in tensors.values()}
    for device in devices.values():
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
