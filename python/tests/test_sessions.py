"""Ranks that the store takes for dead while they live: they were stopped for longer than their time to live. Over NIXL, in
processes of their own. `REFIT_PYTHON_ROUNDS` runs the whole several times."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from ordered_rank import BYTES, COLS, ROWS, expected, layout
from processes import Process, ordered

from refit_rl import Source, Target, errors

pytestmark = pytest.mark.parametrize("number", range(int(os.environ.get("REFIT_PYTHON_ROUNDS", "1"))))

#: Longer than a process that runs goes without its turn.
TTL = 4.0


def another(store: str, replica: str) -> Target:
    """A target of this process, which looks at the store all the while: otherwise nobody notices that a process is silent."""
    live = np.zeros((ROWS, COLS), np.float32)
    return Target(store, layout("target"), {"w": live}, model="m", replica=replica)


def silence(process: Process, folder: Path, left: int) -> None:
    """Stops a process until the store has taken it for dead, and knows so many others."""
    process.stop()
    deadline = time.monotonic() + 60
    while (found := len(list((folder / "sessions").iterdir()))) != left:
        assert time.monotonic() < deadline, f"{found} sessions are there"
        time.sleep(0.05)


def source(store: str, **options: object) -> tuple[Source, np.ndarray]:
    held = np.zeros((ROWS, COLS), np.float32)
    return Source(store, layout("source"), {"w": held}, model="m", **options), held


def commit(source: Source, held: np.ndarray, version: int) -> None:
    with source.updating(version):
        held[...] = expected(version)


@pytest.mark.parametrize("relay", [False, True], ids=["alone", "relay"])
def test_a_staged_target_joins_again_within_its_next_refresh(
    nixl: str, tmp_path: Path, relay: bool, number: int
) -> None:
    store = f"dir:{tmp_path}"
    trainer, held = source(store)
    with trainer, another(store, "other") as other, ordered("target", store, ttl=TTL, relay=relay) as target:
        commit(trainer, held, 1)
        first = target.ask("refresh", version=1)
        assert (first["version"], first["rejoins"], first["wire_bytes"], first["whole"]) == (1, 0, BYTES, True)

        silence(target, tmp_path, 2)
        target.resume()
        assert target.ask("look") == {"live": 1, "whole": True, "serving": None}
        # What it has is what is committed: nothing is read for it, and it answers for it again.
        again = target.ask("refresh", version=1)
        assert (again["version"], again["rejoins"], again["wire_bytes"]) == (1, 1, 0)
        assert (again["group"], again["live"], again["whole"], again["serving"]) == (None, 1, True, 1)

        silence(target, tmp_path, 2)
        target.resume()
        commit(trainer, held, 2)
        newer = target.ask("refresh", version=2)
        assert (newer["version"], newer["rejoins"], newer["group"]) == (2, 1, "trainer")
        assert (newer["wire_bytes"], newer["whole"], newer["serving"]) == (BYTES, True, 2)
        assert target.ask("stats")["rejoins"] == 2
        if relay:
            # It offers under its new session, too.
            assert trainer.close() == 0
            assert other.refresh(2, timeout=60)["group"] == "engine"
        assert target.ask("close") == {"closed": None}


@pytest.mark.parametrize("relay", [False, True], ids=["alone", "relay"])
def test_a_direct_target_goes_on_under_another_session(nixl: str, tmp_path: Path, relay: bool, number: int) -> None:
    store = f"dir:{tmp_path}"
    trainer, held = source(store)
    with trainer, another(store, "other") as other, ordered("target", store, ttl=TTL, mode="direct", relay=relay) as target:
        commit(trainer, held, 1)
        assert target.ask("refresh", version=1)["rejoins"] == 0
        silence(target, tmp_path, 2)
        target.resume()
        commit(trainer, held, 2)
        newer = target.ask("refresh", version=2)
        assert (newer["version"], newer["rejoins"], newer["group"], newer["whole"]) == (2, 1, "trainer", True)
        if relay:
            assert trainer.close() == 0
            assert other.refresh(2, timeout=60)["group"] == "engine"


def test_a_target_whose_place_was_taken_says_so_and_leaves_the_other_there(
    nixl: str, tmp_path: Path, number: int
) -> None:
    store = f"dir:{tmp_path}"
    trainer, held = source(store)
    with trainer, ordered("target", store, ttl=TTL) as former:
        commit(trainer, held, 1)
        former.ask("refresh", version=1)
        silence(former, tmp_path, 1)
        with ordered("target", store, ttl=TTL) as next_life:
            next_life.ask("refresh", version=1)
            former.resume()
            for _ in range(2):
                refused = former.ask("refresh", version=1, timeout=0.5)
                assert refused["error"] == "TakenError" and "another process by now" in refused["text"], refused
            assert former.ask("close") == {"closed": None}
            assert next_life.ask("look")["serving"] == 1


def test_a_source_offers_its_version_again_while_its_trainer_does_nothing(
    nixl: str, tmp_path: Path, number: int
) -> None:
    store = f"dir:{tmp_path}"
    with another(store, "other") as other, ordered("source", store, ttl=TTL) as trainer:
        assert trainer.ask("commit", version=1) == {"offers": 1}
        silence(trainer, tmp_path, 1)
        trainer.resume()
        # The trainer is told nothing meanwhile.
        report = other.refresh(1, timeout=60)
        assert (report["version"], report["group"]) == (1, "trainer")
        assert trainer.ask("stats")["rejoins"] == 1
        assert trainer.ask("commit", version=2) == {"offers": 2}
        assert other.refresh(2, timeout=60)["version"] == 2


def test_a_source_whose_place_was_taken_says_so_and_leaves_the_other_there(
    nixl: str, tmp_path: Path, number: int
) -> None:
    store = f"dir:{tmp_path}"
    with another(store, "other") as other, ordered("source", store, ttl=TTL, timeout=1.0) as former:
        former.ask("commit", version=1)
        silence(former, tmp_path, 1)
        trainer, held = source(store)
        with trainer:
            commit(trainer, held, 2)
            former.resume()
            refused = former.ask("commit", version=2, timeout=0.5)
            assert refused["error"] == "TakenError" and "two processes were given one rank" in refused["text"], refused
            former.ask("close")
            assert other.refresh(2, timeout=60)["version"] == 2
            assert trainer.stats()["rejoins"] == 0


def test_a_trainer_that_lost_its_session_while_it_wrote_offers_what_it_wrote(
    nixl: str, tmp_path: Path, number: int
) -> None:
    store = f"dir:{tmp_path}"
    with another(store, "other") as other, ordered("source", store, ttl=TTL) as trainer:
        trainer.ask("commit", version=1)
        assert trainer.ask("begin") == {"begun": None}
        silence(trainer, tmp_path, 1)
        trainer.resume()
        with pytest.raises(errors.NotReadyError):
            other.refresh(1, timeout=1)
        assert trainer.ask("commit", version=2) == {"offers": 2}
        assert other.refresh(2, timeout=60)["version"] == 2
