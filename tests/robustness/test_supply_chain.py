"""What is installed and what is read: bounds that were tested, exact versions, and no reader that can run code."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers import ROOT
from training import cli
from training.run import identity

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = ROOT / "constraints.txt"
SOURCES = sorted(path for folder in ("tiny_onn_func", "training") for path in (ROOT / folder).rglob("*.py"))
# Ways to run code that a file brings along: ruff's `S` and `banned-api` of pyproject.toml know them, NAMED the rest.
NAMED = re.compile(
    r"__import__\(|(?<![\w.])compile\(|trust_remote_code=True|weights_only=False|allow_pickle=True"
    r"|FileSystemReader|dcp\.load\((?![^)]*storage_reader=)"  # these read a pickle
    r"|YAML\((?!typ=\"(safe|rt)\")"  # ruamel's, where a tag may name a class
)


def noticed(*where: str, source: str = "") -> str:
    """Ruff's lines about files, or about a source, with the project's own settings."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", *where]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False).stdout


def test_no_source_can_run_what_it_reads() -> None:
    """An exception is a line's own, `# noqa` with its reason, and RUF100 ends it with the line."""
    assert noticed("tiny_onn_func", "training") == ""
    assert not {path.name: found for path in SOURCES if (found := NAMED.findall(path.read_text(encoding="utf-8")))}
    assert len(SOURCES) > 80
    assert identity.PACKAGES == ("tiny_onn_func", "training")  # whose names are imported


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(path)", "eval(text)", "exec(text)",
        "import yaml\nyaml.load(text, yaml.Loader)", "import yaml\nyaml.load(text)",
        "import yaml\nyaml.unsafe_load(text)",
        "import numpy as np\nnp.load(path)", "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint import load", "from torch.distributed import checkpoint", "import joblib",
        "import subprocess\nsubprocess.run(text, shell=True)", "import os\nos.system(text)",
        "import os\nos.popen(text)",
        "import ctypes\nctypes.CDLL(path)", "import torch\ntorch.ops.load_library(path)", "from torch.hub import load",
        "import importlib\nimportlib.import_module(name)", "import runpy", "import marshal",
    ],
)  # fmt: skip
def test_each_way_to_run_what_is_read_would_be_noticed(source: str) -> None:
    assert re.search("S[0-9]{3}|TID251", noticed("--stdin-filename=training/x.py", "-", source=source))


@pytest.mark.parametrize("source", [
    "from_pretrained(x, trust_remote_code=True)", "__import__(name)", "compile(text)", "dcp.FileSystemReader(folder)",
    "dcp.load(state, checkpoint_id=folder)", "YAML(typ=kind)", 'YAML(typ="unsafe")',
])  # fmt: skip
def test_each_way_that_ruff_does_not_know_would_be_noticed(source: str) -> None:
    assert NAMED.search(source)
    assert not NAMED.search("torch.compile(x); re.compile(y); _compile(z); weights_only=True")
    assert not NAMED.search('dcp.load(state, storage_reader=reader, planner=planner); YAML(typ="safe", pure=True)')


def test_the_yaml_loader_makes_plain_values_only() -> None:
    from ruamel.yaml.constructor import SafeConstructor

    from training.storage.plain_yaml import YAML, _plain

    constructor = _plain(YAML(typ="safe", pure=True)).constructor
    assert type(constructor) is SafeConstructor
    tags = (*constructor.yaml_constructors, *constructor.yaml_multi_constructors)
    assert not [tag for tag in tags if tag and "python" in str(tag)]


# Versions -------------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    return [Requirement(text) for text in texts if not text.startswith(PROJECT["name"])]


def constrained() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="ascii").splitlines()]
    return dict(line.split("==") for line in lines if line)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


KNOWN_TO_BREAK: dict[str, str] = {}  # name -> the first version that is known to break something, and what


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_has_a_lower_bound_and_an_upper_one_only_where_something_breaks(
    requirement: Requirement,
) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == ({">=", "<"} if requirement.name in KNOWN_TO_BREAK else {">="}), requirement
    exact = constrained()[canonical(requirement.name)]
    assert requirement.specifier.contains(exact), f"{requirement} does not take the tested {exact}"


def test_the_pages_install_exactly_what_was_tested() -> None:
    """A range that admits a newer torch takes a build of several gigabytes that nobody has tested."""
    for path in (ROOT / "README.md", ROOT / ".ci" / "run", *sorted((ROOT / "docs").glob("*.md"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"pip install .*-e ", line):
                assert "-c constraints.txt" in line, f"{path.name}: {line}"


def test_the_constraints_are_exact_versions_and_nothing_else() -> None:
    text = CONSTRAINTS.read_text(encoding="ascii")
    assert not re.search(r"https?:|file:|--|@|\+", text)
    for name, version in constrained().items():
        assert name == canonical(name)
        assert str(Version(version)) == version
    assert constrained()["torch"] == "2.13.0"


def test_what_runs_here_is_within_the_bounds() -> None:
    for requirement in requirements():
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        assert requirement.specifier.contains(there, prereleases=True), f"{requirement}: {there}"


# Without the laboratory -----------------------------------------------------------------------------------------------

CORE = {Requirement(text).name for text in PROJECT["dependencies"]}
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
MODULES_OF_EXTRAS = {
    "scipy", "pydantic", "ruamel", "tyro", "tqdm", "matplotlib", "packaging", "tensorboard", "transformers",
    "tokenizers", "pyarrow", "ray", "beartype", "hypothesis", "pytest", "platformdirs",
    "psutil",
}  # fmt: skip


def without_extras(program: str) -> subprocess.CompletedProcess[str]:
    blocked = BLOCKED.replace("{modules!r}", repr(MODULES_OF_EXTRAS))
    return subprocess.run([sys.executable, "-c", blocked + program], cwd=ROOT, capture_output=True, text=True)


def test_the_core_is_torch_einops_jaxtyping_safetensors_and_numpy() -> None:
    assert {"torch", "einops", "jaxtyping", "safetensors", "numpy"} == CORE


def test_the_model_and_the_hyper_step_run_without_any_extra() -> None:
    ended = without_extras(
        """
import torch
from tiny_onn_func import ModelConfig, generate
from training import Batch, HyperParams, hyper_step, init_state
config = ModelConfig(20, 8, 1, 1, 1, 8, 4, 4, num_experts_per_tok=2)
ids = torch.randint(0, 20, (2, 6))
state, metrics = hyper_step(
    init_state(config, torch.Generator()), Batch(ids, ids, torch.ones_like(ids)), HyperParams(), config
)
print(generate(state.params, ids, config, torch.Generator(), max_new_tokens=2).shape)
"""
    )
    assert ended.stdout == "torch.Size([2, 8])\n", ended.stderr


@pytest.mark.parametrize("verb", ["train --steps 1", "study routers", "doctor", "report ."])
def test_a_verb_without_its_package_says_in_a_line_how_to_install_it(verb: str) -> None:
    ended = without_extras(f"from training.cli import main; sys.exit(main({verb.split()!r}))")
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(
        r"tiny-onn: \w+: expected this package, found none; pip install 'tiny-onn-func\[lab\]'\n", ended.stderr
    )


def test_an_old_torch_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert str(torch.specifier) == ">=" + ".".join(map(str, cli.OLDEST_TORCH))
    monkeypatch.setattr(cli.metadata, "version", lambda name: "2.9.1+cu128")
    assert cli.main(["doctor"]) == 2
    expected = "tiny-onn: torch: expected 2.11 or newer, got 2.9.1+cu128; pip install -U 'torch>=2.11'\n"
    assert capsys.readouterr().err == expected
