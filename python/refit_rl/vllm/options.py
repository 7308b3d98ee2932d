"""What callers of vLLM's weight-transfer API pass: plain data, checked before anything is joined."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

from ..errors import ConfigError

#: Minor releases of vLLM whose sources this was read in; 0.26 was executed on a GPU, 0.32 on CPUs.
KNOWN_VLLM = ((0, 25), (0, 26), (0, 32), (0, 33))


@dataclass
class InitInfo:
    """`init_info` of `init_weight_transfer_engine`. What is not described here is as for `refit_rl.Target`."""

    rendezvous: str
    model: str
    replica: str = "engine"
    job: str = "refit"
    key_file: str | None = None
    transport: Literal["auto", "nixl", "peer", "local"] = "auto"
    insecure_tcp: str | None = None
    mode: Literal["direct", "staged"] = "direct"
    checks: Literal["never", "if_answered", "always"] = "never"
    #: Where the layout comes from: `builtin`, of a family that refit knows; `capture`, from the engine's own loader;
    #: `auto`, the second where the first does not know the model.
    layout: Literal["auto", "builtin", "capture"] = "auto"
    #: A folder with the checkpoint whose tensors a capture is run with; left out: the one the engine was loaded from.
    checkpoint: str | None = None
    #: Say `caller_resets` where the engine has a prefix cache and whoever updates it resets that afterwards.
    #: `refit_rl.vllm.update` does.
    prefix_cache: Literal["off", "caller_resets"] = "off"
    #: Whether a release of vLLM that this was not checked with is taken.
    allow_unknown_vllm: bool = False
    timeout: float = 30.0
    ttl: float = 10.0
    lease: float = 30.0
    attempt: float | None = None
    fanout: int = 16
    #: Whether other engines may read what this one has read. In `direct` mode that is where versions are read to: live parameters
    #: that kernels read as they are loaded, and the load-time tensors of what vLLM processes. In `staged` mode it is the second set.
    relay: bool = False
    drain: float = 10.0

    def __post_init__(self) -> None:
        for name in ("rendezvous", "model", "replica", "job"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"init_info: `{name}` has to be a text")
        for name, known in {
            "mode": ("direct", "staged"),
            "layout": ("auto", "builtin", "capture"),
            "prefix_cache": ("off", "caller_resets"),
        }.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"init_info: `{name}` is one of {', '.join(known)}, not {getattr(self, name)!r}")
        # A text that says false would be taken for true.
        for name in ("relay", "allow_unknown_vllm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"init_info: `{name}` is true or false, not {getattr(self, name)!r}")


@dataclass
class UpdateInfo:
    """`update_info` of `update_weights`."""

    #: This version or a newer one. Left out: one newer than what the engine has.
    version: int | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        whole = isinstance(self.version, int) and not isinstance(self.version, bool) and self.version >= 0
        if self.version is not None and not whole:
            raise ConfigError(f"update_info: `version` is a number from 0, not {self.version!r}")


_Info = TypeVar("_Info", InitInfo, UpdateInfo)


def read(kind: type[_Info], given: dict[str, Any]) -> _Info:
    """Options of plain data.

    Raises:
        ConfigError: one that is not known, one that has to be there, or a wrong value.
    """
    what = "init_info" if kind is InitInfo else "update_info"
    known = [field.name for field in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"Invalid {what}: `{unknown[0]}` is not known; there is {', '.join(known)}")
    missing = [it.name for it in fields(kind) if it.default is MISSING and it.name not in given]
    if missing:
        raise ConfigError(f"Invalid {what}: `{missing[0]}` has to be there")
    return kind(**given)


def check_version(version: str, allow_unknown: bool) -> None:
    """Post-load layouts move between releases of vLLM, so one that was not looked at is refused.

    Raises:
        ConfigError: with what to do.
    """
    parts = version.split(".")
    found: Any = tuple(int(part) for part in parts[:2]) if len(parts) > 1 and all(p.isdigit() for p in parts[:2]) else None
    if found in KNOWN_VLLM or allow_unknown:
        return
    known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_VLLM)
    raise ConfigError(
        f"vLLM {version} was not checked: where it keeps what it has loaded may have moved. Use one of {known}, or say "
        '"allow_unknown_vllm": true in init_info and compare what it generates behind a refit with a fresh engine'
    )
