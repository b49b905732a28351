"""`tiny-onn watch`: serve a page on loopback that is made anew, for as long as its run or study goes on."""

import hashlib
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from training.errors import UserError, one_line
from training.report.html.page import Page

LOOPBACK = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def open_server(read: Callable[[], Page], port: int = 0) -> ThreadingHTTPServer:
    """Server of `/`, the page, and of `/main`, its main part, for which `read` is asked each time; call serve_forever.

    It answers GET alone, and only those that name it by its address: a page of another host, whose name was pointed
    at this machine, reads nothing.

    Raises:
        UserError: the port cannot be had.
    """
    reading = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds that a connection may say nothing

        def do_GET(self) -> None:
            if self.headers.get("Host") not in hosts:
                self._answer(HTTPStatus.MISDIRECTED_REQUEST, f"expected a request to {hosts[0]}\n")
            elif self.path not in ("/", "/main"):
                self._answer(HTTPStatus.NOT_FOUND, "expected / or /main\n")
            else:
                self._page()

        def _page(self) -> None:
            try:
                with reading:
                    page = read()
            except (UserError, ValueError, OSError) as error:
                return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, one_line(error))
            etag = f'"{hashlib.sha256(page.main.encode()).hexdigest()[:32]}"'
            if self.path == "/main" and self.headers.get("If-None-Match") == etag:
                return self._answer(HTTPStatus.NOT_MODIFIED, "", etag)
            text = page.main if self.path == "/main" else page.html(live=True)
            return self._answer(HTTPStatus.OK, text, etag, "text/html")

        def _answer(self, status: HTTPStatus, text: str, etag: str = "", kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
            for name, value in (headers | ({"ETag": etag} if etag else {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """Refuse what is no GET (501 of http.server) and what is no HTTP in a line of text."""
            status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
            self._answer(status, f"{message or status.phrase}\n")
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing about requests."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: expected a free port, got {port} ({error}); leave the flag, any will do") from None
    server.daemon_threads = True
    hosts = [f"{LOOPBACK}:{server.server_port}", f"localhost:{server.server_port}"]
    return server
