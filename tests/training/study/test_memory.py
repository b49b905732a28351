"""Memory that a study may take: of the machine, or what its control group leaves, whichever is less."""

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from training.study.plan import available_memory

FREE = namedtuple("FREE", "available")(8 << 30)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 8 << 30),
        ({"memory.max": f"{3 << 30}\n", "memory.current": f"{1 << 30}\n"}, 2 << 30),
        ({"memory.max": f"{20 << 30}\n", "memory.current": "0\n"}, 8 << 30),
        ({"memory.max": "100\n", "memory.current": "200\n"}, 0),
    ],
    ids=["no control group", "no limit", "a limit", "a limit above the machine", "beyond the limit"],
)
def test_what_is_available_is_the_least_of_machine_and_control_group(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: int
) -> None:
    read_text = Path.read_text

    def read(path: Path, *args: str, **kwargs: str) -> str:
        if path.parent != Path("/sys/fs/cgroup"):
            return read_text(path, *args, **kwargs)
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(psutil, "virtual_memory", lambda: FREE)
    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory() == wanted


def test_the_machine_says_how_much_is_available() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
