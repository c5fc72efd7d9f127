"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers of `worlds` need the other cores

import pytest  # noqa: E402

from tests import shape_checks  # noqa: E402
from tests.worlds import Worlds  # noqa: E402

shape_checks.install()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """`worlds.run(n, fn, *args)`: run a module-level function on n gloo ranks."""
    pool = Worlds()
    yield pool
    pool.close()
