"""How the tests run: one thread, few examples by default, a thousand with `pytest -m slow`."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as a run does it; before torch, which reads it once
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("slow", settings.get_profile("default"), max_examples=1000)
settings.register_profile(
    "mutation",
    settings.get_profile("default"),
    phases=[Phase.explicit, Phase.generate],  # no time for shrinking
)


def pytest_configure(config: pytest.Config) -> None:
    profile = "slow" if config.getoption("markexpr") == "slow" else "default"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", profile))
    torch.set_num_threads(1)  # the order of a sum, and so its last bit, depends on the number of threads


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every property is also a slow test: `pytest -m slow` runs it with more examples."""
    is_property = hasattr(getattr(item, "obj", None), "hypothesis")
    if is_property and item.config.getoption("markexpr") == "slow":
        item.add_marker(pytest.mark.slow)
