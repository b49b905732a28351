"""The reference is whole: every setting, every field of a real record, every word of a picture or a report."""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, script
from tiny_onn_func import ModelConfig
from training import HyperParams, run_study
from training.report.html import run_page, study_page
from training.run.config import DERIVED, KEYS, RunConfig
from training.run.engine import train
from training.step.metrics import Metrics
from training.study import analysis_fields as analysis
from training.study.agreement import VALUES
from training.study.config import Arm, StudyConfig
from training.study.tasks import Continual

MODEL = ModelConfig(257, 16, 1, 2, 1, 8, 8, 4, num_experts_per_tok=2)
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TEXT = "the router sends each token to the expert that it surprises least.\n" * 60


REFERENCE = script("docs/make_reference.py")


def fields(*headings: str) -> set[str]:
    """Names of the fields below some headings of docs/records.md."""
    return {name for heading in headings for name in REFERENCE.RECORDS[heading][1]}


def run_config(data: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": data, "steps": 4, "batch_size": 4, "sequence_length": 16, "eval_every": 2, "eval_bytes": 100,
        "final_eval_bytes": 200, "picture_every": 0, "sample_tokens": 4, "log": "none", "model": MODEL,
        "hyper": HyperParams(lr=5e-3, router_lr=5e-3),
    }  # fmt: skip
    return RunConfig(**values | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs (one skips steps), a study of one text, and a stream of tasks, each as small as can be."""
    home = tmp_path_factory.mktemp("made")
    text, other = home / "text.txt", home / "other.txt"
    text.write_text(TEXT, encoding="utf-8")
    other.write_text(TEXT.upper(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_CACHE", str(home / "cache"))
        train(run_config(str(text), out=str(home / "run")))
        broken = HyperParams(lr=3e38, max_grad_norm=1e30)
        train(run_config(str(text), out=str(home / "skipping"), on_nonfinite="skip", hyper=broken))
        arms = (Arm("frozen", {"hyper.router_lr": 0.0}), Arm("surprise"))
        base = run_config(str(text), schedule="constant")
        run_study(
            StudyConfig(
                "one",
                0.02,
                base=base,
                arms=arms,
                seeds=(0, 1),
                axes={"hyper.lr": (1e-3, 5e-3)},
                tune=("hyper.lr",),
                atlas_tokens=64,
            ),
            home / "one",
        )
        tasks = {"lower": str(text), "upper": str(other)}
        run_study(StudyConfig("stream", 0.02, base=base, arms=arms, seeds=(0,), tasks=tasks), home / "stream")
    return home


def keys_of(files: Iterable[Path]) -> set[str]:
    """Keys of all records of metrics.jsonl files."""
    return {key for file in files for line in file.read_text("utf-8").splitlines() for key in json.loads(line)}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same(found: set[str], described: set[str]) -> None:
    assert found - described == set(), "fields without a text"
    assert described - found == set(), "texts without a field"


def test_the_generated_pages_are_fresh() -> None:
    stale = [path.name for path, text in REFERENCE.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `python docs/make_reference.py`"


def test_every_setting_and_every_key_of_a_study_has_its_row_and_its_text() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", REFERENCE.settings_page(), re.MULTILINE))
    keys = {*KEYS, *DERIVED, *StudyConfig.__dataclass_fields__, *Arm.__dataclass_fields__}
    assert rows.keys() == keys
    assert all(text.strip() for text in rows.values())


def test_the_range_of_a_size_is_that_of_its_check() -> None:
    assert REFERENCE.model_range("hidden_size") == "1 or more"
    assert REFERENCE.model_range("num_experts_per_tok").startswith("-1 (dynamic) or 1 to")


def test_metrics_jsonl_has_the_fields_of_the_reference(made: Path) -> None:
    headings = [heading for heading in REFERENCE.RECORDS if heading.startswith("metrics.jsonl")]
    assert_same(keys_of(made.rglob("metrics.jsonl")), fields(*headings))


def test_the_summary_of_a_run_has_the_fields_of_the_reference(made: Path) -> None:
    assert_same({*read(made / "run" / "summary.json")}, fields("summary.json of a run"))


def test_the_summary_of_a_run_of_a_study_has_the_fields_of_the_reference(made: Path) -> None:
    paths = [*(made / "one" / "runs").glob("*/summary.json")]
    assert len(paths) == 8
    for path in paths:
        assert_same({*read(path)}, fields("summary.json of a run in a study"))
    described = fields("summary.json of a run in a study", "summary.json in a stream of tasks")
    for path in (made / "stream" / "runs").glob("*/summary.json"):
        assert_same({*read(path)}, described)


def dotted(routing: Mapping[str, Any]) -> set[str]:
    """Fields of a routing analysis, the regret of each kind as regret.KIND."""
    kinds = {f"regret.{kind}" for kind in VALUES}
    names = set()
    for key, value in routing.items():
        names |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    assert kinds <= names
    return names - kinds | {"regret.KIND"}


def test_the_routing_analysis_has_the_fields_of_the_reference(made: Path) -> None:
    path = next((made / "one" / "runs").glob("*/summary.json"))
    assert_same(dotted(read(path)["routing"]), fields("summary.json: routing"))


def test_results_csv_has_the_columns_of_the_reference(made: Path) -> None:
    columns = set()
    for study in ("one", "stream"):
        with (made / study / "results.csv").open(encoding="utf-8") as file:
            columns |= {*(csv.DictReader(file).fieldnames or ())}
    settings = {column for column in columns if column in KEYS} - {"seed"}
    assert settings == {"hyper.lr", "hyper.router_lr"}
    assert_same(columns - settings | {"dotted setting"}, fields("results.csv"))


def test_analysis_json_has_the_fields_of_the_reference(made: Path) -> None:
    nested = {"arms", "against_baseline", "continual"}
    for study in ("one", "stream"):
        values = read(made / study / "analysis.json")
        assert_same({*values} - nested, {*analysis.TOP})
        for arm in values["arms"].values():
            assert_same({*arm}, {*analysis.ARM})
    pairs = read(made / "one" / "analysis.json")["against_baseline"].values()
    assert pairs
    for pair in pairs:
        assert_same({*pair}, {*analysis.PAIR})
    of_arms = read(made / "stream" / "analysis.json")["continual"].values()
    for of_measures in of_arms:
        assert_same({*of_measures}, {*Continual._fields})
        for measure in of_measures.values():
            assert_same({*measure}, {*analysis.STREAM})


@pytest.mark.parametrize(("extra", "claim"), [({"new"}, "without a text"), (set(), "without a field")])
def test_a_field_more_or_less_would_be_noticed(extra: set[str], claim: str) -> None:
    described = {*Metrics._fields}
    with pytest.raises(AssertionError, match=claim):
        assert_same(described | extra if extra else described - {"tau"}, described)


def test_every_metric_column_and_field_is_in_the_glossary() -> None:
    known = set(re.findall(r"^\| `([^`]+)` \|", GLOSSARY, re.MULTILINE))
    names = {name for _, of_file in REFERENCE.RECORDS.values() for name in of_file}
    assert {*Metrics._fields} <= names
    assert names - known == set()


WORDS = (
    "surprise", "tau", "margin", "falsifier", "switch", "frozen", "hash", "token router", "shuffled", "signed benefit",
    "budget", "collapse", "regret", "oracle", "sparse fill", "hook point", "candidate", "informative", "arm",
    "baseline", "pair", "verdict", "equivalent", "undecided", "beyond the margin", "leg", "load", "visit",
    "first choice",
)  # fmt: skip


def test_the_words_of_pictures_and_reports_are_in_the_glossary() -> None:
    """The names of lines, charts, columns and arms, without regard to case and to marks."""
    said = re.sub(r"[\W_]+", " ", GLOSSARY.lower())
    lines = [name for _, _, charts in run_page.CHARTS for _, name in charts]
    names = [*WORDS, *lines, *(key for _, _, key in study_page.CHARTS), *study_page.HEAD]
    plain = {" ".join(re.sub(r"[\W_]+", " ", name.lower()).split()) for name in names}
    assert len(plain) >= 40
    assert {name for name in plain if name not in said} == set()
