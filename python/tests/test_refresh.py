"""Sources and targets of one process: the whole protocol, over the in-process transport."""

from __future__ import annotations

import threading
import time

import model
import numpy as np
import pytest

from refit_rl import Source, Target, errors, layouts


def shard(rank: int, ranks: int, side: str = "source", rows: int = 8) -> layouts.Layout:
    each = rows // ranks
    return layouts.shards({"w": ((rows, 2), "float32", (rank * each, 0), (each, 2))}, rank=rank, side=side)


def one(side: str = "source") -> layouts.Layout:
    return shard(0, 1, side)


def array(rows: int = 8) -> np.ndarray:
    return np.zeros((rows, 2), np.float32)


def test_a_megatron_trainer_reaches_a_vllm_engine(store: str) -> None:
    held = [model.megatron(model.checkpoint(1), rank, 2) for rank in (0, 1)]
    sources = [
        Source(
            store,
            layouts.megatron(model.CONFIG, tensors, rank=rank, tp_rank=rank, tp_size=2),
            tensors,
            model="qwen3",
            ranks=2,
        )
        for rank, tensors in enumerate(held)
    ]
    live = {name: np.full_like(tensor, np.nan) for name, tensor in model.vllm(model.checkpoint(1)).items()}
    done: list[object] = []
    target = Target(
        store,
        layouts.vllm(model.CONFIG, live, rank=0),
        live,
        model="qwen3",
        pause=lambda: done.append("pause"),
        post_actions=done.append,
        resume=done.append,
    )
    for version in (1, 2, 3):
        for rank, source in enumerate(sources):
            with source.updating(version):
                for name, tensor in model.megatron(model.checkpoint(version), rank, 2).items():
                    held[rank][name][...] = tensor
        report = target.refresh(version)
        for name, expected in model.vllm(model.checkpoint(version)).items():
            np.testing.assert_array_equal(live[name], expected, err_msg=name)
        assert report["version"] == target.version == version
        assert report["wire_bytes"] == report["needed_bytes"] > 0
        assert report["retries"] == {}
        assert set(report["seconds"]) == {
            "transfer_planning",
            "setup_registration",
            "wire_transfer",
            "transformation",
            "total",
        }
        actions = target_actions(report)
        assert done == ["pause", *([actions] if actions else []), version]
        done.clear()
    assert target.serving() == 3
    stats = target.stats()
    assert (stats["refits"], stats["installs"], stats["pulls"]) == (3, 3, 3)
    assert sources[0].stats()["commits"] == 3
    target.close()
    assert [source.close() for source in sources] == [0, 0]


def target_actions(report: dict) -> list:
    return report["post_actions"]


def with_actions(layout: layouts.Layout, actions: list[dict]) -> layouts.Layout:
    _, (text, _) = layout.__reduce__()
    return type(layout)._restore(text, actions)


ACTIONS = [{"kind": "copy_sinks", "params": ["w"]}, {"kind": "drop_caches", "params": []}]


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_post_actions_are_carried_out_before_the_engine_goes_on(store: str, mode: str) -> None:
    held, live = array(), array()
    held += 5
    layout = with_actions(one("target"), ACTIONS)
    with pytest.raises(errors.ConfigError, match="post_actions"):
        Target(store, layout, {"w": live}, model="m", mode=mode)
    order: list[object] = []

    def pause() -> None:
        order.append(("pause", target.version, float(live[0, 0])))

    def carry_out(actions: list[dict]) -> None:
        # The parameters are new, and the target does not count as refreshed yet.
        order.append((actions, target.version, float(live[0, 0])))

    def resume(version: int) -> None:
        order.append(("resume", version))

    with Source(store, one(), {"w": held}, model="m") as source:
        target = Target(
            store, layout, {"w": live}, model="m", mode=mode, pause=pause, post_actions=carry_out, resume=resume
        )
        source.publish(1)
        report = target.refresh()
        assert report["post_actions"] == ACTIONS
        assert order == [("pause", None, 0.0), (ACTIONS, None, 5.0), ("resume", 1)]
        order.clear()
        with source.updating(2):
            held += 1
        target.refresh()
        # Read in place they are no version from the pause on; beside, they are the old one until they are copied.
        before = None if mode == "direct" else 1
        assert order == [("pause", before, 5.0), (ACTIONS, before, 6.0), ("resume", 2)]
        assert target.version == 2
        target.close()


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_post_actions_that_fail_leave_no_version(store: str, mode: str) -> None:
    live = array()

    def fail(_: list[dict]) -> None:
        raise KeyError("no such layer")

    with Source(store, one(), {"w": array()}, model="m") as source:
        target = Target(
            store, with_actions(one("target"), ACTIONS), {"w": live}, model="m", mode=mode, post_actions=fail
        )
        source.publish(1)
        with pytest.raises(errors.EngineError, match="post_actions") as caught:
            target.refresh(1, timeout=1)
        assert isinstance(caught.value.__cause__, KeyError)
        assert target.version is None and target.serving() is None
        if mode == "staged":
            with pytest.raises(errors.InvalidTargetError, match="start its engine anew"):
                target.refresh(1, timeout=1)


