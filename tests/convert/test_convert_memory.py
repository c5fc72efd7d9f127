"""Conversion holds a parameter or two, not the model, nor a file of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench_convert import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_peak_is_near_the_largest_shard(tmp_path: Path) -> None:
    """1.5 GB in 6 files: the bound is 1.5 * 0.25 + 1 GB, and whoever held the model beside torch would exceed it."""
    for row in measure(tmp_path, gigabytes=1.5, shards=6):
        assert row["peak_gb"] < row["bound_gb"] < row["rest_gb"] + row["gigabytes"], row
