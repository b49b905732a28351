"""`tiny-onn watch` shows a run as it goes on, on loopback, to requests that name it by its address, and to no other."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.training.report.test_html_pages import fake_run
from training.cli import main
from training.commands.watch import open_server
from training.storage.recorder import FILE
from training.study.report import FolderReader


@contextmanager
def watched(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """A server of the folder's page."""
    reader = FolderReader(folder)
    with open_server(lambda: reader.read()[0]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: ThreadingHTTPServer, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "run")


def test_the_page_is_served_and_its_main_part_follows_the_records(run: Path) -> None:
    with watched(run) as server:
        status, headers, page = ask(server)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "step 30 of 4" in page
        assert "connect-src &#39;self&#39;" in page
        assert server.server_address[0] == "127.0.0.1"
        _, headers, before = ask(server, "/main")
        assert ask(server, "/main", If_None_Match=headers["ETag"])[0] == 304
        record = json.loads((run / FILE).read_text(encoding="ascii").splitlines()[-1])
        with (run / FILE).open("a", encoding="ascii") as file:
            file.write(json.dumps(record | {"step": 31}) + "\n")
        status, _, after = ask(server, "/main", If_None_Match=headers["ETag"])
        assert status == 200
        assert "step 31 of 4" in after != before
        assert after.startswith("<main>")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_nothing_but_get_is_answered(run: Path, method: str) -> None:
    with watched(run) as server:
        assert ask(server, method=method)[0] == 405


@pytest.mark.parametrize(
    "path", ["/../config.yaml", "/%2e%2e/config.yaml", "//config.yaml", "/config.yaml", "/main/", "*"]
)
def test_no_path_but_the_two_is_there(run: Path, path: str) -> None:
    with watched(run) as server:
        status, _, body = ask(server, path)
    assert (status, body) == (404, "expected / or /main\n")


def test_a_name_that_was_pointed_at_this_machine_reads_nothing(run: Path) -> None:
    with watched(run) as server:
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
            status, headers, body = ask(server, Host=host)
            assert status == 421
            assert "held" not in body
        assert ask(server, Host=f"localhost:{server.server_port}")[0] == 200
        assert "Access-Control-Allow-Origin" not in headers


def test_a_damaged_file_is_a_line_and_the_page_comes_back(run: Path) -> None:
    text = (run / FILE).read_text(encoding="ascii")
    with watched(run) as server:
        (run / FILE).write_text("broken\n" + text, encoding="ascii")
        status, _, body = ask(server)
        assert status == 500
        assert body.startswith(f"{run / FILE}, line 1: expected a JSON object")
        (run / FILE).write_text(text, encoding="ascii")
        assert ask(server)[0] == 200


def test_a_folder_of_neither_kind_and_a_port_that_is_taken_are_one_line_and_status_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path}: expected the folder of a study" in said
    with watched(run) as server:
        for port in (server.server_port, 1 << 20):
            assert main(["watch", str(run), "--port", str(port)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"--port: expected a free port, got {port}" in said


def test_ctrl_c_ends_it_with_its_status(run: Path) -> None:
    command = [sys.executable, "-m", "training", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
