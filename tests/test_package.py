"""What is installed: the files in wheel and sdist, and life without the extras."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from book import ROOT, module_of, notebooks, read
from packaging.requirements import Requirement

CORE = {"torch", "torchvision", "numpy"}
NEEDED = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")
NEEDED += ("LICENSE", "NOTICE", "constraints.txt", "CHANGELOG.md", "CITATION.cff")
DATA = sorted(p.name for p in (ROOT / "eql_repro/data").glob("*") if p.is_file())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, and the wheel made from that sdist, of a copy without leftovers."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in NEEDED:
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "eql_repro", source / "eql_repro", ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {kind: next(out.glob(f"*{kind}")) for kind in (".whl", ".tar.gz")}


@pytest.fixture(scope="session")
def bare(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the wheel, torch, torchvision, NumPy and what these need, alone."""
    folder = tmp_path_factory.mktemp("bare")
    zipfile.ZipFile(built[".whl"]).extractall(folder)
    todo, seen = set(CORE), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(dist.locate_file(top)))
        needs = [Requirement(text) for text in dist.requires or []]
        todo |= {
            need.name.lower()
            for need in needs
            if not need.marker or need.marker.evaluate({"extra": ""})
        }
    return folder


def run_bare(bare: Path, code: str) -> str:
    """What some code prints where nothing but the bare package is installed."""
    start = f"import sys; sys.path.append({str(bare)!r})\n"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", start + code],
        capture_output=True,
        text=True,
        env=env,
        cwd=bare.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_is_package_data() -> None:
    assert DATA, "eql_repro/data is empty"


def test_wheel_and_sdist_carry_the_data(built: dict[str, Path]) -> None:
    wheel = set(zipfile.ZipFile(built[".whl"]).namelist())
    with tarfile.open(built[".tar.gz"]) as archive:
        sdist = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in (f"eql_repro/data/{name}" for name in DATA):
        assert name in wheel and name in sdist
    assert {"LICENSE", "NOTICE", "settings.ini"} <= sdist
    assert any(name.endswith("licenses/NOTICE") for name in wheel)


def test_wheel_carries_every_module_and_nothing_else(built: dict[str, Path]) -> None:
    names = zipfile.ZipFile(built[".whl"]).namelist()
    modules = {f"{module_of(read(p))}.py" for p in notebooks()} - {"None.py"}
    inside = {n.split("/", 1)[1] for n in names if n.startswith("eql_repro/")}
    assert modules <= inside
    assert {name.split("/")[0] for name in names} == {
        "eql_repro",
        next(n.split("/")[0] for n in names if ".dist-info/" in n),
    }


def test_wheel_says_what_it_needs(built: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(built[".whl"])
    [name] = [n for n in wheel.namelist() if n.endswith("METADATA")]
    text = wheel.read(name).decode()
    needs = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    bare = [Requirement(need) for need in needs if "extra ==" not in need]
    assert {need.name for need in bare} == CORE
    assert any(str(need.specifier) == ">=2.4" for need in bare)
    assert any(need.startswith("accelerate;") for need in needs)
    assert "Requires-Python: >=3.11" in text
    [entry] = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "eql = eql_repro.__main__:main" in wheel.read(entry).decode()


def test_bare_environment_is_bare(bare: Path) -> None:
    code = """
from importlib.util import find_spec
print([n for n in ("pandas", "matplotlib", "accelerate", "fastcore", "nbdev", "typer")
       if find_spec(n)])
import eql_repro
print(eql_repro.__file__)
"""
    found, file = run_bare(bare, code).splitlines()
    assert found == "[]"
    assert Path(file).is_relative_to(bare)


def test_losses_import_in_under_a_second_on_top_of_torch(bare: Path) -> None:
    code = """
import time, torch
start = time.perf_counter()
from eql_repro import EqualizationLoss, SoftmaxEqualizationLoss, ClassFrequency
from eql_repro import equalization_loss, softmax_equalization_loss
print(time.perf_counter() - start)
"""
    assert min(float(run_bare(bare, code)) for _ in range(3)) < 1


def test_bare_package_computes_a_loss(bare: Path) -> None:
    code = """
import torch
from eql_repro import ClassFrequency, EqualizationLoss
loss = EqualizationLoss(ClassFrequency([1, 99]), lambda_=0.05)
print(loss(torch.zeros(2, 2), torch.tensor([1, 2])).item())
"""
    # Two regions of two classes; class 0 is in the tail, and region 0 ignores it.
    assert float(run_bare(bare, code)) == pytest.approx(3 * 0.6931472 / 2)


def test_what_needs_more_names_the_extra(bare: Path) -> None:
    code = """
from eql_repro.counts import require
try:
    require("pandas")
except ImportError as error:
    print(error)
"""
    assert "eql_repro[run]" in run_bare(bare, code)


def test_every_module_imports_bare_or_names_the_extra(bare: Path) -> None:
    code = """
import importlib, json, pathlib, eql_repro
found = {}
for path in pathlib.Path(eql_repro.__file__).parent.glob("[a-z]*.py"):
    try:
        importlib.import_module("eql_repro." + path.stem)
    except ImportError as error:
        found[path.stem] = str(error)
print(json.dumps(found))
"""
    errors = json.loads(run_bare(bare, code))
    number = {module_of(read(path)): path.name[:2] for path in notebooks()}
    assert [name for name in errors if number[name] < "13"] == []
    assert [e for e in errors.values() if "eql_repro[run]" not in e] == []


def test_version_stands_once() -> None:
    import eql_repro

    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    [version] = re.findall(r"^version = (.*)$", settings, re.MULTILINE)
    assert eql_repro.__version__ == version
    changes = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {version}" in changes


def test_the_command_names_the_extra_in_one_line(bare: Path) -> None:
    code = """
import sys
from eql_repro.__main__ import main
sys.stderr = sys.stdout
try:
    main()
except SystemExit as end:
    print(end.code)
"""
    line, exit_code = run_bare(bare, code).splitlines()
    assert line.startswith("eql: ") and "eql_repro[run]" in line and exit_code == "2"
