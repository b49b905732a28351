"""Fixtures of tests that run whole studies: a text, and a cache of tokens that no other module sees."""

from collections.abc import Iterator

import pytest

from tests.training.study.test_runner import TEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a text file to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
