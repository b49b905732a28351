"""Reports say what the analysis says, show every arm, fetch nothing, run nothing but their own script, and never fail
on odd studies."""

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.study.test_runner import small_study
from training.cli import main
from training.report.digest import Curve, empty_digest, extend
from training.report.html.charts import Difference, Line, curve_chart, forest, reach, rounded, text_of
from training.report.html.heat_maps import MOST_EXPERTS, NO_ROW, TOP, level_map, load_levels, shades
from training.report.html.page import versions
from training.report.html.study_arms import Study, read_groups, scores_by_seed, shared_end
from training.report.html.wording import MINUS, NOTHING, level_note, number, printable, speedup_bounds, speedup_text
from training.run.settings import save_settings
from training.storage.results import DIVERGED, FINISHED, UNFINISHED, read_results, write_results
from training.storage.token_atlas import Visits, write_atlas
from training.study.analysis import analyse
from training.study.comparison.table import study_table
from training.study.comparison.tuning import choose, points_of
from training.study.config import Arm, StudyConfig, StudyRun, expand
from training.study.file import save_study
from training.study.report import write_report
from training.study.summary import empty_row
from training.study.tasks import continual_measures

HOSTILE = "</title><script>alert('a')</script>\"&amp; x"
LONG = "an_arm_whose_name_has_no_place_to_break_" * 4
STEPS = 30


# A study's folder, made without training ------------------------------------------------------------------------------


def fake_study(
    folder: Path, study: StudyConfig, status: Callable[[StudyRun], str] = lambda run: FINISHED, shape: tuple = (2, 4)
) -> Path:
    """What run_study leaves behind, with invented numbers: arm i scores about 3 - i / 100."""
    arms = [*dict.fromkeys(run.arm for run in expand(study))]
    rows = [fake_run_of_study(folder, run, arms.index(run.arm), status(run), shape) for run in expand(study)]
    if study.tune_seeds:
        compared = expand(study, choose(points_of(study, rows)))[len(rows) :]
        rows += [fake_run_of_study(folder, run, arms.index(run.arm), status(run), shape) for run in compared]
    write_results(rows, folder)
    save_study(study, folder / "study.yaml")
    if all(row["status"] != UNFINISHED for row in rows):
        analyse(folder)
    return folder


