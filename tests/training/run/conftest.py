"""Fixtures of tests that train a whole run of their own."""

from pathlib import Path

import pytest

from tests.training.run.test_engine import TEXT


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of tokens that no other test sees."""
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file to train on."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"
