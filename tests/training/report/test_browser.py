"""Reports in a real Chromium: nothing is cut off, asked for or complained about, on a phone, a desk and paper."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.training.report.browser import CHROMIUM, Browser, chromium
from tests.training.report.test_html_pages import fake_run, fake_study, many_arms, odd_status
from tests.training.study.test_runner import small_study
from training.study.config import StudyConfig
from training.study.report import write_report

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
    pytest.mark.xdist_group("browser"),
]
PHONE, DESK = 390, 1280  # pixels
LETTER, A4 = 965, 1032  # pixels between the margins of paper that lies across
KINDS = ("arms", "tasks", "many arms", "run")

# What reaches beyond the window or out of its own box, labels that lie on each other, and the poorest contrast of text
# (WCAG 2: 4.5 or more). Boxes that scroll may be as wide as they like; on paper nothing scrolls, so nothing may.
LOOK = """((width, paper) => {
  const wide = document.documentElement.scrollWidth - width;
  const inBox = e => !paper && e.closest('.box');
  const told = e => `${e.tagName}.${e.getAttribute('class') || ''} ${e.textContent.slice(0, 40)}`;
  const all = [...document.querySelectorAll('main *')], at = e => e.getBoundingClientRect();
  const beyond = all.filter(e => !inBox(e) && !e.closest('svg svg') && at(e).width
    && (at(e).right > width + 1 || at(e).left < -1)).map(told);
  const spilled = all.filter(e => !inBox(e) && !e.closest('svg') && getComputedStyle(e).display !== 'inline'
    && e.scrollWidth > e.clientWidth + 1).map(told);
  const collided = [...document.querySelectorAll('svg')].flatMap(svg => {
    const texts = [...svg.querySelectorAll(':scope > text')].map(e => [e, at(e)]);
    return texts.flatMap(([e, a], i) => texts.slice(i + 1).filter(([, b]) => a.left < b.right - 1
      && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3).map(([f]) => `${told(e)} | ${told(f)}`));
  });
  const light = colour => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = e => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
    return 'rgb(255, 255, 255)';
  };
  const pale = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !e.closest('title')
    && !(e.tagName === 'text' && e.getAttribute('style'))).map(e => {
    const [a, b] = [light(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']), light(page(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), told(e)];
  }).filter(([ratio]) => ratio < 4.5).map(([ratio, text]) => `${ratio.toFixed(2)} ${text}`);
  return JSON.stringify({wide, beyond, spilled, collided, pale});
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    home = tmp_path_factory.mktemp("pages")
    folders = {
        "arms": fake_study(home / "arms", small_study(seeds=(0, 1, 2), question="Which?", falsifier="None is.")),
        "tasks": fake_study(home / "tasks", stream()),
        "many arms": fake_study(home / "many", many_arms(), odd_status),
        "run": fake_run(
            home / "run", bits_per_byte=2.5, nats_per_token=1.75, steps=30, tokens=300, train_seconds=3.0, avg_k=2.0,
            baselines={"gzip": 3.5, "bigram": 2.25}, alarms=["Dead experts: all of them."],
            sample="def f(x):\n    pass", parameters=4321, active_parameters=1234, held_out_bytes=200,
            tokens_per_second=100.0,
        ),
    }  # fmt: skip
    return {kind: write_report(folder).path for kind, folder in folders.items()}


def stream() -> StudyConfig:
    """Four tasks in two orders."""
    tasks = {name: f"stdlib:{name}/*.py" for name in ("asyncio", "json", "email", "unittest")}
    return small_study(tasks=tasks, orders=([*tasks], [*reversed(tasks)]))


def looked_at(browser: Browser, page: Path, width: int, *, night: bool = False, paper: bool = False) -> dict:
    browser.open(page, width, night=night, paper=paper)
    return json.loads(browser.value(f"{LOOK}({width}, {json.dumps(paper)})"))


FINE = {"wide": 0, "beyond": [], "spilled": [], "collided": [], "pale": []}


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_or_pale_or_complained_about(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, night: bool
) -> None:
    assert looked_at(browser, pages[kind], width, night=night) == FINE
    assert browser.said == [f"request {pages[kind].as_uri()}"], "nothing else is asked for, and nothing is said"
    ink, page = (browser.value(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    assert (brightness(ink) > brightness(page)) == night


@pytest.mark.parametrize("width", [LETTER, A4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_on_paper(browser: Browser, pages: dict[str, Path], kind: str, width: int) -> None:
    assert looked_at(browser, pages[kind], width, night=True, paper=True) == FINE


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_prints_across(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    browser.open(pages[kind], DESK)
    printed = browser.printed()
    assert printed.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", printed)
    assert boxes
    assert all(float(width) > float(height) for width, height in boxes)


def test_the_look_finds_what_is_wrong_and_the_console_is_heard(browser: Browser, tmp_path: Path) -> None:
    """The negative twin: a page with every fault."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><main><p style='width:900px'>wide</p>"
        "<div style='width:20px;overflow:hidden'><b style='display:block;width:90px'>spilled</b></div>"
        "<svg><text y='20'>one</text><text y='20'>two</text></svg><p style='color:#999'>pale</p></main>"
        "<script>console.error('no'); fetch('https://nowhere.invalid')</script>",
        encoding="utf-8",
    )
    faults = looked_at(browser, page, PHONE)
    assert faults["wide"] > 0
    for key, text in {"beyond": "wide", "spilled": "spilled", "collided": "two", "pale": "pale"}.items():
        assert any(text in item for item in faults[key]), key
    assert any("consoleAPICalled" in message for message in browser.said)
    assert any("nowhere" in message for message in browser.said)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc to look for processes in")
def test_nothing_of_a_browser_is_left_behind(tmp_path: Path) -> None:
    def alive() -> list[str]:
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                pids += [path.parent.name] * (str(tmp_path).encode() in path.read_bytes())
        return pids

    with chromium(tmp_path / "profile") as opened:
        opened.value("1 + 1")
        assert alive()
    until = time.monotonic() + 20
    while alive() and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive()


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