def test_a_pause_that_fails_ends_the_refresh_and_changes_nothing(store: str) -> None:
    live, calls = array(), []

    def pause() -> None:
        calls.append(float(live[0, 0]))
        if len(calls) == 1:
            raise RuntimeError("busy")

    with Source(store, one(), {"w": array() + 1}, model="m") as source:
        target = Target(store, one("target"), {"w": live}, model="m", mode="direct", pause=pause)
        source.publish(1)
        with pytest.raises(errors.EngineError, match="`pause` raised") as caught:
            target.refresh(1, timeout=60)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert calls == [0.0] and target.version is None and not live.any()
        assert target.refresh(1, timeout=60)["version"] == 1
        assert (live == 1).all()


def test_a_resume_that_fails_is_told_and_the_version_is_live(store: str) -> None:
    def resume(_: int) -> None:
        raise RuntimeError("later")

    with Source(store, one(), {"w": array() + 1}, model="m") as source:
        target = Target(store, one("target"), {"w": array()}, model="m", resume=resume)
        source.publish(1)
        with pytest.raises(errors.EngineError, match="is live"):
            target.refresh(1)
        assert target.version == 1


def test_a_callback_that_calls_its_target_is_refused(store: str) -> None:
    with Source(store, one(), {"w": array()}, model="m") as source:
        target = Target(store, one("target"), {"w": array()}, model="m", pause=lambda: target.refresh())
        source.publish(1)
        with pytest.raises(errors.EngineError) as caught:
            target.refresh(1, timeout=5)
        assert isinstance(caught.value.__cause__, errors.ConfigError)


def test_nothing_is_ready_before_the_first_commit(store: str) -> None:
    target = Target(store, one("target"), {"w": array()}, model="m")
    began = time.monotonic()
    with pytest.raises(errors.NotReadyError, match="no group offers one"):
        target.refresh(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 20
    assert target.wait_for(timeout=0.1) is None
    with Source(store, one(), {"w": array()}, model="m", ranks=2) as source:
        source.publish(1)
        with pytest.raises(errors.NotReadyError, match="group `trainer` offered nothing"):
            target.refresh(timeout=0.3)


def test_an_offer_can_be_waited_for_by_another_thread(store: str) -> None:
    source = Source(store, one(), {"w": array() + 3}, model="m")
    target = Target(store, one("target"), {"w": array()}, model="m")
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(target.wait_for(4, timeout=30)))
    waiting.start()
    # The waiting thread holds neither the interpreter nor the source.
    for version in range(1, 5):
        source.begin_update()
        source.commit(version)
    waiting.join(30)
    assert found == [{"version": 4, "group": "trainer"}]
    assert source.version == 4
    source.begin_update()
    assert source.version is None
    target.close()
    source.close()


def test_versions_only_go_up(store: str) -> None:
    with Source(store, one(), {"w": array()}, model="m") as source:
        source.publish(7)
        source.begin_update()
        for version in (7, 3):
            with pytest.raises(errors.VersionError, match=f"version {version} is not newer than 7"):
                source.commit(version)
        source.commit(8)
        assert source.version == 8


def test_what_was_not_fenced_is_not_published(store: str) -> None:
    with Source(store, one(), {"w": array()}, model="m") as source:
        with pytest.raises(errors.NotFencedError, match="begin_update"):
            source.commit(1)
        source.publish(1)
        with pytest.raises(errors.NotFencedError, match="version 1 is on offer"):
            source.publish(2)
        source.begin_update()
        source.publish(2)
        with pytest.raises(errors.NotFencedError, match="nothing was committed"):
            with source.updating():
                pass
        source.commit(3)
        with source.updating():
            source.commit(4)
        with pytest.raises(ZeroDivisionError):
            with source.updating(5):
                raise ZeroDivisionError
        assert source.version is None
        source.commit(6)
        assert source.version == 6


