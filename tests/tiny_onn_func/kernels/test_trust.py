"""What holds the compiled kernels is run, so it is loaded only where nobody else could have written it."""

import ctypes
import inspect
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny_onn_func.kernels import build

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A library in the folder of the kernels, under their name, and the file that it leaves when it is loaded."""
    home, mark = tmp_path / "home", tmp_path / "it-ran"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("TINY_ONN_NATIVE_CACHE", str(home))
    library = home / f"kernels-{build._fingerprint()}.so"
    real = Path(str(build.library()))
    monkeypatch.setattr(build, "_compile", lambda path: os.replace(shutil.copy(real, home / "draft"), path))
    source = f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fopen("{mark}", "w"); }}'
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", library], input=source.encode(), check=True)
    library.chmod(0o700)
    return library, mark


def test_a_library_of_this_user_s_own_is_loaded(trap: tuple[Path, Path]) -> None:
    assert build.find_library() == trap[0]
    assert trap[1].exists()


@pytest.mark.parametrize("rights", [0o720, 0o702, 0o777], ids=oct)
def test_a_library_that_others_can_write_is_not_loaded_but_made_anew(rights: int, trap: tuple[Path, Path]) -> None:
    trap[0].chmod(rights)
    assert hasattr(ctypes.CDLL(str(build.find_library())), "grouped_matmul")
    assert not trap[1].exists()


def test_a_library_of_another_user_is_not_loaded_but_made_anew(
    trap: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        os.chown(trap[0], 12345, -1)
        assert hasattr(ctypes.CDLL(str(build.find_library())), "grouped_matmul")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError):
            build.find_library()
    assert not trap[1].exists()


@pytest.mark.parametrize("rights", [0o770, 0o707, 0o1777], ids=oct)
def test_no_library_is_taken_from_a_folder_that_others_can_write(rights: int, trap: tuple[Path, Path]) -> None:
    trap[0].parent.chmod(rights)
    with pytest.raises(PermissionError, match="others can write to this folder"):
        build.find_library()
    assert build.library.__wrapped__() is None
    assert not trap[1].exists()


def test_the_folder_of_the_kernels_is_this_user_s_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ONN_NATIVE_CACHE", str(tmp_path / "new" / "home"))
    before = os.umask(0)
    try:
        library = build.find_library()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (library.parent, library)] == [0o700, 0o700]


def test_no_argument_chooses_what_is_loaded() -> None:
    assert not inspect.signature(build.find_library).parameters
    assert not inspect.signature(build.library).parameters


def test_kernels_lie_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setattr(build, "_compile", lambda path: made.append(path) or path.touch())
    monkeypatch.setattr(build.ctypes, "CDLL", str)
    monkeypatch.delenv("TINY_ONN_NATIVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.find_library().parent == tmp_path / ".cache" / "tiny-onn" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert build.find_library().parent == tmp_path / "caches" / "tiny-onn" / "native"
    assert len(made) == 2


def test_a_user_without_a_home_has_no_kernels_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: object) -> None:
        raise KeyError

    for name in ("HOME", "TINY_ONN_NATIVE_CACHE", "TINY_ONN_NATIVE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert build.library.__wrapped__() is None
