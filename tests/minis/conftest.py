"""Shared by the tests of training."""

import pytest

from companion.minis import training


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch) -> None:
    """All runs compute in float32: which is faster may differ from run to run on a busy machine."""
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda: False)
