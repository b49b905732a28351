"""Reports in a real Chromium: nothing is cut off or asked for on a phone, a desk and paper, and figures answer back."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.training.commands.test_watch import watched
from tests.training.report.test_html_pages import (
    HOSTILE,
    LONG,
    fake_atlas,
    fake_run,
    fake_study,
    many_arms,
    odd_status,
    tuned,
)
from tests.training.study.test_runner import small_study
from training.storage.recorder import FILE
from training.study.config import StudyConfig
from training.study.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
    pytest.mark.xdist_group("browser"),
]
PHONE, DESK = 375, 1280  # pixels
LETTER, A4 = 965, 1032  # pixels between the margins of paper that lies across
KINDS = ("arms", "tasks", "many arms", "tuned", "run")

# What reaches beyond the window or out of its own box, labels of a figure that lie on each other or are cut off, and
# the poorest contrast of text (WCAG 2: 4.5 or more). Boxes that scroll may be as wide as they like; on paper nothing
# scrolls, so nothing may.
LOOK = """([width, paper]) => {
  const wide = document.documentElement.scrollWidth - width;
  const inBox = e => !paper && e.closest('.box');
  const told = e => `${e.tagName}.${e.getAttribute('class') || ''} ${e.textContent.slice(0, 40)}`;
  const all = [...document.querySelectorAll('main *')], at = e => e.getBoundingClientRect();
  const outside = all.filter(e => !inBox(e) && !e.closest('.plot *, noscript'));
  const beyond = outside.filter(e => at(e).width && (at(e).right > width + 1 || at(e).left < -1)).map(told);
  const spilled = outside.filter(e => !e.closest('svg') && getComputedStyle(e).display !== 'inline'
    && e.scrollWidth > e.clientWidth + 1).map(told);
  const collided = [], cut = [];
  for (const plot of document.querySelectorAll('.plot')) {
    const box = at(plot), texts = [...plot.querySelectorAll('text')].map(e => [e, at(e)]).filter(([, a]) => a.width);
    texts.forEach(([e, a], i) => {
      if (a.left < box.left - 2 || a.right > box.right + 2 || a.top < box.top - 2 || a.bottom > box.bottom + 2)
        cut.push(told(e));
      for (const [f, b] of texts.slice(i + 1)) if (a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom - 4 && b.top < a.bottom - 4) collided.push(`${told(e)} | ${told(f)}`);
    });
  }
  const light = colour => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = e => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
    return 'rgb(255, 255, 255)';
  };
  const pale = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    && !e.closest('noscript, script, .heatmap-label')).map(e => {
    const [a, b] = [light(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']), light(page(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), told(e)];
  }).filter(([ratio]) => ratio < 4.5).map(([ratio, text]) => `${ratio.toFixed(2)} ${text}`);
  return {wide, beyond, spilled, collided, cut, pale};
}"""
FINE = {"wide": 0, "beyond": [], "spilled": [], "collided": [], "cut": [], "pale": []}


class Tab:
    """A page that was opened. `said` are the messages of its console, its exceptions and the addresses it asked for."""

    def __init__(self, browser: Browser, path: Path, width: int, *, night: bool = False, paper: bool = False) -> None:
        self.said: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if night else "light", has_touch=width < 600
        )
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(f"console {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error {error}"))
        self.page.on("request", lambda request: self.said.append(f"request {request.url[:200]}"))
        self.page.emulate_media(media="print" if paper else "screen")
        self.page.goto(path.resolve().as_uri())
        self.width, self.paper = width, paper

    def faults(self) -> dict:
        return self.page.evaluate(LOOK, [self.width, self.paper])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    home = tmp_path_factory.mktemp("pages")
    folders = {
        "arms": fake_study(home / "arms", small_study(seeds=(0, 1, 2), question="Which?", falsifier="None is.")),
        "tasks": fake_study(home / "tasks", stream()),
        "many arms": fake_study(home / "many", many_arms(), odd_status),
        "tuned": fake_atlas(fake_study(home / "tuned", tuned(atlas_tokens=100))),
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


def drawn(browser: Browser, path: Path, width: int = DESK, **how: bool) -> Tab:
    """A page whose figures are all there."""
    tab = Tab(browser, path, width, **how)
    tab.page.wait_for_selector("html[data-drawn]", state="attached")
    return tab


@pytest.fixture
def run(browser: Browser, pages: dict[str, Path]) -> Page:
    return drawn(browser, pages["run"]).page


@pytest.fixture
def study(browser: Browser, pages: dict[str, Path]) -> Page:
    return drawn(browser, pages["arms"]).page


def figure(page: Page, title: str) -> str:
    """Id of a figure."""
    caption = page.locator("figcaption", has_text=title)
    return str(page.locator("figure", has=caption).first.locator(".plot").get_attribute("id"))


def shown(page: Page, title: str) -> list[dict]:
    """Traces of a figure as plotly has them."""
    return page.evaluate("id => document.getElementById(id).data", figure(page, title))


# Layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("night", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_or_pale_or_complained_about(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, night: bool
) -> None:
    tab = drawn(browser, pages[kind], width, night=night)
    assert tab.faults() == FINE
    assert tab.said == [f"request {pages[kind].as_uri()}"], "nothing else is asked for, and nothing is said"
    ink, page = (tab.page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    assert (brightness(ink) > brightness(page)) == night
    tab.page.context.close()


@pytest.mark.parametrize("width", [LETTER, A4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_on_paper(browser: Browser, pages: dict[str, Path], kind: str, width: int) -> None:
    assert drawn(browser, pages[kind], width, night=True, paper=True).faults() == FINE


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_prints_across(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    printed = drawn(browser, pages[kind], night=True).page.pdf(prefer_css_page_size=True)
    boxes = re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", printed)
    assert boxes
    assert all(float(width) > float(height) for width, height in boxes)


def test_the_look_finds_what_is_wrong_and_the_console_is_heard(browser: Browser, tmp_path: Path) -> None:
    """The negative twin: a page with every fault."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><main><p style='width:900px'>wide</p>"
        "<div style='width:20px;overflow:hidden'><b style='display:block;width:90px'>spilled</b></div>"
        "<div class=plot style='width:60px;height:40px'><svg><text y=20>one</text><text y=20>two</text>"
        "<text y=20 x=90>cut</text></svg></div><p style='color:#999'>pale</p></main>"
        "<script>console.error('no'); fetch('https://nowhere.invalid')</script>",
        encoding="utf-8",
    )
    tab = Tab(browser, page, PHONE)
    faults = tab.faults()
    assert faults["wide"] > 0
    for key, text in {"beyond": "wide", "spilled": "spilled", "collided": "two", "cut": "cut", "pale": "pale"}.items():
        assert any(text in item for item in faults[key]), key
    assert "console no" in tab.said
    assert any("nowhere" in message for message in tab.said)


