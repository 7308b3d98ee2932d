"""Weight updates of a whole engine, from the process that holds the `LLM`.

An error in one of vLLM's workers reaches this process as a text. `init` and `update` raise it as what it was.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import errors
from ..errors import EngineError, RefitError


def init(llm: Any, **init_info: Any) -> None:
    """Joins the rendezvous with every rank of an offline engine (`vllm.LLM`): `rendezvous` and `model`, and what else there is in
    `refit_rl.vllm.InitInfo`.

    Raises:
        ConfigError, RefusedError, LayoutError: with what to change. Nothing was joined then.
        As `refit_rl.Target` besides.
    """
    with _as_they_were():
        llm.init_weight_transfer_engine({"init_info": init_info})


def update(llm: Any, version: int | None = None, *, timeout: float = 60.0) -> None:
    """Makes a version live on every rank of an offline engine (`vllm.LLM`), and drops what it computed under the old one.

    Raises:
        EngineError: requests are under way, or vLLM would not drop its prefix cache.
        VersionError: the version is live already.
        NotReadyError: the trainer offers no such version in time, or not one of this model.
        As `refit_rl.Target.refresh` besides.
    """
    if llm.llm_engine.has_unfinished_requests():
        raise EngineError(
            "requests are under way, and would go on with keys and values of the old weights: finish or abort them first "
            "(of an AsyncLLM: pause_generation)"
        )
    with _as_they_were():
        llm.start_weight_update()
        llm.update_weights({"update_info": {"version": version, "timeout": timeout}})
    # Keys and values of the old weights go before anybody can see the new version.
    if llm.reset_prefix_cache() is False:
        raise EngineError("vLLM did not reset its prefix cache, which belongs to the old weights: no request may go on with it")
    # Older releases give the weights of an engine no name.
    names = [] if version is None or not inspect.signature(llm.finish_weight_update).parameters else [str(version)]
    with _as_they_were():
        llm.finish_weight_update(*names)


#: How vLLM passes on what a worker said: one in a process of its own, and one in the engine's.
_SAID = re.compile(
    r"Worker failed with error '(\w+): (.*)', please check the stack trace|Call to collective_rpc method failed: (\w+): (.*)\Z",
    re.DOTALL,
)


@contextmanager
def _as_they_were() -> Iterator[None]:
    try:
        yield
    except RefitError:
        raise
    except Exception as error:
        said = _SAID.search(str(error))
        what, text = (said[1] or said[3], said[2] or said[4]) if said else ("", "")
        if what not in errors.__all__:
            raise
        raise getattr(errors, what)(text) from error


@contextmanager
def named() -> Iterator[None]:
    """In a worker: errors say in their text what they are, as vLLM passes on nothing else."""
    try:
        yield
    except RefitError as error:
        what = type(error).__name__
        raise type(error)(f"{what}: {error}", error.tensors, error.ranks) from error
