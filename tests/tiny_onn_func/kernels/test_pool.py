"""The kernels' own threads: the same bits with any number of them, in forks and callers; no wait for a lost core."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers import ROOT, seeded
from tiny_onn_func.kernels import build, runtime
from tiny_onn_func.kernels import forward as forward_kernels

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")


def products(threads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """Large enough for several threads: loops of their own, loops in a region, and sums over both."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, w = torch.randn(1, 2048, 64, generator=seeded(0)), torch.randn(1, 8, 64, 32, generator=seeded(1))
    ends = torch.arange(256, 2049, 256, dtype=torch.int32)[None]
    out = forward_kernels.matmul([(x, w)], ends)
    flat = out[0]
    return out, forward_kernels.outer(x, out, ends), forward_kernels.swiglu(flat, flat.flip(0))


@pytest.mark.parametrize("threads", [2, 3, 8, 64])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = products(1, monkeypatch)
    for _ in range(20):
        for actual, wanted in zip(products(threads, monkeypatch), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_several_callers_at_once_get_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = products(1, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(lambda _: products(3, monkeypatch), range(40)):
            assert all(torch.equal(actual, wanted) for actual, wanted in zip(outputs, expected, strict=True))


def test_a_child_of_fork_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = products(4, monkeypatch)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for a, b in zip(products(4, monkeypatch), expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("tiny_onn_func", {}, 1),
        ("torch", {}, 0),  # its threads spin for long: all is as OpenMP has it
        ("torch", {"GOMP_SPINCOUNT": "100"}, 1),
        ("torch", {"GOMP_SPINCOUNT": "infinite"}, 0),
        ("torch", {"OMP_WAIT_POLICY": "passive"}, 1),
        ("tiny_onn_func", {"OMP_WAIT_POLICY": "active"}, 0),
    ],
)
def test_own_threads_are_used_where_torchs_do_not_spin_for_long(
    first: str, environment: dict[str, str], expected: int
) -> None:
    program = f"import {first}; import tiny_onn_func; from tiny_onn_func.kernels.runtime import loaded; "
    program += "print(loaded().has_own_threads())"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) == expected


BESIDE = """
import os, statistics, subprocess, sys, time
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import tiny_onn_func, torch
from benchmarks.models import a_batch
from tiny_onn_func import ModelConfig
from training import HyperParams, hyper_step, init_state
config = ModelConfig(257, 64, 2, 2, 1, 32, 32, 8, num_experts_per_tok=2)
state, batch = init_state(config, torch.Generator().manual_seed(0)), a_batch(config, 8, 64)
def seconds(threads):
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    hyper_step(state, batch, HyperParams(), config)
    return time.perf_counter() - begun
for threads in (1, 2):
    seconds(threads)
busy = f"import os; os.sched_setaffinity(0, {{{cores[-1]}}}); any(iter(int, 1))"
busy = subprocess.Popen([sys.executable, "-c", busy])
try:
    pairs = [(seconds(1), seconds(2)) for _ in range(15)]
finally:
    busy.kill()
print(statistics.median(two / one for one, two in pairs))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="no second core to be busy"
)
def test_two_threads_beside_a_busy_program_take_less_than_twice_the_time_of_one() -> None:
    """Spinning for milliseconds, as OpenMP does by default, they take 4 to 20 times as long (docs/benchmarks.md)."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run(
        [sys.executable, "-c", BESIDE], env=clean, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(ended.stdout) < 2


def test_this_suite_tests_the_own_threads() -> None:
    assert runtime.loaded().has_own_threads() or os.environ["GOMP_SPINCOUNT"] != "2000"
