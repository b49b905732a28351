"""Reports say what the analysis says, show every arm, fetch and execute nothing, and never fail on odd studies."""

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
import pytest

from tests.training.study.test_runner import small_study
from training.cli import main
from training.report.html.charts import Curve, Difference, line_chart, reach, ticks
from training.report.html.elements import MINUS, NOTHING, VOID, element, level_note, number, versions
from training.report.html.heat_maps import NONE, UNKNOWN, heat_map, load_levels
from training.report.html.study_arms import scores_by_seed, shared_end
from training.report.html.study_layers import by_layer, layer_key, measures
from training.run.settings import save_settings
from training.storage.results import DIVERGED, FINISHED, UNFINISHED, read_results, write_results
from training.study.analysis import analyse, study_table
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
    runs = expand(study)
    arms = [*dict.fromkeys(run.arm for run in runs)]
    rows = []
    for run in runs:
        drawn, state = np.random.default_rng([run.seed, arms.index(run.arm)]), status(run)
        rows.append(empty_row(run) | {"status": state})
        if state == FINISHED:
            nats = 3 - arms.index(run.arm) / 100 + 0.1 * run.seed + 0.004 * drawn.standard_normal()
            rows[-1] |= {
                "nats_per_token": nats, "bits_per_byte": nats / math.log(2), "avg_k": 2.0 + arms.index(run.arm) / 20,
                "max_vio": 1.5, "dead_experts": 3, "gating_acc": 0.625, "gating_trivial": 0.5,
                "active_parameters": 12345, "flops_per_token": 6789 + 100 * arms.index(run.arm), "seconds": 1.5,
            }  # fmt: skip
        matrix = (3 + drawn.random((len(run.order),) * 2)).tolist()
        if run.order and state == FINISHED:
            rows[-1] |= continual_measures(matrix)._asdict()
        home = folder / "runs" / run.id
        home.mkdir(parents=True)
        last = {FINISHED: STEPS, DIVERGED: 17, UNFINISHED: 0}[state]
        fake_records(home, last, drawn, shape, diverged=state == DIVERGED)
        if state != UNFINISHED:
            alarms = ["Dead experts: 3 of 8"] if state == FINISHED else []
            summary = rows[-1] | {"steps": last, "tokens": 99, "train_seconds": 1.5, "parameters": 9, "alarms": alarms}
            summary |= {"score_matrix": matrix} if run.order else {}
            (home / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    write_results(rows, folder)
    save_study(study, folder / "study.yaml")
    if all(row["status"] != UNFINISHED for row in rows):
        analyse(folder)
    return folder


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
    """Tags, links, tables and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._region = ""
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if dict(attrs).get("role") == "region":
            self._region = str(dict(attrs)["aria-label"])
            self.tables[self._region] = []
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("td", "th"):
            self.tables[self._region][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & {*self._open}:
            gap = " " if self._open[-1] == "small" else ""
            self.tables[self._region][-1][-1] += gap + data


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def assert_safe(page: Page) -> None:
    """Nothing is executed, nothing is fetched."""
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {*page.tags}
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "xlink:href", "style", "action"):
            assert value == "data:,", (name, value)
    assert not re.search(r"url\(|@import", (page.rawdata + "".join(dict(page.attributes).values())))


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
        compared = ["baseline", NOTHING, f"{arm['avg_k']:.2f}", flops, NOTHING, NOTHING]
        if pair is not None:
            difference = f"{pair['difference']:+.4f} {pair['low']:+.4f} to {pair['high']:+.4f}{level_note(pair)}"
            k = f"{arm['avg_k']:.2f} {'matched' if pair['k_matched'] else 'not matched'}"
            flops += " matched"
            compared = [pair["verdict"], difference, k, flops, f"{pair['p_holm']:.3g}", f"{pair['tost_p_holm']:.3g}"]
        verdict, difference, k, flops, p_holm, tost_p = compared
        assert row[1:] == [
            verdict, f"{arm['mean']:.4f} {arm['low']:.4f} to {arm['high']:.4f}", difference, k, "1.50", "3.0",
            "0.625 trivial 0.500", flops, f"{arm['bits_per_byte']:.4f}", p_holm, tost_p,
        ]  # fmt: skip
    assert {row[0] for row in rows} == {f"{label} 3 seeds" for label in analysis["arms"]}
    assert "matched" in by_name["surprise"][4]
    assert "not matched" in by_name["budget"][4]


def test_the_page_holds_the_answer_the_plan_the_file_and_the_commands(studied: Path) -> None:
    page = read_page(studied)
    analysis = json.loads((studied / "analysis.json").read_text(encoding="utf-8"))
    for wanted in (
        analysis["answer"], "Which?", "± 0.02 nats per token", "Set before the runs", versions(),
        (studied / "study.yaml").read_text(encoding="utf-8"), f"tiny-onn study {studied}/study.yaml --out ",
        "hyper.surprise_weight = 0.0", "dead experts in 3 of 3 runs", "Load entropy, layer 1", "Dead experts, layer 0",
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
    assert page.attributes.count(("class", "forest")) == 2
    assert report.text == study_table(json.loads((folder / "analysis.json").read_text(encoding="utf-8")))


def test_what_all_labels_of_a_group_end_with_is_said_once() -> None:
    assert shared_end(["a data=x", "b c data=x"]) == " data=x"
    assert shared_end(["a lr=1 data=x", "b lr=1 data=x"]) == " lr=1 data=x"
    assert shared_end(["a lr=1 data=x", "b lr=2 data=x"]) == " data=x"
    assert shared_end(["data=x", "b data=x"]) == shared_end(["a b", "c b"]) == shared_end(["a data=x"]) == ""


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    from training.report.html.study_arms import Study, read_groups

    folder = fake_study(tmp_path / "means", small_study(arms=(), baseline=""))
    histories = {
        "small-seed0": [{"step": 1, "main_loss": 4.0}, {"step": 2, "main_loss": 3.0}, {"step": 3, "main_loss": 1.0}],
        "small-seed1": [{"step": 1, "main_loss": 2.0}, {"step": 2, "main_loss": None}],
    }
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    rows = [{"run": run, "seed": i, "nats_per_token": i + 1.5, "status": FINISHED} for i, run in enumerate(histories)]
    study = Study("x", {}, "", analysis, rows)
    ((arm,),) = (group.arms for group in read_groups(study, histories.__getitem__, lambda run: {}))
    assert (arm.curves["main_loss"].x.tolist(), arm.curves["main_loss"].y.tolist()) == ([1, 2, 3], [3, 3, 1])
    assert scores_by_seed(study, arm) == {"0": 1.5, "1": 2.5}


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


# Layers ---------------------------------------------------------------------------------------------------------------


def test_measures_of_a_layer_are_those_of_plain_loops() -> None:
    load = np.random.default_rng(0).dirichlet(np.full(8, 0.5), 3)
    load[1] = [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    load[2] = 1 / 8
    columns = measures(load)
    for layer, shares in enumerate(load.tolist()):
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(8)
        wanted = [entropy, max(shares) / (sum(shares) / 8) - 1, sum(p == 0 for p in shares)]
        assert [values[layer] for values in columns.values()] == pytest.approx(wanted)
    assert [values[2] for values in columns.values()] == pytest.approx([1, 0, 0])
    assert measures(np.ones((1, 1))) == {"load entropy": [1.0], "MaxVio": [0.0], "dead experts": [0.0]}
    assert [values[0] for values in measures(np.full((1, 4), np.nan)).values()] == [None] * 3


def test_records_become_numbers_of_every_layer() -> None:
    history = [{"step": 3, "expert_load": [[1.0, 0.0], [0.5, 0.5]]}, {"step": 4, "co_activation_layers": [0.25, None]}]
    first, second = by_layer(history)
    assert first["step"] == 3
    assert first[layer_key("MaxVio", 0)] == 1.0
    assert first[layer_key("co-activation", 0)] is None
    assert (second["step"], second[layer_key("MaxVio", 0)]) == (4, None)
    assert [second[layer_key("co-activation", layer)] for layer in range(2)] == [0.25, None]
    assert by_layer([{"step": 1}]) == []


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_text_is_escaped_wherever_it_enters() -> None:
    html = element("p", "<b>", element("i", "&"), title='"<\x00\ud800', data_x=None)
    assert html == '<p title="&quot;&lt;\ufffd\ufffd">&lt;b&gt;<i>&amp;</i></p>'
    assert html.encode()


def test_numbers_that_are_unknown_are_dashes() -> None:
    assert [number(v) for v in (None, math.nan, math.inf, "1", -0.5)] == [
        NOTHING,
        NOTHING,
        NOTHING,
        NOTHING,
        f"{MINUS}0.5000",
    ]
    assert [number(v, "+.4f") for v in (-0.00001, 0.0, 0.25)] == ["0.0000", "0.0000", "+0.2500"]


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.13, 5.7, 5) == [2, 4]
    assert ticks(-0.1, 0.1, 4) == [-0.1, -0.05, 0, 0.05, 0.1]
    assert all(1 <= len(ticks(0.0, width, 5)) <= 6 for width in (1e-9, 0.3, 7.0, 123456.7))


def test_a_wild_value_does_not_flatten_a_chart() -> None:
    x = np.arange(100.0)
    calm = np.linspace(5, 3, 100)
    assert "cut off" not in line_chart("loss", "nats", [Curve("a", x, calm, 1)])
    calm[50] = 1e9
    chart = line_chart("loss", "nats", [Curve("a", x, calm, 1)])
    assert "cut off" in chart
    assert "1e+09" not in chart


def test_a_gap_in_a_curve_is_a_gap_and_no_data_is_said() -> None:
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0])
    chart = line_chart("k", "", [Curve("a", np.arange(5.0), y, 9)])
    assert re.search(r' d="M[^M]*L[^M]*M[^M]*L[^ML]*"', chart)
    assert chart.count("<circle") == 4
    assert 'class="line c2 d1"' in chart
    assert "nothing here" in line_chart("k", "", [Curve("a", x := np.zeros(0), x, 0)], empty="nothing here")


def test_one_very_wide_interval_does_not_squash_the_others() -> None:
    def row(half: float) -> Difference:
        return Difference(element("b"), 0.0, -half, half, [], "undecided", element("b"))

    assert reach([row(0.1), row(0.2), row(0.15)], 0.02) == 0.2
    assert reach([row(0.1), row(0.2), row(0.15), row(90.0)], 0.02) == pytest.approx(0.7)
    assert reach([], 0.02) == pytest.approx(0.06)


def test_levels_of_load_are_octaves_of_the_fair_share() -> None:
    load = np.array([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, np.nan, 0.25 / 32]])
    assert load_levels(load).tolist() == [[4, 3, 2, 2], [5, NONE, UNKNOWN, 0]]


def test_every_cell_of_a_map_is_drawn_once_and_neighbours_share_where_there_are_many() -> None:
    levels = np.random.default_rng(0).integers(-2, 7, (3, 10))
    drawn = heat_map(levels, "h", "x")
    painted = np.full((3, 10), -9)
    for path, kind in re.findall(r'd="([^"]*)" class="(\w+)"', drawn):
        level = {"none": NONE, "unknown": UNKNOWN}.get(kind) if kind[0] != "h" else int(kind[1:])
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            cells = painted[int(y), int(x) : int(x) + int(width)]
            assert (cells == -9).all()
            cells[:] = level
    assert painted.tolist() == levels.tolist()
    assert 'viewBox="0 0 128 1"' in heat_map(np.zeros((1, 256), dtype=np.int64), "h", "x")
