"""Benchmarks: python -m benchmarks.speed.step, and so on; docs/benchmarks.md has their figures."""

import tiny_onn_func  # noqa: F401  before torch, as a run does it
