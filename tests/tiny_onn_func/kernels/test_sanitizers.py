"""No call, however wrong, makes a kernel touch memory that is not its own or do what C leaves undefined."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers import ROOT

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
BUILDS = {"for this processor": "", "plain, whose every load is watched": "-march=x86-64"}


def runtimes_of_gcc() -> list[str]:
    """The libraries that must be loaded before all others: the second one's exceptions go through the first."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        with suppress(OSError):
            result = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
            paths.append(Path(result.stdout.strip()))
    return [str(path.resolve()) for path in paths if path.is_absolute() and path.exists()]


@pytest.mark.slow
@pytest.mark.skipif(len(runtimes_of_gcc()) < 2, reason="no gcc with its sanitizers")
@pytest.mark.parametrize("build", BUILDS)
def test_sanitizers_have_nothing_to_report_whatever_is_given(build: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "CC": "gcc",
        "TINY_ONN_NATIVE_FLAGS": f"{SANITIZERS} {BUILDS[build]}",
        "TINY_ONN_NATIVE_CACHE": str(tmp_path),
        "LD_PRELOAD": " ".join(runtimes_of_gcc()),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("TINY_ONN_NATIVE", None)
    command = [sys.executable, "-m", "tests.tiny_onn_func.kernels.hostile"]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert ended.stdout.strip() == "nothing was reported"
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
