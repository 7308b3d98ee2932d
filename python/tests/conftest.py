"""What tests share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

import refit_rl

_numbers = itertools.count()


@pytest.fixture
def store() -> str:
    """A rendezvous of this test's own, in this process."""
    return f"mem:test-{next(_numbers)}"


@pytest.fixture(scope="session")
def nixl() -> Iterator[str]:
    """The NIXL library. Tests over it are never skipped: whoever builds the package has fetched it."""
    yield refit_rl.nixl_library()
