"""One update of a whole engine, from the process that holds the `LLM`."""

from __future__ import annotations

from typing import Any

from ..errors import EngineError


def update(llm: Any, version: int | None = None, *, timeout: float = 60.0) -> None:
    """Makes a version live on every rank of an offline engine (`vllm.LLM`), and drops what it computed under the old one.

    Raises:
        EngineError: requests are under way, or vLLM would not drop its prefix cache.
    """
    if llm.llm_engine.has_unfinished_requests():
        raise EngineError(
            "requests are under way, and would go on with keys and values of the old weights: finish or abort them first "
            "(of an AsyncLLM: pause_generation)"
        )
    llm.start_weight_update()
    llm.update_weights({"update_info": {"version": version, "timeout": timeout}})
    # Keys and values of the old weights go before anybody can see the new version.
    if llm.reset_prefix_cache() is False:
        raise EngineError("vLLM did not reset its prefix cache, which belongs to the old weights: no request may go on with it")
    llm.finish_weight_update(None if version is None else str(version))
