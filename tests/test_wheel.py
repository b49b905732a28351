"""The wheel: its files, and a run with it far from the checkout, in an environment of its own without a compiler."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.robustness.fault_subjects import SIZES, TEXT

PACKAGES = ("tiny_onn_func", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy, since a build leaves files beside its sources."""
    home = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, home / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / "copy")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(home / "copy")], check=True, capture_output=True
    )
    (path,) = home.glob("*.whl")
    return path


def test_a_wheel_carries_sub_packages_kernels_presets_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    data = {
        str(path.relative_to(ROOT))
        for pattern in ("tiny_onn_func/kernels/csrc/*", "training/presets/**/*.yaml", "*/py.typed")
        for path in ROOT.glob(pattern)
    }
    assert sources | data <= names
    assert {"training/presets/small.yaml", "training/presets/studies/routers.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


@pytest.mark.slow
def test_a_wheel_trains_outside_the_checkout_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """No network: the dependencies are those of this environment, on a path that comes after the wheel's own files."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, cwd=empty)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    variables = {"PATH": str(environment / "bin"), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True, check=False)

    where = run(
        str(python), "-c", "import shutil, training; print(training.__file__, *map(shutil.which, ('cc', 'gcc')))"
    )
    assert where.stdout == f"{packages / 'training' / '__init__.py'} None None\n", where.stderr
    (empty / "text.txt").write_text(TEXT, encoding="utf-8")
    sizes = [f"--model.{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    few = ["--steps=2", "--batch-size=2", "--sequence-length=16", "--final-eval-bytes=60", "--sample-tokens=0"]
    trained = run("tiny-onn", "train", "--config", "small", "--data=text.txt", *few, *sizes)
    assert trained.returncode == 0, trained.stderr
    (summary,) = empty.glob("runs/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["steps"] == 2
    assert not [*tmp_path.rglob("kernels-*.so")]
