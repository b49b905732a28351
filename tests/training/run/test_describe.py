"""The settings describe themselves: as YAML with comments, as a schema for editors, as words that a shell completes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.helpers import ROOT
from training.cli import main
from training.presets.find import HOME, STUDIES
from training.run.config import DEFAULT_HYPER, KEYS
from training.run.describe import settings_schema, texts
from training.run.settings import load_settings
from training.storage.plain_yaml import read_yaml
from training.study.config import StudyConfig
from training.study.file import NAMES
from training.study.schema import study_schema


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_print_config_is_a_file_of_the_same_settings_each_with_its_meaning_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = printed(capsys, "train", "--config", "seed_v6", "--steps", "7", "--hyper.lr=1e-5", "--print-config", "-q")
    assert not [*tmp_path.iterdir()], "nothing written"
    path = tmp_path / "printed.yaml"
    path.write_text(page, encoding="utf-8")
    wanted = load_settings(str(HOME / "seed_v6.yaml"))
    assert load_settings(str(path)) == replace(wanted, steps=7, hyper=wanted.hyper._replace(lr=1e-5))
    assert printed(capsys, "train", "--config", str(path), "--print-config") == page
    assert max(map(len, page.splitlines())) <= 120
    section, said = "", ""
    seen = []
    for line in page.splitlines():
        if line.lstrip().startswith("# "):
            said += line.strip()[1:]
            continue
        key = line.strip().partition(":")[0]
        section = section if line.startswith(" ") else ""
        assert said.strip() == texts()[section + key], key
        seen.append(section + key)
        section, said = section or f"{key}.", ""
    assert seen == [*[key for key in KEYS if "." not in key], "model", *_of("model."), "hyper", *_of("hyper.")]


def _of(prefix: str) -> list[str]:
    return [key for key in KEYS if key.startswith(prefix)]


def test_print_config_of_a_run_that_goes_on_is_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 77\n")
    assert "\nsteps: 77\n" in printed(capsys, "train", "--out", str(tmp_path), "--resume", "--print-config")


# JSON schema ----------------------------------------------------------------------------------------------------------


def test_the_schema_is_printed_and_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "train", "--print-schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    keys = schema["properties"] | {
        f"{section}.{key}": value
        for section in ("model", "hyper")
        for key, value in schema["properties"][section]["properties"].items()
    }
    assert keys.keys() == {*KEYS, "model", "hyper"}
    assert all(len(value["description"]) > 5 for value in keys.values())
    assert keys["hyper.lr"]["default"] == DEFAULT_HYPER.lr
    assert (keys["holdout"]["exclusiveMinimum"], keys["holdout"]["exclusiveMaximum"]) == (0, 1)
    assert keys["schedule"]["enum"] == ["cosine", "wsd", "constant"]
    assert main(["study", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == study_schema()
    assert [*study_schema()["properties"]] == NAMES == [*StudyConfig.__dataclass_fields__]
    jsonschema.Draft202012Validator.check_schema(study_schema())


@pytest.mark.parametrize("path", [*HOME.glob("*.yaml"), *STUDIES.glob("*.yaml")], ids=lambda path: path.stem)
def test_the_schema_takes_every_shipped_file(path: Path) -> None:
    jsonschema.validate(read_yaml(str(path)), study_schema() if path.parent == STUDIES else settings_schema())


MISTAKES: list[dict[str, Any]] = [
    {"stepss": 3}, {"steps": 0}, {"steps": "3"}, {"steps": 1.5}, {"steps": True}, {"hyper": {"lr": -1}},
    {"hyper": {"total_steps": 3}}, {"hyper": {"surprise_sign": 0}}, {"holdout": 1}, {"schedule": "linear"},
    {"model": {"num_expert": 3}}, {"model": 5}, {"data": ""}, {"device": "gpu"}, {"seed": 2**63}, {"prompt": 5},
]  # fmt: skip


@pytest.mark.parametrize("values", MISTAKES, ids=str)
def test_the_schema_refuses_what_a_run_would_refuse(values: dict[str, Any]) -> None:
    for schema, there in ((settings_schema(), values), (study_schema(), {"margin": 0.1, "base": values})):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(there, schema)


@pytest.mark.parametrize(
    "values",
    [
        {}, {"margin": 0}, {"margin": 1, "seeds": 3}, {"margin": 1, "seeds": ["a"]}, {"margin": 1, "combine": "both"},
        {"margin": 1, "axes": {"hyper.lr": 1}}, {"margin": 1, "axes": {"seed": [1]}}, {"margin": 1, "arms": [{}]},
        {"margin": 1, "arms": [{"name": "a", "set": {"hyper.lrr": 1}}]}, {"margin": 1, "quick": {"stepz": 3}},
        {"margin": 1, "tasks": ["a"]}, {"margin": 1, "base": {"prompt": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_a_study_would_refuse(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, study_schema())


def test_the_schema_takes_what_only_looks_odd() -> None:
    for values in ({"model": None}, {"model.num_experts": 3}, {"prompt": None, "hyper": {"surprise_sign": -1.0}}):
        jsonschema.validate(values, settings_schema())


# Completion -----------------------------------------------------------------------------------------------------------

VERBS = ("train", "evaluate", "generate", "export", "tokenizer", "surgery", "study", "rerun", "doctor", "report")
COMPLETE = """
source "$0"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p tiny-onn | cut -d' ' -f3)
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_verbs_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    for words, wanted in {
        ("",): {
            *["train", "evaluate", "generate", "export", "tokenizer", "surgery", "study", "rerun", "doctor", "report"]
        },
        ("train", "--hyper.l"): {"--hyper.lr"},
        ("train", "--re"): {"--resume", "--replay"},
        ("train", "--schedule", ""): {"cosine", "wsd", "constant"},
        ("generate", "--top"): {"--top-k", "--top-p"},
        ("surgery", "--split", ""): {"contiguous", "clusters"},
    }.items():
        command = ["bash", "-c", COMPLETE, str(script), "tiny-onn", *words]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
        assert wanted <= {*said}
        assert words == ("",) or wanted == {*said}


def test_zsh_has_a_script_and_another_shell_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef tiny-onn\n")
    for words, came in ((["fish"], "fish"), ([], "")):
        assert main(["--print-completion", *words]) == 2
        assert capsys.readouterr().err == (
            f"tiny-onn: --print-completion: expected bash or zsh, got {came!r}; name one of them\n"
        )


def test_neither_help_of_all_verbs_nor_a_mistake_waits_for_what_only_descriptions_need() -> None:
    program = (
        "import sys; from training.cli import main; main(['--help']); assert 'pydantic' not in sys.modules;"
        "main(['train', '--steps', 'x']); assert 'tyro' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