def fake_run_of_study(folder: Path, run: StudyRun, arm: int, state: str, shape: tuple) -> dict[str, Any]:
    """The row of a run, whose folder is made; tuned rates are best at 2e-3."""
    drawn = np.random.default_rng([run.seed, arm])
    row = empty_row(run) | {"status": state}
    if state == FINISHED:
        away = abs(math.log(run.config.hyper.lr / 2e-3)) / 20 if run.tuned else 0.0
        nats = 3 - arm / 100 + 0.1 * run.seed + 0.004 * drawn.standard_normal() + away
        row |= {
            "nats_per_token": nats, "bits_per_byte": nats / math.log(2), "avg_k": 2.0 + arm / 20,
            "max_vio": 1.5, "dead_experts": 3, "gating_acc": 0.625, "gating_trivial": 0.5, "regret": 0.2 + arm / 40,
            "active_parameters": 12345, "flops_per_token": 6789 + 100 * arm, "seconds": 1.5,
            "routing_drift": 0.05 + 0.1 * drawn.random(),
        }  # fmt: skip
    matrix = (3 + drawn.random((len(run.order),) * 2)).tolist()
    if run.order and state == FINISHED:
        row |= continual_measures(matrix)._asdict()
    home = folder / "runs" / run.id
    home.mkdir(parents=True)
    last = {FINISHED: STEPS, DIVERGED: 17, UNFINISHED: 0}[state]
    fake_records(home, last, drawn, shape, diverged=state == DIVERGED)
    if state != UNFINISHED:
        alarms = ["Dead experts: 3 of 8"] if state == FINISHED else []
        curve = [(step, 5 / step + 2.1 - arm / 100) for step in range(10, last + 1, 10)]
        summary = row | {"steps": last, "tokens": 99, "train_seconds": 1.5, "parameters": 9, "alarms": alarms}
        summary |= {"held_out_curve": curve} | ({"score_matrix": matrix} if run.order else {})
        (home / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return row


def fake_atlas(folder: Path) -> Path:
    """Token atlas of every run: 30 token ids, the newline, `<` and letters; experts 0 and 2 help every other one."""
    signs = {10: "\n", 60: "<", 32: " ", **{97 + i: chr(97 + i) for i in range(27)}}
    table = [
        Visits(layer, token, 90 - at, expert, 40 - expert, (-1) ** (at + 1) * (layer + 1) / 9, 0.01 if expert else None)
        for layer in range(2)
        for at, token in enumerate(signs)
        for expert in (0, 2)
    ]
    for row in read_results(folder):
        home, seed = folder / "runs" / row["run"], int(row["seed"])
        write_atlas(table, signs.__getitem__, home)
        shares = {"token": [0.5, 0.25 + seed / 10], "token_expert": [0.75, None], "occurrences": 100}
        alike = [[1.0, 0.5], [0.5, 1.0]]
        agreement = {"kinds": ["w2", "benefit"], "tau": alike, "top1": alike}
        summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
        summary["routing"] = {"regret": {}, "agreement": agreement, "benefit_variance": shares}
        (home / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    analyse(folder)
    return folder


def tuned(**changes: Any) -> StudyConfig:
    """Three arms, tuned on two axes; one has no router."""
    arms = (
        Arm("switch"),
        Arm("surprise", {"hyper.pi_gamma": 0.2}),
        Arm("hash", {"model.routing": "hash", "hyper.router_lr": 0.0}),
    )
    axes = {"hyper.lr": [1e-3, 2e-3, 5e-3], "hyper.router_lr": [1e-3, 4e-3]}
    values = {
        "arms": arms,
        "axes": axes,
        "tune": [*axes],
        "seeds": (0, 1, 2),
        "tune_seeds": (7, 8),
        "baseline": "switch",
    }
    return small_study(**values | changes)


def fake_records(folder: Path, steps: int, drawn: np.random.Generator, shape: tuple, *, diverged: bool = False) -> None:
    records = []
    for step in range(1, steps + 1):
        load = drawn.dirichlet(np.full(shape[1], 0.3), shape[0])
        load[0, 0] = 0.0
        wild = diverged and step == steps
        record = {
            "step": step, "tokens": 10 * step, "seconds": step / 10, "main_loss": None if wild else 5 / step + 2,
            "avg_k": 2.0, "max_vio": 1 + drawn.random(), "gating_acc": 0.5, "gating_trivial": 0.25, "dead_experts": 1,
            "expert_load": load.tolist(), "target_load": load.tolist(), "expert_surprise": (load * 9).tolist(),
        }  # fmt: skip
        records.append(record | ({"held_out_nats": 5 / step + 2.1} if step % 10 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="ascii")


def many_arms(count: int = 25, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> StudyConfig:
    names = [HOSTILE, LONG, "Überraschung 惊讶"]
    names += [f"arm {number}" for number in range(len(names), count)]
    arms = [Arm(name, {"hyper.router_lr": 1e-4 * (i + 1)}) for i, name in enumerate(names[:count])]
    return small_study(arms=arms, baseline=names[0], seeds=seeds, question=f"{HOSTILE}?", falsifier=HOSTILE, **changes)


def odd_status(run: StudyRun) -> str:
    """Of 25 arms: one diverged in one seed, one in all, one unfinished."""
    if (run.arm == "arm 5" and run.seed == 1) or run.arm == "arm 6":
        return DIVERGED
    return UNFINISHED if run.arm == "arm 7" and run.seed else FINISHED


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of four arms and three seeds, and its report."""
    folder = fake_study(tmp_path_factory.mktemp("studies") / "four", small_study(seeds=(0, 1, 2), question="Which?"))
    write_report(folder)
    return folder


# Reading pages --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, tables, scripts, figures and text of a page as one without scripts shows it; fails on unmatched tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.policy = self.text = ""
        self._open: list[str] = []
        self._region = ""
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    @property
    def figures(self) -> dict[str, Any]:
        """Id -> what plotly draws there."""
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "input", "line", "rect"):
            self._open.append(tag)
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = str(dict(attrs)["content"])
        if tag == "script":
            self.scripts.append("")
        if dict(attrs).get("role") == "region":
            self._region = str(dict(attrs)["aria-label"])
            self.tables[self._region] = []
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("td", "th"):
            self.tables[self._region][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect"), tag
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data
            if {"td", "th"} & {*self._open}:
                gap = " " if self._open[-1] == "small" else ""
                cell = (self.tables[self._region][-1][-1] + gap + data).replace("  ", " ")
                self.tables[self._region][-1][-1] = cell.lstrip()


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def assert_safe(page: Page) -> None:
    """Nothing is fetched, and only the two scripts run that the policy names; the first script is data."""
    assert not {"iframe", "object", "embed", "img", "base", "form"} & {*page.tags}
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        assert name not in ("style", "xlink:href", "action"), (name, value)
        assert name not in ("href", "src") or value == "data:,", (name, value)
    assert not re.search(r"url\(|@import", "".join(dict(page.attributes).values()))
    assert len(page.scripts) == 3
    assert ("type", "application/json") in page.attributes
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    wanted = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    assert page.policy == wanted
    assert "plotly.js" in page.scripts[1][:200]


# The page of a study --------------------------------------------------------------------------------------------------


def test_every_cell_of_the_results_is_the_analysis(studied: Path) -> None:
    analysis = json.loads((studied / "analysis.json").read_text(encoding="utf-8"))
    head, *rows = read_page(studied).tables["Results of every arm"]
    assert head[:4] == ["arm", "verdict", "nats per token", "difference to baseline"]
    assert len(rows) == len(analysis["arms"]) == 4
    by_name = {row[0].removesuffix(" 3 seeds"): row for row in rows}
    for label, arm in analysis["arms"].items():
        pair = analysis["against_baseline"].get(label)
        row = [cell.replace(MINUS, "-").removesuffix(" beyond the margin") for cell in by_name[label]]
        flops = f"{arm['flops_per_token']:,.0f} 12,345 weights"
        compared = ["baseline", NOTHING, NOTHING, f"{arm['avg_k']:.2f}", flops, NOTHING, NOTHING]
        if pair is not None:
            difference = f"{pair['difference']:+.4f} {pair['low']:+.4f} to {pair['high']:+.4f}{level_note(pair)}"
            k = f"{arm['avg_k']:.2f} {'matched' if pair['k_matched'] else 'not matched'}"
            flops += " matched"
            speed = f"{speedup_text(pair['effective_speedup'])} {speedup_bounds(pair['effective_speedup'])}".replace(
                ",", ""
            )
            tests = [f"{pair['p_holm']:.3g}", f"{pair['tost_p_holm']:.3g}"]
            compared = [pair["verdict"], difference, speed, k, flops, *tests]
        verdict, difference, speed, k, flops, p_holm, tost_p = compared
        assert row[1:] == [
            verdict, f"{arm['mean']:.4f} {arm['low']:.4f} to {arm['high']:.4f}", difference, speed, k, "1.50", "3.0",
            "0.625 trivial 0.500", flops, f"{arm['bits_per_byte']:.4f}", p_holm, tost_p,
        ]  # fmt: skip
    assert {row[0] for row in rows} == {f"{label} 3 seeds" for label in analysis["arms"]}
    assert by_name["surprise"][4].startswith("> 1.00 ")
    assert "matched" in by_name["surprise"][5]
    assert "not matched" in by_name["budget"][5]


def test_a_tuned_study_shows_the_loss_over_every_axis_and_warns_of_edges(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "tuned", tuned())
    write_report(folder)
    page, analysis = read_page(folder), json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    assert_safe(page)
    assert (
        "Every arm is shown at its best value of hyper.lr, hyper.router_lr, chosen by runs of seeds 7, 8" in page.text
    )
    (head, *rows), (_, *routers) = page.tables["lr"], page.tables["router_lr"]
    assert head == ["held-out nats per token", "0.001", "0.002", "0.005", "best"]
    assert [row[0] for row in rows] == ["switch", "surprise", "hash"]
    assert [row[0] for row in routers] == ["switch", "surprise"], "the hash has no router"
    for label, *cells, best in rows:
        curve = analysis["arms"][label]["tuning"]["hyper.lr"]
        assert cells == [f"{mean:.4f}" for mean in curve["mean"]]
        assert (best, curve["best"]) == ("0.002", 0.002)
    assert len(analysis["warnings"]) == 2
    assert all(line in page.text for line in analysis["warnings"])
    titles = {key: of["layout"].get("xaxis", {}).get("title", {}).get("text") for key, of in page.figures.items()}
    figure = next(of for key, of in page.figures.items() if titles[key] == "hyper.lr")
    assert [trace["meta"]["arm"] for trace in figure["data"]] == ["switch", "surprise", "hash"]
    assert [trace["x"] for trace in figure["data"]] == [[0, 1, 2]] * 3
    assert figure["data"][0]["marker"]["symbol"] == ["circle", "star", "circle"]
    for spec in page.figures.values():
        plotly.graph_objects.Figure({key: spec[key] for key in ("data", "layout")})


def test_the_token_atlas_shows_every_frequent_token_and_the_shares_of_variance(tmp_path: Path) -> None:
    """Experts 0 and 2 help the newline and harm `<`, more so in layer 1; the rest of 30 tokens is less frequent."""
    folder = fake_atlas(fake_study(tmp_path / "atlas", small_study(seeds=(0, 1), atlas_tokens=100)))
    write_report(folder)
    page = read_page(folder)
    assert_safe(page)
    assert page.tables["by token id"][0] == ["share explained", "layer 0", "layer 1"]
    assert page.tables["by token id"][1][1:] == ["0.500", "0.300"]
    assert page.tables["by token id and expert"][1][1:] == ["0.750", NOTHING]
    maps = [of for of in page.figures.values() if of.get("frames") and "text" in of["data"][0]]
    assert len(maps) == 4
    assert maps[0]["layout"]["yaxis"]["ticktext"][:3] == ["\\n", "&lt;", "\u2423"]
    assert len(maps[0]["layout"]["yaxis"]["ticktext"]) == 20
    first, last = (frame["data"][0] for frame in maps[0]["frames"])
    assert np.shape(first["z"]) == (20, 3)
    assert [z[1] for z in first["z"]] == [NO_ROW] * 20
    assert (last["z"][0][0], last["z"][1][0]) == (0, TOP)
    assert last["text"][0][2] == f"\\n, expert 2: {MINUS}0.222 ± 0.01 nats, 38 of 90 visits"
    assert first["text"][1][0] == "&lt;, expert 0: +0.111 nats, 40 of 89 visits"
    for spec in maps:
        plotly.graph_objects.Figure({key: spec[key] for key in ("data", "layout")})


def test_loss_regret_and_drift_have_a_point_for_every_compared_run(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "tuned", tuned())
    write_report(folder)
    page, results = read_page(folder), read_results(folder)
    compared = {row["run"]: row for row in results if int(row["seed"]) < 3}
    assert len(compared) == 9
    keys = {"held-out loss": "nats_per_token", "regret": "regret", "drift": "routing_drift"}
    for y, x in (("held-out loss", "regret"), ("held-out loss", "drift"), ("regret", "drift")):
        head, *rows = page.tables[f"{y} against {x}"]
        assert head == ["run", x, y]
        assert {row[0] for row in rows} == {*compared}
        for run, *values in rows:
            assert values == [f"{float(compared[run][keys[key]]):.4f}" for key in (x, y)]


def test_a_study_in_its_tuning_has_a_page(tmp_path: Path) -> None:
    """Half of the points are made and nothing is compared; then all are made."""
    folder = fake_study(tmp_path / "begun", tuned(), lambda run: UNFINISHED if run.config.hyper.lr > 2e-3 else FINISHED)
    write_results([row for row in read_results(folder) if int(row["seed"]) > 3], folder)
    for done in (False, True):
        if done:
            write_results([row | {"status": FINISHED, "nats_per_token": "2"} for row in read_results(folder)], folder)
        write_report(folder)
        page = read_page(folder)
        assert [row[1] for row in page.tables["Results of every arm"][1:]].count("undecided") == 2
        assert len(page.tables["lr"]) == 4


def test_the_page_holds_the_answer_the_plan_the_file_and_the_commands(studied: Path) -> None:
    page = read_page(studied)
    analysis = json.loads((studied / "analysis.json").read_text(encoding="utf-8"))
    for wanted in (
        analysis["answer"], "Which?", "± 0.02 nats per token", "Set before the runs", versions(),
        (studied / "study.yaml").read_text(encoding="utf-8"), f"tiny-onn study {studied}/study.yaml --out ",
        "hyper.surprise_weight = 0.0", "dead experts in 3 of 3 runs", "Load entropy", "Dead experts", "layer 1",
    ):  # fmt: skip
        assert wanted in page.text
    assert_safe(page)
    every = page.tables["Every run"]
    assert len(every) == 1 + 12
    assert all(len(row) == len(every[0]) for row in every)


def test_what_analysis_json_says_is_shown_and_not_computed_again(studied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(studied, tmp_path / "copy")
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    analysis["arms"]["surprise"]["mean"] = 7.25
    (folder / "analysis.json").write_text(json.dumps(analysis), encoding="utf-8")
    write_report(folder)
    assert "7.2500" in read_page(folder).text
    (folder / "analysis.json").unlink()
    write_report(folder)
    assert json.loads((folder / "analysis.json").read_text(encoding="utf-8"))["arms"]["surprise"]["mean"] < 4
    assert "7.2500" not in read_page(folder).text


def test_a_page_says_which_runs_chose_the_tuned_values_and_counts_the_seeds_that_are_compared(
    studied: Path, tmp_path: Path
) -> None:
    """By the note; by the seeds that are not compared; without both, analysis.json is of a version without them."""
    folder = shutil.copytree(studied, tmp_path / "copy")
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    for facts, wanted in (
        ({"note": "Tuned by the runs that are compared.", "tuned_on": []}, "Tuned by the runs that are compared."),
        ({"note": "", "tuned_on": [1, 2]}, "chosen by runs of seeds 1, 2, which are not compared."),
        ({}, "which flatters all of them, and nothing here is corrected for it; remove analysis.json"),
    ):
        older = {key: value for key, value in analysis.items() if key not in ("note", "tuned_on")}
        (folder / "analysis.json").write_text(json.dumps(older | facts | {"tuned": ["hyper.lr"]}), encoding="utf-8")
        write_report(folder)
        page = read_page(folder)
        assert wanted in page.text
        assert ("One seed: no intervals" in page.text) is bool(facts.get("tuned_on"))


def test_a_score_that_is_not_finite_is_a_diverged_run_on_the_page(studied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(studied, tmp_path / "copy")
    rows = read_results(folder)
    row = next(row for row in rows if row["arm"] == "surprise")
    row["nats_per_token"] = "inf"
    write_results(rows, folder)
    (folder / "analysis.json").unlink()
    assert "undecided, 1 diverged" in write_report(folder).text
    shown = {row[0]: row for row in read_page(folder).tables["Results of every arm"]}
    assert shown["surprise 2 seeds, 1 diverged"][1] == "undecided"
    assert "inf" not in shown["surprise 2 seeds, 1 diverged"][2]


def test_a_margin_that_was_changed_after_the_runs_is_told(studied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(studied, tmp_path / "copy")
    assert "study.yaml was changed" not in read_page(folder).text
    described = (folder / "study.yaml").read_text(encoding="utf-8")
    (folder / "study.yaml").write_text(described.replace("margin: 0.02", "margin: 0.5"), encoding="utf-8")
    write_report(folder)
    assert "study.yaml was changed: margin" in read_page(folder).text


def test_hostile_names_are_text_and_odd_runs_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fake_study(tmp_path / "<b onclick=alert(1)>", many_arms(), odd_status)
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"report: {folder}/report.html" in printed
    page = read_page(folder)
    assert_safe(page)
    rows = {row[0]: row for row in page.tables["Results of every arm"]}
    assert len(rows) == 26
    assert f"{HOSTILE} 3 seeds" in rows
    assert rows["arm 5 2 seeds, 1 diverged"][1] == "undecided"
    assert rows["arm 6 0 seeds, 3 diverged"][2] == NOTHING
    assert rows["arm 7 1 seed"][2] == number(3 - 0.07 + 0.004 * _first_draw(7))
    for wanted in (
        LONG,
        f"{HOSTILE}?",
        "2 of 75 runs are unfinished",
        "4 of 75 runs diverged",
        "1 diverged, at step 17",
    ):
        assert wanted in page.text
    assert page.text.count(HOSTILE) >= 8  # answer, facts, falsifier, table, legend, maps, settings, runs
    assert not (folder / "analysis.json").exists(), "the analysis of a study under way would go stale"


def _first_draw(arm: int) -> float:
    return float(np.random.default_rng([0, arm]).standard_normal())


def test_an_arm_that_changed_nothing_is_told_at_the_top(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "idle", small_study(question="Which?"))
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    write_report(folder)
    assert "had no effect" not in read_page(folder).text
    analysis["against_baseline"]["switch"]["identical"] = True
    (folder / "analysis.json").write_text(json.dumps(analysis), encoding="utf-8")
    write_report(folder)
    assert "Every score of switch is its baseline" in read_page(folder).text


def test_one_seed_has_no_intervals_and_no_verdict(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "one", small_study(seeds=(0,)))
    write_report(folder)
    page = read_page(folder)
    rows = {row[0]: row for row in page.tables["Results of every arm"][1:]}
    assert {row[1] for row in rows.values()} == {"baseline", "undecided"}
    assert rows["surprise 1 seed"][2] == number(3 - 0.01 + 0.004 * _first_draw(1))
    assert "One seed: no intervals" in page.text
    assert "no interval" in page.text


def test_a_study_without_scores_during_its_runs_says_so_and_not_that_it_has_no_record(tmp_path: Path) -> None:
    for every in (0, 500):
        base = replace(small_study().base, eval_every=every)
        folder = fake_study(tmp_path / f"done{every}", small_study(base=base))
        for path in folder.glob("runs/*/metrics.jsonl"):
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept = [{k: v for k, v in record.items() if not k.startswith("held_out")} for record in records]
            path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        write_report(folder)
        said = read_page(folder).text
        assert f"No score was made during the runs (eval_every: {every}, " in said
        assert "The final ones are in the table." in said
        assert "No record yet" not in said


def test_a_wide_table_has_a_bar_to_scroll_it_with(tmp_path: Path) -> None:
    """Bars that a system hides until they are used leave a table that looks cut off."""
    page = write_report(fake_study(tmp_path / "wide", small_study())).path.read_text(encoding="utf-8")
    for rule in (".box{overflow-x:auto", "scrollbar-width:thin", "::-webkit-scrollbar{height:"):
        assert rule in page


def test_a_study_without_a_finished_run_has_a_page(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "begun", small_study(), lambda run: UNFINISHED)
    report = write_report(folder)
    page = read_page(folder)
    assert "8 of 8 runs are unfinished" in page.text
    assert "no pair of runs" in page.text
    assert "frozen" in report.text


def test_two_data_sets_are_two_groups_with_their_own_baselines(tmp_path: Path) -> None:
    study = small_study(axes={"data": ["a.txt", "b.txt"]}, seeds=range(5))
    folder = fake_study(tmp_path / "crossed", study)
    report = write_report(folder)
    page = read_page(folder)
    heads = [row[0] for row in page.tables["Results of every arm"] if len(row) == 1]
    assert heads == ["compared with frozen data=a.txt", "compared with frozen data=b.txt"]
    named = [row[0] for row in page.tables["Results of every arm"][1:] if len(row) > 1]
    assert {name.removesuffix(" 5 seeds") for name in named} == {arm.name for arm in study.arms}, (
        "the head says the rest"
    )
    assert len(page.tables["Every run"]) == 1 + 40
    assert sum("compared with" in label for label in page.tables) == 2, "a forest plot each"
    assert report.text == study_table(json.loads((folder / "analysis.json").read_text(encoding="utf-8")))


def test_what_all_labels_of_a_group_end_with_is_said_once() -> None:
    assert shared_end(["a data=x", "b c data=x"]) == " data=x"
    assert shared_end(["a lr=1 data=x", "b lr=1 data=x"]) == " lr=1 data=x"
    assert shared_end(["a lr=1 data=x", "b lr=2 data=x"]) == " data=x"
    assert shared_end(["data=x", "b data=x"]) == shared_end(["a b", "c b"]) == shared_end(["a data=x"]) == ""


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "means", small_study(arms=(), baseline=""))
    histories = {
        "small-seed0": [{"step": 1, "main_loss": 4.0}, {"step": 2, "main_loss": 3.0}, {"step": 3, "main_loss": 1.0}],
        "small-seed1": [{"step": 1, "main_loss": 2.0}, {"step": 2, "main_loss": None}],
    }
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    rows = [{"run": run, "seed": i, "nats_per_token": i + 1.5, "status": FINISHED} for i, run in enumerate(histories)]
    study = Study("x", {}, "", analysis, rows)
    digests = {run: extend(empty_digest(), records) for run, records in histories.items()}
    ((arm,),) = (group.arms for group in read_groups(study, digests.__getitem__, lambda run: {}))
    assert (arm.curves["main_loss"].step.tolist(), arm.curves["main_loss"].y.tolist()) == ([1, 2, 3], [3, 3, 1])
    assert scores_by_seed(study, arm) == {"0": 1.5, "1": 2.5}


def test_every_figure_is_one_that_plotly_knows_and_has_words_and_numbers_beside_it(studied: Path) -> None:
    page = read_page(studied)
    ids = [value for name, value in page.attributes if name == "id" and value != "figures"]
    assert ids == [*page.figures]
    assert page.attributes.count(("role", "img")) == page.tags.count("noscript") == len(ids) > 10
    for figure in page.figures.values():
        plotly.graph_objects.Figure(figure["data"], figure["layout"])  # raises on what it does not know
        for frame in figure.get("frames", ()):
            merged = [trace | part for trace, part in zip(figure["data"], frame["data"], strict=True)]
            plotly.graph_objects.Figure(merged, figure["layout"])
    last = {row[0]: row[-1] for row in page.tables["Training loss"][1:]}
    drawn = [
        {t["name"]: f"{t['y'][-1]:.4g}" for t in f["data"] if t["y"]} for f in page.figures.values() if "over" in f
    ]
    assert last in drawn


def test_an_arm_has_one_colour_in_every_figure(studied: Path) -> None:
    colours: dict[str, set[str]] = {}
    for figure in read_page(studied).figures.values():
        for trace in figure["data"]:
            if trace["type"] == "scatter":
                shown = [trace[key]["color"] for key in ("line", "marker") if "color" in trace.get(key, {})]
                colours.setdefault(trace["meta"]["arm"], set()).update(shown)
    assert len(colours) == 4
    assert len(set.union(*colours.values())) == sum(map(len, colours.values())) == 4


def test_the_same_folder_is_the_same_page_to_the_byte(studied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(studied, tmp_path / "copy")
    pages = [write_report(folder).path.read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


# The page of a run ----------------------------------------------------------------------------------------------------


def fake_run(folder: Path, **summary: Any) -> Path:
    folder.mkdir()
    save_settings(replace(small_study().base, out="runs/x", data=HOSTILE), folder / "config.yaml")
    fake_records(folder, STEPS, np.random.default_rng(0), (2, 4))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_a_run_has_a_page_with_its_score_baselines_alarms_and_sample(tmp_path: Path, capsys: Any) -> None:
    sample = "def <i>f</i>(x):\n    return x & 1"
    folder = fake_run(
        tmp_path / "run", bits_per_byte=2.5, nats_per_token=1.75, steps=STEPS, tokens=300, train_seconds=3.0,
        tokens_per_second=100.0, avg_k=2.0, parameters=4321, active_parameters=1234, held_out_bytes=200,
        baselines={"gzip": 3.5, "bigram": 2.25}, alarms=["Dead experts: <all> of them."], sample=sample,
    )  # fmt: skip
    assert main(["report", str(folder)]) == 0
    assert "1.7500 nats per token" in capsys.readouterr().out
    page = read_page(folder)
    assert_safe(page)
    answer = "2.5000 bits per byte, 1.7500 nats per token on 200 held-out bytes"
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    for wanted in (answer, sample, HOSTILE, "<all> of them", config, f"tiny-onn train --config {folder}"):
        assert wanted in page.text
    assert [row[0] for row in page.tables["Score beside baselines"][1:]] == ["bigram", "this model", "gzip"]


def test_a_run_of_a_study_and_one_under_way_have_pages(studied: Path, tmp_path: Path) -> None:
    inner = shutil.copytree(studied / "runs" / "surprise-seed0", tmp_path / "inner")
    save_settings(small_study().base, inner / "config.yaml")
    (inner / "summary.json").unlink()
    assert "no score yet" in write_report(inner).text
    assert f"Not done: step {STEPS} of 4" in read_page(inner).text
    (inner / "metrics.jsonl").unlink()
    write_report(inner)
    assert "Not done: step 0 of 4" in read_page(inner).text


def test_a_folder_of_neither_kind_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["report", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{folder}: expected the folder of a study" in said
    assert not [*tmp_path.iterdir()]


def test_damaged_files_are_named_in_one_line(studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "analysis.json": "[1]", "results.csv": "", "study.yaml": "a: [", "runs/surprise-seed0/metrics.jsonl": "x\n{}\n",
        "runs/surprise-seed0/summary.json": "{",
    }.items():  # fmt: skip
        folder = shutil.copytree(studied, tmp_path / name.replace("/", "-"))
        (folder / name).write_text(text, encoding="utf-8")
        assert main(["report", str(folder)]) == 2, name
        said = capsys.readouterr().err
        assert f"{folder / name}" in said
        assert said.count("\n") == 1


def test_values_of_another_form_are_one_line(studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(studied, tmp_path / "odd")
    for odd in ("base: text\n", "base: [1]\n", "arms: 3\n", "axes: text\n"):
        (folder / "study.yaml").write_text(odd, encoding="utf-8")
        assert main(["report", str(folder)]) == 2, odd
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{folder}: expected results, summaries and records" in said


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_text_that_no_page_may_hold_is_replaced_and_markup_within_figures_is_text() -> None:
    assert printable("<\x00\ud800>") == "<\ufffd\ufffd>"
    assert text_of("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert text_of("x" * 99, 5) == "xxxx\u2026"


def test_numbers_that_are_unknown_are_dashes() -> None:
    assert [number(v) for v in (None, math.nan, math.inf, "1", -0.5)] == [*[NOTHING] * 4, f"{MINUS}0.5000"]
    assert [number(v, "+.4f") for v in (-0.00001, 0.0, 0.25)] == ["0.0000", "0.0000", "+0.2500"]


@given(st.lists(st.floats(), max_size=5))
def test_rounded_numbers_have_five_digits_and_unknown_ones_are_none(values: list[float]) -> None:
    for value, short in zip(values, rounded(np.array(values)), strict=True):
        if not math.isfinite(value):
            assert short is None
        elif abs(value) < 1e30:
            assert short == pytest.approx(value, rel=1e-4, abs=1e-300)


def drawn(*lines: tuple[str, Any, int], **levels: float) -> Any:
    """Chart of curves over steps 1, 2, ..."""
    steps = [np.arange(1.0, 1 + np.shape(y)[-1]) for _, y, _ in lines]
    named = [
        Line(name, name, slot, Curve(x, x / 10, np.asarray(y))) for x, (name, y, slot) in zip(steps, lines, strict=True)
    ]
    return curve_chart("loss", "nats", named, levels=levels, empty="nothing here")


def test_a_wild_value_does_not_flatten_a_chart() -> None:
    calm = np.linspace(5, 3, 100)
    assert "range" not in drawn(("a", calm, 1)).spec["layout"]["yaxis"]
    assert drawn(("a", calm, 1), gzip=7.0).spec["layout"]["yaxis"]["range"][1] > 7
    calm[50] = 1e9
    chart = drawn(("a", calm, 1))
    assert "cut off" in chart.note
    assert chart.spec["layout"]["yaxis"]["range"][1] < 10


def test_a_curve_is_drawn_over_steps_and_over_wall_time_and_no_data_is_said() -> None:
    chart = drawn(("a", [4.0, 2.0, 3.0], 9))
    (trace,) = chart.spec["data"]
    assert (trace["x"], trace["y"], trace["meta"]["seconds"]) == ([1, 2, 3], [4, 2, 3], [0.1, 0.2, 0.3])
    assert (trace["mode"], trace["line"]) == ("lines+markers", {"color": "var(--c2)", "dash": "dash"})
    assert chart.rows == [["a", "4", "2", "3"]]
    assert chart.said == "loss, nats: a from 4 to 3"
    assert drawn(("a", [], 1)).said == "nothing here"


def test_a_chart_of_layers_has_a_frame_for_each() -> None:
    chart = drawn(("a", [[1.0, 2.0], [3.0, math.nan]], 1))
    assert [(frame["name"], frame["data"][0]["y"]) for frame in chart.spec["frames"]] == [
        ("layer 0", [1, 2]),
        ("layer 1", [3, None]),
    ]
    assert chart.rows == [["a", "2", NOTHING]]


def row(half: float, mean: float = 0.0) -> Difference:
    pair = {"difference": mean, "low": mean - half, "high": mean + half, "verdict": "undecided"}
    return Difference("b", "b", 1, pair, [])


def test_one_very_wide_interval_does_not_squash_the_others() -> None:
    assert reach([row(0.1), row(0.2), row(0.15)], 0.02) == 0.2
    assert reach([row(0.1), row(0.2), row(0.15), row(90.0)], 0.02) == pytest.approx(0.7)
    assert reach([], 0.02) == pytest.approx(0.06)


def test_an_interval_that_leaves_the_frame_ends_in_an_arrow_and_its_numbers_are_whole() -> None:
    chart = forest("a", [row(0.1), row(0.2), row(0.15), row(90.0)], 0.02)
    whisker = next(trace for trace in chart.spec["data"] if max(map(abs, trace["x"])) > 0.5)
    assert whisker["marker"]["symbol"] == ["triangle-left", "triangle-right"]
    assert whisker["x"] == pytest.approx([-0.7, 0.7])
    assert "\u221290.0000 to +90.0000" in whisker["text"][0]
    assert chart.rows[-1] == ["b", "undecided", "0.0000", "\u221290.0000 to +90.0000"]


def test_levels_of_load_are_octaves_of_the_fair_share() -> None:
    fair = np.array([[2.0, 1.0, 0.5, 0.125], [64.0, 0.0, np.nan, 0.01]])
    assert load_levels(fair) == pytest.approx(np.array([[4, 3, 2, 0], [TOP, NO_ROW, np.nan, 0]]), nan_ok=True)


def test_shades_of_surprise_are_spaced_by_the_logarithm_where_they_span_much() -> None:
    assert shades(np.array([1.0, 2.0, 3.0, 0.0]), (1.0, 3.0)).tolist() == [0, 3, TOP, NO_ROW]
    assert shades(np.array([1.0, 10.0, 100.0]), (1.0, 100.0)) == pytest.approx([0, 3, TOP])


def test_neighbours_share_a_cell_of_a_map_where_there_are_many() -> None:
    levels = np.arange(2.0 * 256).reshape(1, -1) % 7
    (trace,) = level_map([("", levels, levels)], "h", "x", ("layer", "expert"))["data"]
    assert len(trace["z"][0]) == MOST_EXPERTS
    assert trace["z"][0][:2] == [3, 6]
    assert trace["dx"] == 4