def test_sides_that_hold_different_models_are_told_which_tensor(store: str) -> None:
    with Source(store, one(), {"w": array()}, model="m") as source:
        source.publish(1)
        other = Target(store, shard(0, 1, "target", rows=6), {"w": array(6)}, model="m", replica="a")
        with pytest.raises(errors.PlanError, match="`w` is 6 x 2 on the target and 8 x 2") as caught:
            other.refresh(timeout=1)
        assert caught.value.tensors == ("w",)
        more = layouts.shards({"v": ((2,), "float32", (0,), (2,))}, rank=0, side="target")
        missing = Target(store, more, {"v": np.zeros(2, np.float32)}, model="m", replica="b")
        with pytest.raises(errors.PlanError, match="no source rank holds") as caught:
            missing.refresh(timeout=1)
        assert "v" in caught.value.tensors


def test_casts_are_made_on_the_way(store: str) -> None:
    held = np.linspace(-3, 3, 16, dtype=np.float32).reshape(8, 2)
    half = layouts.shards({"w": ((8, 2), "float16", (0, 0), (8, 2))}, rank=0, side="target")
    live = np.zeros((8, 2), np.float16)
    with Source(store, one(), {"w": held}, model="m") as source, Target(store, half, {"w": live}, model="m") as target:
        source.publish(1)
        target.refresh()
    np.testing.assert_array_equal(live, held.astype(np.float16))


