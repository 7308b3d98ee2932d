"""Where pip has put NIXL: its wheels keep the library in a hidden folder beside the package, with the plugins beside it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

#: Packages, and the folder of each. A process of torch for CUDA 13 has that runtime mapped, so its wheel goes first there.
_WHEELS = (("nixl-cu12", ".nixl_cu12.mesonpy.libs"), ("nixl-cu13", ".nixl_cu13.mesonpy.libs"))


def candidates() -> list[Path]:
    """Folders that hold `libnixl_capi.so`, in the order they should be tried in."""
    found = []
    for package, folder in _ordered():
        try:
            place = Path(str(metadata.distribution(package).locate_file(folder)))
        except metadata.PackageNotFoundError:
            continue
        if (place / "libnixl_capi.so").is_file():
            found.append(place)
    return found


def _ordered() -> list[tuple[str, str]]:
    torch = sys.modules.get("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None) or ""
    return sorted(_WHEELS, key=lambda wheel: not wheel[0].endswith(f"cu{cuda.partition('.')[0]}"))
