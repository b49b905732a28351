"""How the tests run: one thread, few examples by default, a thousand with `pytest -m slow`, no silent skip in CI."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as a run does it; before torch, which reads it once
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

ALLOWED_SKIPS = {  # how the reason of a skip begins -> why CI may go without that test
    "no CUDA device": "CI runs on processors; a machine with a device runs these tests",
    "no chromium": "`.ci/run` installs it as root only; the pages are tested without a browser as well",
}

settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("slow", settings.get_profile("default"), max_examples=1000)
settings.register_profile(
    "mutation",
    settings.get_profile("default"),
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],  # no time for shrinking
)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "fail on a skip whose reason ALLOWED_SKIPS of tests/conftest.py does not list, as with CI=true"
    parser.addoption("--allowed-skips", action="store_true", help=text)


class SkipCheck:
    """Fail the session on skips whose reason is not in ALLOWED_SKIPS, of tests and of whole files."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}  # test or file -> reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skipped[report.nodeid] = reason.removeprefix("Skipped: ")

    @property
    def refused(self) -> dict[str, str]:
        """The skips that no entry of the list allows."""
        return {name: reason for name, reason in self.skipped.items() if not reason.startswith((*ALLOWED_SKIPS,))}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        mend = "install what it lacks, or list the reason in ALLOWED_SKIPS of tests/conftest.py"
        for name, reason in self.refused.items():
            terminalreporter.write_line(f"SKIP REFUSED {name}: expected no skip, got {reason!r}; {mend}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    profile = "slow" if config.getoption("markexpr") == "slow" else "default"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", profile))
    torch.set_num_threads(1)  # the order of a sum, and so its last bit, depends on the number of threads
    strict = config.getoption("allowed_skips") or os.environ.get("CI", "").lower() in ("1", "true")
    if strict and not hasattr(config, "workerinput"):  # workers report to the process that began them
        config.pluginmanager.register(SkipCheck())


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every property is also a slow test: `pytest -m slow` runs it with more examples."""
    is_property = hasattr(getattr(item, "obj", None), "hypothesis")
    if is_property and item.config.getoption("markexpr") == "slow":
        item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("slow") is not None:
        item.add_marker(pytest.mark.timeout(4 * 3600))
