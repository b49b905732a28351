"""Write docs/settings.md, docs/records.md and the table of names in docs/glossary.md. `python docs/make_reference.py`

Every text stands in the code, beside the setting or the field: this script only arranges them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tiny_onn_func.tree import flatten
from training.fields import Field, Fields, field_texts, fields_of
from training.ranges import Range, ranges_of
from training.run.config import DEFAULT_MODEL, DERIVED, KEYS, RunConfig, plain_values
from training.run.describe import texts
from training.run.evaluate import DURING
from training.run.loop import SKIPPED
from training.run.summary import SUMMARY
from training.step.hyper_params import RANGES, HyperParams
from training.step.metrics import Metrics
from training.storage.recorder import PROGRESS
from training.storage.results import IDENTITY, MEASURES, OVERRIDES
from training.study import analysis_fields as analysis
from training.study.config import Arm, StudyConfig
from training.study.group_records import SNAPSHOT
from training.study.routing_analysis import ROUTING
from training.study.summary import STREAM
from training.study.summary import SUMMARY as STUDY_SUMMARY
from training.study.tasks import Continual
from training.study.token_atlas import VARIANCE

DOCS = Path(__file__).parent
BEGIN, END = "<!-- begin: python docs/make_reference.py -->", "<!-- end -->"
MADE = "Written by `python docs/make_reference.py` from the texts in the code; a test compares them.\n"
Row = tuple[str, ...]

RECORDS: dict[str, tuple[str, Fields]] = {  # heading -> (remark, fields)
    "metrics.jsonl": ("One JSON object a line, one line a step (a study: every `record_every` steps).", dict(PROGRESS)),
    "metrics.jsonl: metrics of the step": (
        "The fields of `training.Metrics`, measured before the update of the step. Floats have 6 significant digits, 4 "
        "in tables; NaN and infinity are null.",
        fields_of(Metrics),
    ),
    "metrics.jsonl: scores and routing": (
        "Present where they were made: scores every `eval_every` steps, routing in a study with `analysis_tokens`.",
        {**DURING, **SNAPSHOT, **SKIPPED},
    ),
    "summary.json of a run": ("Written at the end of `tiny-onn train`.", dict(SUMMARY)),
    "summary.json of a run in a study": ("In `runs/NAME/` of the study.", dict(STUDY_SUMMARY)),
    "summary.json in a stream of tasks": ("Beside those above, in a study with `tasks`.", dict(STREAM)),
    "summary.json: routing": (
        "Routing analysis of a finished run on `analysis_tokens` held-out tokens a layer.",
        {**ROUTING, **VARIANCE},
    ),
    "results.csv": (
        "One row a run of a study; a cell is empty where the value is unknown.",
        {**IDENTITY, "dotted setting": OVERRIDES, **MEASURES, **fields_of(Continual)},
    ),
    "analysis.json": ("Written when a study ends, and by `tiny-onn report`.", analysis.TOP),
    "analysis.json: arms.ARM": ("What is known of each arm.", analysis.ARM),
    "analysis.json: against_baseline.ARM": ("Each arm's comparison with its baseline.", analysis.PAIR),
    "analysis.json: continual.ARM.MEASURE": (
        "In a study with `tasks`; MEASURE is `bwt`, `forgetting` or `plasticity`.",
        analysis.STREAM,
    ),
}


def table(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    escaped = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in escaped)]) + "\n"


# Settings -------------------------------------------------------------------------------------------------------------


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `int`, `text or null`, `cosine, wsd or constant`."""
    if get_origin(hint) is Literal:
        *first, last = map(str, get_args(hint))
        return f"{', '.join(first)} or {last}"
    if hasattr(hint, "__metadata__"):
        return type_name(hint.__origin__)
    if get_origin(hint) is not None and get_args(hint):
        parts = [type_name(part) for part in get_args(hint)]
        if "Union" in repr(get_origin(hint)):
            return " or ".join(parts)
        origin = "mapping" if len(parts) == 2 else "list"
        return f"{origin} of {' to '.join(parts)}"
    return {"str": "text", "NoneType": "null", "bool": "true or false", "Any": "value"}.get(
        getattr(hint, "__name__", str(hint)), getattr(hint, "__name__", str(hint))
    )


