"""A connection to Ray that begins with one line where something is wrong, and leaves nothing behind."""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.errors import UserError

REACH, REHEARSE = 5.0, 20.0  # seconds for a connection to the address, and for Ray to answer there
OBJECT_STORE = 80 << 20  # bytes; what goes to and fro is small
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
INSTALL = "pip install 'tiny-onn-func[cluster]'"


@contextmanager
def session(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected; a connection that was there already is taken, and stays.

    Nothing is reported to Ray's makers, and no dashboard is started. A Ray of this machine takes orders only from
    who knows its token, which this process makes.

    Args:
        address: HOST:PORT, or `auto`; None starts a Ray of this machine and ends it in the end.

    Raises:
        UserError: Ray is not installed, or nothing that we can work with answers.
    """
    ray = _load(local=address is None)
    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            if address is None:
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **QUIET)
            else:
                ray.init(address=address, **QUIET)
        except Exception as error:  # Ray raises that class itself, too
            raise UserError(f"--launcher ray: expected Ray to start, got: {_last_line(str(error))}") from None
        _give_back(handler)
        yield ray
    finally:
        ray.shutdown()
        _give_back(handler)


def _load(*, local: bool) -> Any:
    """Import Ray. Its settings are variables of the environment, read once at import."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or a warning about it
    if local and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        import ray
    except ImportError:
        raise UserError(f"--launcher ray: expected the package ray, which is not installed; {INSTALL}") from None
    return ray


def _check_address(address: str) -> None:
    """Refuse within REACH + REHEARSE seconds what Ray itself would try for minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            raise UserError(
                f"--address: expected HOST:PORT of a Ray head, or auto, got {address!r}; such as node1:6379"
            )
        try:
            socket.create_connection((host, int(port)), timeout=REACH).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--address: expected a Ray head at {address}, got: {error}; start one there: ray start --head"
            ) from None
    connect = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", connect, address], capture_output=True, text=True, timeout=REHEARSE, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--address: expected Ray at {address}, which did not answer as one within {REHEARSE:.0f} s; "
            "is it another program, or does it want a token (RAY_AUTH_TOKEN)?"
        ) from None
    if tried.returncode:
        raise UserError(f"--address: expected Ray at {address}, got: {_last_line(tried.stderr)}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no answer"


def _give_back(handler: Any) -> None:
    """Ray takes the signal of a polite kill for itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
