"""Log and progress on the error stream: a bar on a terminal, a plain line every 30 seconds elsewhere.

One logger, `tiny_onn`, carries banner, notes (INFO), warnings and alarms (WARNING), errors (ERROR) and details (DEBUG).
Its handler writes to `sys.stderr`, whether the command line or Python began the work; results go to `sys.stdout`.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from training.errors import UserError

LOG = logging.getLogger("tiny_onn")
EVERY = 30.0  # seconds between two plain lines


class _Stderr(logging.Handler):
    """Writes whole lines above the bars of a terminal, to the error stream of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a closed stream stops no run
            if "tqdm" in sys.modules:  # else there is no bar
                from tqdm import tqdm

                tqdm.write(self.format(record), file=sys.stderr)
            elif sys.stderr is not None:
                print(self.format(record), file=sys.stderr)


if not LOG.handlers:
    LOG.addHandler(_Stderr())
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def set_verbosity(*, quiet: bool = False, verbose: bool = False) -> None:
    """Log errors alone (`quiet`), details and tracebacks too (`verbose`), or what a user wants to know.

    Raises:
        UserError: both are asked for.
    """
    if quiet and verbose:
        raise UserError("--quiet: expected no --verbose with it, got both; leave one away")
    LOG.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


@runtime_checkable
class ProgressBar(Protocol):
    """Progress of a loop: the part of tqdm that this program uses."""

    n: int

    def update(self, n: int = 1) -> object:
        """Count n more."""

    def set_description(self, desc: str, refresh: bool = True) -> object:
        """Set the name in front of the progress."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> object:
        """Set the short status text behind the progress."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> object: ...

    def __iter__(self) -> Iterator[Any]: ...


class PlainLines:
    """Progress without a terminal: a line every EVERY seconds, and a last one if there was any."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, total: int | None = None, initial: int = 0, desc: str = "",
        unit: str = "it", unit_scale: bool = False, shown: bool = True,
    ) -> None:  # fmt: skip
        self.n, self.desc, self.postfix = initial, desc, ""
        self._iterable, self._total, self._initial = iterable, total, initial
        self._unit, self._unit_scale, self._shown = unit, unit_scale, shown
        self._start = self._last = time.monotonic()
        self._logged: int | None = None  # the count of the last line

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self.n += n
        self._log_if_due()

    def set_description(self, desc: str, refresh: bool = True) -> None:
        """Set the name in front of the progress."""
        self.desc = desc

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the short status text behind the progress."""
        self.postfix = s
        if refresh:
            self._log_if_due()

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._logged not in (None, self.n):
            self._log()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def text(self) -> str:
        """The line: what, how many of how many, how it goes, time left."""
        from tqdm import tqdm

        if self._unit_scale:
            counts = [f"{tqdm.format_sizeof(n)}{self._unit}" for n in (self.n, self._total) if n is not None]
        else:
            counts = [f"{n:,.0f}" for n in (self.n, self._total) if n is not None]
            counts[0] = f"{self._unit} {counts[0]}"
        counted, elapsed = self.n - self._initial, time.monotonic() - self._start
        parts = [" of ".join(counts), self.postfix]
        if self._total is not None and counted > 0:
            parts.append(f"{tqdm.format_interval(max(0.0, self._total - self.n) * elapsed / counted)} left")
        return (f"{self.desc}: " if self.desc else "") + ", ".join(part for part in parts if part)

    def _log_if_due(self) -> None:
        if time.monotonic() - self._last >= EVERY:
            self._log()

    def _log(self) -> None:
        self._last, self._logged = time.monotonic(), self.n
        if self._shown:
            LOG.info("%s", self.text())


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, initial: int = 0, desc: str = "",
    unit: str = "it", unit_scale: bool = False, shown: bool = True, **of_tqdm: Any,
) -> ProgressBar:  # fmt: skip
    """A bar on a terminal, plain lines elsewhere, neither with --quiet.

    Args:
        shown: False counts in silence.
        of_tqdm: options that a bar on a terminal has beside these.
    """
    shown = shown and LOG.isEnabledFor(logging.INFO)
    if not (shown and sys.stderr is not None and sys.stderr.isatty()):
        return PlainLines(
            iterable, total=total, initial=initial, desc=desc, unit=unit, unit_scale=unit_scale, shown=shown
        )  # fmt: skip
    from tqdm import tqdm  # of the laboratory; the log does without

    bar: Any = tqdm(
        iterable, total=total, initial=initial, desc=desc or None, unit=unit, unit_scale=unit_scale,
        dynamic_ncols=True, file=sys.stderr, **of_tqdm,
    )  # fmt: skip
    return bar
