"""Targets whose source falls silent in the middle of being read. Over NIXL on TCP, where the other process has to answer, so that
one that is stopped keeps a read from ever ending. `REFIT_PYTHON_ROUNDS` runs the whole several times."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ordered_rank import BYTES
from processes import Process, ordered

pytestmark = pytest.mark.parametrize("number", range(int(os.environ.get("REFIT_PYTHON_ROUNDS", "1"))))

EMULATED = {"UCX_TLS": "tcp"}
#: Longer than any test: what a stopped source offers stays there.
TTL = 300.0


@contextmanager
def two_sources(folder: Path, **options: Any) -> Iterator[tuple[Process, Process, Process]]:
    """Two groups and a target that has read the first one, which has stopped since; the second has an older version."""
    store = f"dir:{folder}"
    with (
        ordered("source", store, EMULATED, group="first", ttl=TTL, lease=1.0) as first,
        ordered("source", store, EMULATED, group="second", ttl=TTL, lease=1.0) as second,
        ordered("target", store, EMULATED, ttl=TTL, **options) as target,
    ):
        assert first.ask("commit", version=1) == {"offers": 1}
        read = target.ask("refresh", version=1)
        assert (read["group"], read["whole"]) == ("first", True)
        assert first.ask("commit", version=5) == {"offers": 5}
        assert second.ask("commit", version=4) == {"offers": 4}
        first.stop()
        yield first, second, target


def settles(target: Process, kept: int) -> None:
    """What a silent peer keeps comes back once that goes on."""
    deadline = time.monotonic() + 60
    while target.ask("stats")["quarantined_bytes"] != kept:
        assert time.monotonic() < deadline, target.ask("stats")
        time.sleep(0.05)


def test_a_fresh_agent_takes_over_from_one_that_cannot_settle(nixl: str, tmp_path: Path, number: int) -> None:
    with two_sources(tmp_path) as (first, _, target):
        began = time.monotonic()
        # Half of the time is for the newest version, and the rest for others.
        read = target.ask("refresh", version=4, timeout=16.0)
        assert "error" not in read, read
        assert (read["version"], read["group"], read["whole"], read["serving"]) == (4, "second", True, 4)
        assert read["retries"] == {"late": 1}
        assert 8.0 <= time.monotonic() - began < 17.0
        assert target.ask("stats")["quarantined_bytes"] >= BYTES
        first.resume()
        settles(target, 0)
        # It is read like any other again, by the fresh agent.
        newest = target.ask("refresh", version=5)
        assert (newest["version"], newest["group"], newest["whole"], newest["rejoins"]) == (5, "first", True, 0)


def test_a_source_that_is_alone_is_waited_for(nixl: str, tmp_path: Path, number: int) -> None:
    with two_sources(tmp_path) as (first, second, target):
        assert second.ask("close") == {"closed": 0}
        late = target.ask("refresh", version=4, timeout=2.0)
        assert late["error"] == "TimeoutError" and "silent peer" in late["text"], late
        assert target.ask("look") == {"live": 1, "whole": True, "serving": 1}
        first.resume()
        assert target.ask("refresh", version=5)["whole"]


def test_a_direct_target_has_no_other_memory_and_says_that_it_is_a_mix(nixl: str, tmp_path: Path, number: int) -> None:
    with two_sources(tmp_path, mode="direct") as (first, _, target):
        began = time.monotonic()
        late = target.ask("refresh", version=4, timeout=3.0)
        assert late["error"] == "InvalidTargetError" and "until a refresh succeeds" in late["text"], late
        assert time.monotonic() - began < 6.0
        assert target.ask("look")["live"] is None
        first.resume()
        read = target.ask("refresh", version=4)
        assert read["version"] in (4, 5) and read["whole"]