def test_figures_follow_the_night_and_paper_is_white(study: Page) -> None:
    tick, soft = study.locator(".plot .xtick text").first, {"day": "rgb(87, 96, 106)", "night": "rgb(163, 171, 181)"}
    expect(tick).to_have_css("fill", soft["day"])
    study.emulate_media(color_scheme="dark")
    expect(tick).to_have_css("fill", soft["night"])
    study.emulate_media(media="print")
    expect(tick).to_have_css("fill", soft["day"])


# Figures that answer --------------------------------------------------------------------------------------------------


def test_hovering_shows_the_values(run: Page) -> None:
    run.locator(f"#{figure(run, 'Loss')}").hover()
    expect(run.locator(f"#{figure(run, 'Loss')} .hoverlayer")).to_contain_text(re.compile(r"step 1\d.*training.*2\.\d"))


def test_a_click_on_the_legend_hides_an_arm_in_every_figure_and_another_one_shows_it(study: Page) -> None:
    buttons = study.locator("button", has_text=re.compile("^surprise$"))
    maps = study.locator("figure[data-of=surprise]")
    for visible in (False, True):
        buttons.first.click()
        traces = [
            trace for title in ("Training loss", "compared with", "Load entropy") for trace in shown(study, title)
        ]
        assert {trace["visible"] for trace in traces if trace["meta"]["arm"] == "surprise"} == {visible}
        assert all(trace["visible"] for trace in traces if trace["meta"]["arm"] != "surprise")
        assert [button.get_attribute("aria-pressed") for button in buttons.all()] == [str(visible).lower()] * 3
        assert [each.is_visible() for each in maps.all()] == [visible] * 2


def test_axes_are_steps_or_wall_time_and_linear_or_logarithmic(study: Page) -> None:
    assert shown(study, "Training loss")[0]["x"][-1] == 30
    study.locator("button", has_text="wall time").first.click()
    assert shown(study, "Training loss")[0]["x"][-1] == 3.0
    assert shown(study, "Load entropy")[0]["x"][-1] == 30, "another panel keeps its own"
    study.locator("button", has_text="logarithmic").first.click()
    layout = study.evaluate("id => document.getElementById(id).layout", figure(study, "Training loss"))
    assert (layout["xaxis"]["title"]["text"], layout["yaxis"]["type"]) == ("seconds of training", "log")


