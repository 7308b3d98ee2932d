"""maturin, with what `nixl-sys` and `etcd-client` need to be built in place: so that `pip install .` is all there is to do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import maturin
from maturin import (  # noqa: F401  what pip calls besides
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(wheel_directory: str, *settings: Any, **more: Any) -> str:
    _prepare()
    return maturin.build_wheel(wheel_directory, *settings, **more)


def build_editable(wheel_directory: str, *settings: Any, **more: Any) -> str:
    _prepare()
    return maturin.build_editable(wheel_directory, *settings, **more)


def _prepare() -> None:
    # A source distribution comes without the tasks: there LIBCLANG_PATH and PROTOC have to say where these are.
    if (ROOT / "xtask").is_dir():
        subprocess.run(["cargo", "xtask", "setup"], cwd=ROOT, check=True)
