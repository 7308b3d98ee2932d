"""Ranks in processes of their own, as tests see them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Process:
    """A script of this folder, whose lines are JSON."""

    def __init__(self, script: str, *arguments: str, **environment: str) -> None:
        # A file: a pipe that nobody reads would stop the process once it is full.
        self.trouble = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.trouble,
            text=True,
            env=os.environ | environment,
        )

    def line(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the process ended: {self.said()}"
        return json.loads(line)

    def go_on(self, line: str = "") -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def tell(self, do: str, **order: Any) -> None:
        self.go_on(json.dumps({"do": do, **order}))

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        self.tell(do, **order)
        return self.line()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # On a busy machine it runs on for a moment.
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> dict[str, Any]:
        # Not `communicate`, which would pass over what `readline` has read ahead.
        last = self.line()
        self.process.stdin.close()
        assert self.process.wait(timeout=120) == 0, self.said()
        return last

    def said(self) -> str:
        self.trouble.seek(0)
        return self.trouble.read()


@contextmanager
def running(script: str, *arguments: str, **environment: str) -> Iterator[Process]:
    process = Process(script, *arguments, **environment)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process.trouble.close()


@contextmanager
def ordered(side: str, store: str, environment: dict[str, str] | None = None, **options: Any) -> Iterator[Process]:
    """A rank that does what it is told, once it has joined."""
    with running("ordered_rank.py", side, store, json.dumps(options), **(environment or {})) as process:
        assert process.line() == {"ready": True}
        yield process