def test_a_slider_goes_through_steps_and_layers_by_keys(study: Page) -> None:
    panel = study.locator(".panel", has=study.locator("h2", has_text="Load of the experts"))
    steps = panel.locator("input")
    expect(panel.locator("output")).to_have_text("at the end")
    end = shown_in(panel)
    steps.press("ArrowLeft")
    expect(panel.locator("output")).to_have_text(re.compile(r"to step \d+"))
    assert shown_in(panel) != end
    steps.press("End")
    assert shown_in(panel) == end
    first = shown(study, "Load entropy")[0]["y"]
    layers = study.locator(".panel", has=study.locator("h2", has_text="layer by layer")).locator("input")
    layers.press("ArrowRight")
    assert layers.get_attribute("aria-valuetext") == "layer 1"
    assert shown(study, "Load entropy")[0]["y"] != first


def shown_in(panel: Locator) -> list:
    return panel.locator(".plot").first.evaluate("plot => plot.data[0].z")


def test_a_table_is_sorted_by_a_click_or_a_key_and_unknown_values_come_last(study: Page) -> None:
    table = study.get_by_role("region", name="Results of every arm")
    head = table.locator("th", has_text="difference to baseline")
    column = table.locator("tbody tr td:nth-child(4)")

    head.get_by_role("button").click()
    rising = [text[:7] for text in column.all_inner_texts()]
    assert head.get_attribute("aria-sort") == "ascending"
    assert rising[-1] == "\u2013"
    values = [float(text.replace("\u2212", "-")) for text in rising[:-1]]
    assert values == sorted(values)
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [text[:7] for text in column.all_inner_texts()] == [*rising[-2::-1], "\u2013"]
    assert table.locator("[aria-sort]").count() == 1


def test_a_live_page_shows_what_is_new_and_keeps_what_was_switched(browser: Browser, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    page = browser.new_page()
    with watched(folder) as server:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("button", has_text="held out").click()
        page.get_by_role("button", name="logarithmic").first.click()
        last = json.loads((folder / FILE).read_text(encoding="ascii").splitlines()[-1])
        with (folder / FILE).open("a", encoding="ascii") as file:
            file.write(json.dumps(last | {"step": 31}) + "\n")
        expect(page.locator(".answer")).to_contain_text("step 31", timeout=30_000)
        expect(page.locator(".live")).to_contain_text("live, ")
        assert [(trace["visible"], trace["x"][-1]) for trace in shown(page, "Loss")] == [(True, 31), (False, 31)]
        assert page.evaluate("id => document.getElementById(id).layout.yaxis.type", figure(page, "Loss")) == "log"
    expect(page.locator(".live")).to_have_text("The server has ended; this is what it showed last.", timeout=30_000)


# Without a script, and against one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_script_everything_can_be_read(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": PHONE, "height": 900})
    page = context.new_page()
    page.goto(pages[kind].as_uri())
    tables = page.locator("noscript table")
    assert tables.count() > 5
    for table in tables.all():
        assert table.is_visible()
    said = {
        "run": "2.5000 bits per byte",
        "arms": "None is.",
        "tasks": "after task 2",
        "tuned": "by token id and expert",
    }
    wanted = said.get(kind, HOSTILE)
    text = page.locator("main").inner_text()
    for words in (wanted, "tiny-onn report" if kind != "run" else "tiny-onn train", "Configuration"):
        assert words in text
    assert not page.locator(".controls").first.get_by_role("button").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_a_hostile_name_runs_nothing_and_is_shown_as_it_is(browser: Browser, pages: dict[str, Path]) -> None:
    tab = drawn(browser, pages["many arms"])
    tab.page.on("dialog", lambda dialog: tab.said.append("dialog"))
    assert tab.page.locator("h1").inner_text() == "small"
    named = tab.page.locator(f"#{figure(tab.page, 'compared with')} .annotation-text").all_text_contents()
    assert not any("&lt;" in text for text in named)
    assert f"{LONG[:23]}\u2026" in named
    tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    script = "s => { const e = document.createElement('script'); e.textContent = s; document.body.append(e); }"
    tab.page.evaluate(script, "window.ran = true")
    assert tab.page.evaluate("window.ran") is None, "the page's policy lets no other script run"
    assert "dialog" not in tab.said


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
