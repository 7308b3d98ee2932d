"""Ranks that meet in an etcd of the test's own, under a job's key."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from refit_rl import Source, Target, errors, layouts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`cargo xtask python` has fetched the server; without one the tests fail."""
    program, folder = os.environ.get("REFIT_ETCD", "etcd"), tmp_path_factory.mktemp("etcd")
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = [program, "--data-dir", str(folder / "data"), "--log-level", "error"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", int(client.rpartition(":")[2]))) != 0:
                assert server.poll() is None and time.monotonic() < deadline, "etcd does not start"
                time.sleep(0.05)
            yield f"etcd:{client}"
        finally:
            server.kill()


def layout(side: str) -> layouts.Layout:
    return layouts.shards({"w": ((4, 2), "float32", (0, 0), (4, 2))}, rank=0, side=side)


def test_ranks_meet_in_etcd(etcd: str, nixl: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 64)
    key.chmod(0o600)
    held, live = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    with Source(etcd, layout("source"), {"w": held}, model="m", key_file=key) as source:
        with Target(etcd, layout("target"), {"w": live}, model="m", key_file=key) as target:
            for version in (1, 2):
                with source.updating(version):
                    held += 1
                assert target.refresh(version)["version"] == version
                np.testing.assert_array_equal(live, held)


def test_a_store_beyond_this_host_asks_for_a_key(etcd: str) -> None:
    with pytest.raises(errors.RendezvousError, match="openssl rand"):
        Source(etcd, layout("source"), {"w": np.ones((4, 2), np.float32)}, model="m")


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIT_JOB_KEY", "k" * 64)
    nobody = f"etcd:http://127.0.0.1:{free_port()}"
    with pytest.raises(errors.RendezvousError, match=nobody.removeprefix("etcd:")):
        Source(nobody, layout("source"), {"w": np.ones((4, 2), np.float32)}, model="m", timeout=1)
