"""One hierarchy of exceptions. Each says in its text what to do, and in its attributes what it is about."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

__all__ = [
    "BusyError",
    "ClosedError",
    "ConfigError",
    "EngineError",
    "InvalidTargetError",
    "LayoutError",
    "NixlUnavailableError",
    "NotFencedError",
    "NotReadyError",
    "PlanError",
    "RefitError",
    "RefusedError",
    "RendezvousError",
    "TakenError",
    "TensorError",
    "TimeoutError",
    "TransportError",
    "VersionError",
]


class RefitError(Exception):
    """Whatever went wrong in `refit_rl`.

    Attributes:
        tensors: names of the tensors it is about; empty where it is about none.
        ranks: the ranks it is about; empty where it is about none.
    """

    def __init__(
        self, message: str = "", tensors: Iterable[str] = (), ranks: Iterable[int] = ()
    ) -> None:
        super().__init__(message)
        self.tensors: tuple[str, ...] = tuple(tensors)
        self.ranks: tuple[int, ...] = tuple(ranks)

    # Exceptions cross processes (Ray, multiprocessing) pickled; the default would lose the attributes.
    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.tensors, self.ranks))


class ConfigError(RefitError, ValueError):
    """An argument, a `config.json` or a combination of sizes that cannot be."""


class LayoutError(RefitError, ValueError):
    """What a rank holds is not what model and sizes say: a missing, unknown or misshapen tensor; `tensors` names it."""


class RefusedError(LayoutError):
    """A setting of the trainer or the engine under which its tensors are not what names and shapes say.

    The text says what to change.
    """


class PlanError(RefitError, ValueError):
    """The two sides cannot be joined: a tensor that no source rank holds, or shapes that differ."""


class TensorError(RefitError, ValueError):
    """A tensor object that cannot be read or written in place: not contiguous, read-only, of another size or dtype, on
    another device, or missing."""


class RendezvousError(RefitError):
    """The store where ranks meet cannot be used."""


class TakenError(RendezvousError):
    """The rank is there already: two processes were given one rank, or its former life has not timed out yet."""


class TransportError(RefitError):
    """Bytes cannot be moved."""


class NixlUnavailableError(TransportError):
    """NIXL was not found or does not work. The text lists every place that was tried."""


class VersionError(RefitError, ValueError):
    """A version that is not above the last one. A number names bytes for ever."""


class NotFencedError(RefitError, RuntimeError):
    """A version was on offer while its parameters may have been written. Begin an update before writing."""


class TimeoutError(RefitError, builtins.TimeoutError):
    """Something was not done in time. What it leaves behind is whole, and the call can be made again."""


class NotReadyError(TimeoutError):
    """Nothing that would do was on offer when the time was over."""


class BusyError(TimeoutError):
    """Readers were left when the time was over. Nothing was written, and the version is still on offer."""


class InvalidTargetError(RefitError):
    """The live parameters may be a mix of versions: the engine must not go on before a refresh has succeeded, or, in
    staged mode, before this rank was started anew."""


class EngineError(RefitError):
    """A callback of the engine (`pause`, `post_actions`) raised; that exception is the `__cause__`."""


class ClosedError(RefitError):
    """The object was closed."""