def shown(value: Any) -> str:
    """A default as it stands in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def model_range(name: str) -> str:
    """Range of a size of the model, as its own check words it when the value is below it; "" where none is checked."""
    kinds = get_args(KEYS[f"model.{name}"]) or (KEYS[f"model.{name}"],)
    wrong = next((kind(-5) for kind in (int, float) if kind in kinds), None)
    if wrong is None:
        return ""
    try:
        replace(DEFAULT_MODEL, **{name: wrong})
    except ValueError as error:
        return str(error).partition("expected ")[2].rpartition(", got")[0]
    return ""


def settings_rows(keys: Iterable[str], ranges: Mapping[str, Range]) -> list[Row]:
    """A row for each setting of a run."""
    said, defaults = texts(), flatten(plain_values(RunConfig()))
    own = HyperParams()._asdict()
    rows = []
    for key in keys:
        section, _, name = key.rpartition(".")
        wanted = ranges[name].wanted if name in ranges else model_range(name) if section == "model" else ""
        default = f"`{shown(defaults[key])}`"
        if section == "hyper":
            default += f" | `{shown(own[name])}`"
        rows.append((f"`{key}`", type_name(KEYS[key]), wanted, default, said[key]))
    return rows


def settings_table(keys: Iterable[str], ranges: Mapping[str, Range], head: Row) -> str:
    """The table of some settings of a run; `hyper` has a second column of defaults."""
    rows = [row[:3] + tuple(row[3].split(" | ")) + row[4:] for row in settings_rows(keys, ranges)]
    return table(head, rows)


def study_rows(kind: type) -> list[Row]:
    """A row for each key of a study, or of an arm of it."""
    said, hints, ranges = field_texts(kind), get_type_hints(kind, include_extras=True), ranges_of(kind)
    rows = []
    for field in fields(kind):
        if field.default is not MISSING:
            default = f"`{shown(field.default) if field.default != () else '[]'}`"
        else:
            default = "needed" if field.default_factory is MISSING else "`{}`"
        hint = "mapping of settings" if field.name == "base" else type_name(hints[field.name]).replace("Arm", "arms")
        wanted = ranges[field.name].wanted if field.name in ranges else ""
        rows.append((f"`{field.name}`", hint, wanted, default, " ".join(said[field.name].split())))
    return rows


def settings_page() -> str:
    """The page of all settings."""
    head = ("key", "type", "range", "default", "meaning")
    by_section: dict[str, list[str]] = {"": [], "model": [], "hyper": []}
    for key in KEYS:
        by_section[key.rpartition(".")[0]].append(key)
    derived = [
        (f"`{name}`", RANGES[name].wanted, f"`{shown(getattr(HyperParams(), name))}`", text)
        for name, text in ((name, " ".join(field_texts(HyperParams)[name].split())) for name in DERIVED)
    ]
    return "\n".join(
        [
            "# Settings\n",
            f"{MADE}",
            "A setting has one dotted name: nested in YAML (`model:` / `hidden_size:`), a flag",
            "(`--model.hidden-size`), a key of a study's arms and axes. `tiny-onn train --print-config` prints those",
            "of a run with their values, and [training](training.md#settings) says how files and flags are read.\n",
            "## Run\n",
            "`RunConfig` of `training/run/config.py`.\n",
            settings_table(by_section[""], ranges_of(RunConfig), head),
            "## Model\n",
            "`ModelConfig` of `tiny_onn_func/config.py`; the default is that of `tiny-onn train`.\n",
            settings_table(by_section["model"], {}, head),
            "## Hyper step\n",
            "`HyperParams` of `training/step/hyper_params.py`. `tiny-onn train` and `HyperParams()` in Python have",
            "different defaults: a bare hyper step has no schedule and no balance loss.\n",
            settings_table(
                by_section["hyper"],
                RANGES,
                ("key", "type", "range", "default of train", "default of `HyperParams()`", "meaning"),
            ),
            "Two numbers are no settings of a run, as they follow from `steps`, `schedule` and `decay_share`:\n",
            table(("field", "range", "default of `HyperParams()`", "meaning"), derived),
            "## Study\n",
            "`StudyConfig` of `training/study/config.py`; [studies](studies.md) shows a file.\n",
            table(head, study_rows(StudyConfig)),
            "### Arm\n",
            "An entry of `arms`.\n",
            table(head, study_rows(Arm)),
        ]
    )


# Records --------------------------------------------------------------------------------------------------------------


def records_page() -> str:
    """The page of all fields of the files of runs and studies."""
    parts = [
        "# Fields of records\n",
        MADE,
        "The [glossary](glossary.md) has every name in one list, and the words that the texts use. (L, E) is a",
        "value per layer and expert.\n",
    ]
    for heading, (remark, of_file) in RECORDS.items():
        rows = [(f"`{name}`", field.unit, field.text) for name, field in of_file.items()]
        parts += [f"## {heading}\n", f"{remark}\n", table(("field", "unit", "meaning"), rows)]
    return "\n".join(parts)


def names_table() -> str:
    """Every field of every file by name, with one line for each of its meanings."""
    meanings: dict[tuple[str, Field], list[str]] = {}
    for heading, (_, of_file) in RECORDS.items():
        for name, field in of_file.items():
            if field.text.startswith("Mean of the column"):
                continue
            file = heading.split(":")[0].split(" ")[0]
            places = meanings.setdefault((name, field), [])
            places += [file] if file not in places else []
    ordered = sorted(meanings.items(), key=lambda item: item[0][0].lower())
    rows = [(f"`{name}`", field.unit, field.text, ", ".join(places)) for (name, field), places in ordered]
    return table(("name", "unit", "meaning", "found in"), rows)


def glossary_page(text: str) -> str:
    """The glossary with its generated part made anew."""
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{names_table()}\n{END}", text, flags=re.DOTALL
    )


def pages() -> dict[Path, str]:
    """Path -> text of the generated pages."""
    glossary = DOCS / "glossary.md"
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "records.md": records_page(),
        glossary: glossary_page(glossary.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
