"""Compile csrc/ for this processor when a kernel is first needed, and keep the library for later processes.

The kernels are optional: without a C compiler, for another dtype or device, or with TINY_ONN_NATIVE=0, PyTorch's own
operations compute the same, several times slower where experts are small.
"""

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("csrc").iterdir())
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
TOO_LONG = 120  # seconds for a compiler


def flags() -> tuple[str, ...]:
    """FLAGS, then those of TINY_ONN_NATIVE_FLAGS, of which later ones win: for tests and measurements."""
    return (*FLAGS, *shlex.split(os.environ.get("TINY_ONN_NATIVE_FLAGS", "")))


@cache
def library() -> Path | None:
    """Path of the compiled library; None if it cannot be built."""
    if os.environ.get("TINY_ONN_NATIVE") == "0":
        return None
    with suppress(OSError, RuntimeError, subprocess.SubprocessError):
        return find_library()
    return None


def find_library() -> Path:
    """Path of the compiled library, built on demand. Its code is run, so no other user may write in its folder.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, a compiler that refuses, a folder that others can write to.
        RuntimeError: the user has no home folder, and TINY_ONN_NATIVE_CACHE names none.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("TINY_ONN_NATIVE_CACHE") or f"{caches}/tiny-onn/native").expanduser().absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(home):
        raise PermissionError(errno.EPERM, "others can write to this folder: no kernel is taken from it", str(home))
    path = home / f"kernels-{_fingerprint()}.so"
    if not (path.is_file() and _is_ours(path)):
        _compile(path)
    ctypes.CDLL(str(path))  # noqa: TID251 - whether it loads; named by a hash, in a folder of this user alone
    return path


def _is_ours(path: Path) -> bool:
    """True if this user or root owns the path, and no other user may write there."""
    status = path.stat()
    return status.st_uid in (0, getattr(os, "geteuid", int)()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _fingerprint() -> str:
    """Hash the source and the processor that it is compiled for: a home folder may serve several machines."""
    target = [platform.machine(), *flags()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        target += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + "\n".join(target).encode()).hexdigest()[:16]


def _compile(path: Path) -> None:
    """Compile the library, whole or not at all; two processes may do so at once.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it refuses.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("found no C compiler called cc, gcc or clang")
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        shared_object = Path(draft, "kernels.so")
        for options in (flags(), [flag for flag in flags() if flag != "-fopenmp"]):  # one thread, if there is no OpenMP
            command = [
                compiler,
                *options,
                "-o",
                str(shared_object),
                *(str(path) for path in SOURCES if path.suffix == ".c"),
                "-lm",
            ]
            ended = subprocess.run(command, check=False, capture_output=True, timeout=TOO_LONG)
            if ended.returncode == 0:
                break
        ended.check_returncode()
        shared_object.chmod(0o700)
        os.replace(shared_object, path)