def test_all_ranks_of_a_replica_install_together_or_none_does(store: str) -> None:
    source = Source(store, one(), {"w": np.arange(16, dtype=np.float32).reshape(8, 2)}, model="m")
    source.publish(1)
    live = [array(4), array(4)]
    targets = [
        Target(store, shard(rank, 2, "target"), {"w": live[rank]}, model="m", ranks=2) for rank in (0, 1)
    ]
    with pytest.raises(errors.TimeoutError) as caught:
        targets[0].refresh(1, timeout=0.5)
    assert 1 in caught.value.ranks
    assert targets[0].version is None and not live[0].any()
    versions: list[int] = []
    threads = [
        threading.Thread(target=lambda it=it: versions.append(it.refresh(1, timeout=60)["version"])) for it in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert versions == [1, 1]
    np.testing.assert_array_equal(np.concatenate(live).ravel(), np.arange(16))
    for target in targets:
        target.close()
    source.close()


@pytest.mark.parametrize("mode", ["staged", "direct"])
def test_a_relay_serves_what_it_has_read_when_the_source_is_gone(store: str, mode: str) -> None:
    held, live, late = array(), array(), array()
    source = Source(store, one(), {"w": held}, model="m")
    relay = Target(store, one("target"), {"w": live}, model="m", replica="relay", mode=mode, relay=True)
    other = Target(store, one("target"), {"w": late}, model="m", replica="other")
    with source.updating(1):
        held += 7
    assert relay.refresh(1)["group"] == "trainer"
    # Not from itself.
    assert relay.wait_for(0, timeout=0.1) == {"version": 1, "group": "trainer"}
    assert source.close() == 0
    assert relay.wait_for(0, timeout=0.1) is None

    report = other.refresh(1)
    assert (report["version"], report["group"], report["wire_bytes"]) == (1, "relay", late.nbytes)
    np.testing.assert_array_equal(late, live)
    assert (late == 7).all()
    assert other.refresh(1)["group"] is None
    stats = relay.stats()
    assert (stats["commits"], stats["refits"], other.stats()["commits"]) == (1, 1, 0)

    # The next version passes through it; the last one is not offered any more.
    with Source(store, one(), {"w": held}, model="m", group="later") as source:
        with source.updating(2):
            held += 1
        assert relay.refresh(2)["group"] == "later"
    assert other.refresh(2)["group"] == "relay"
    assert (late == 8).all() and relay.stats()["commits"] == 2
    relay.close()
    assert other.wait_for(0, timeout=0.1) is None
    other.close()


def test_what_is_no_relay_is_read_by_nobody(store: str) -> None:
    source = Source(store, one(), {"w": array()}, model="m")
    first = Target(store, one("target"), {"w": array()}, model="m", replica="first")
    other = Target(store, one("target"), {"w": array()}, model="m", replica="other")
    source.publish(1)
    first.refresh(1)
    source.close()
    with pytest.raises(errors.NotReadyError, match="no group offers one"):
        other.refresh(1, timeout=0.2)


def test_a_relay_waits_for_its_readers_before_it_overwrites(store: str) -> None:
    """A fleet that reads from one another while the trainer goes on never holds a mix."""
    held = array(512)
    source = Source(store, shard(0, 1, rows=512), {"w": held}, model="m")
    mixed: list[str] = []

    def run(name: str) -> None:
        live = array(512)
        layout = shard(0, 1, "target", rows=512)
        with Target(store, layout, {"w": live}, model="m", replica=name, relay=True, fanout=1, mode="direct") as relay:
            version = 0
            while version < 30:
                version = relay.refresh(version + 1, timeout=60)["version"]
                if not (live == version).all():
                    mixed.append(f"{name}: {version}: {set(live.ravel())}")

    fleet = [threading.Thread(target=run, args=(f"relay-{number}",)) for number in range(3)]
    for relay in fleet:
        relay.start()
    for version in range(1, 31):
        with source.updating(version, timeout=60):
            held[...] = version
    for relay in fleet:
        relay.join(120)
    assert mixed == [] and not any(relay.is_alive() for relay in fleet)
    source.close()


def test_a_rank_is_there_once(store: str) -> None:
    with Source(store, one(), {"w": array()}, model="m"):
        with pytest.raises(errors.TakenError) as caught:
            Source(store, one(), {"w": array()}, model="m", timeout=0.2)
        assert caught.value.ranks == (0,)
    with Source(store, one(), {"w": array()}, model="m", timeout=0.2):
        pass
    with pytest.raises(errors.ConfigError, match="counted from 0") as caught:
        Source(store, shard(1, 2), {"w": array(4)}, model="m", ranks=1)
    assert caught.value.ranks == (1,)
    with pytest.raises(errors.ConfigError, match="a Target takes the layout of a target"):
        Target(store, one(), {"w": array()}, model="m")


def test_what_is_closed_says_so(store: str) -> None:
    source = Source(store, one(), {"w": array()}, model="m")
    target = Target(store, one("target"), {"w": array()}, model="m")
    assert (source.close(), source.close(), target.close(), target.close()) == (0, 0, None, None)
    with pytest.raises(errors.ClosedError):
        source.begin_update()
    with pytest.raises(errors.ClosedError):
        target.refresh()


def test_a_digest_of_every_byte_can_be_asked_for(store: str) -> None:
    live = array()
    source = Source(store, one(), {"w": array() + 2}, model="m")
    target = Target(store, one("target"), {"w": live}, model="m", checks="always")
    source.publish(1)
    done = threading.Event()

    def answer() -> None:
        while not done.wait(0.01):
            source.answer()

    answering = threading.Thread(target=answer)
    answering.start()
    try:
        target.refresh(1, timeout=60)
    finally:
        done.set()
        answering.join()
    assert (live == 2).all()
    target.close()
    source.close()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"transport": "carrier pigeon"}, "transport is `carrier pigeon`"),
        ({"transport": "peer"}, "GPUs only"),
        ({"timeout": -1}, "timeout is -1 seconds"),
        ({"timeout": float("nan")}, "timeout is NaN seconds"),
        ({"model": "a/b"}, "a/b"),
        ({"job": ""}, "cannot name"),
        ({"group": "x y"}, "x y"),
        ({"ttl": 0.0}, "ttl"),
        ({"ranks": 0}, "0 ranks"),
    ],
)
def test_arguments_that_cannot_be_are_refused(store: str, options: dict, part: str) -> None:
    with pytest.raises(errors.ConfigError, match=part):
        Source(store, one(), {"w": array()}, **({"model": "m"} | options))


def test_the_local_transport_stays_in_its_process(tmp_path) -> None:
    with pytest.raises(errors.ConfigError, match="does not leave this process"):
        Source(f"dir:{tmp_path}", one(), {"w": array()}, model="m", transport="local")


def test_a_key_that_others_can_read_is_refused(store: str, tmp_path) -> None:
    key = tmp_path / "key"
    key.write_text("0" * 64)
    key.chmod(0o644)
    with pytest.raises(errors.ConfigError, match="chmod 600"):
        Source(store, one(), {"w": array()}, model="m", key_file=key)
    key.chmod(0o600)
    with Source(store, one(), {"w": array()}, model="m", key_file=key) as source:
        source.publish(1)
        stranger = Target(store, one("target"), {"w": array()}, model="m")
        with pytest.raises(errors.NotReadyError):
            stranger.refresh(timeout=0.2)
        with Target(store, one("target"), {"w": array()}, model="m", key_file=key, replica="b") as target:
            assert target.refresh()["version"] == 1
