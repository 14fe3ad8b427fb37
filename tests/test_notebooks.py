"""Every notebook runs, and shows what it showed when it was stored."""

import warnings

import pytest
import run_notebooks
from book import ROOT, notebooks, read

NAMES = [path.relative_to(ROOT / "nbs").as_posix() for path in notebooks()]


@pytest.fixture(scope="session")
def other_versions() -> list[str]:
    """The libraries that differ from the tested ones; said once where there are any."""
    found = run_notebooks.other_versions()
    if found:
        warnings.warn(f"executed, not compared: {', '.join(found)}", stacklevel=1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_notebook(name: str, other_versions: list[str]) -> None:
    path = ROOT / "nbs" / name
    new = run_notebooks.execute(path)
    assert other_versions or not (found := run_notebooks.compare(read(path), new)), (
        f"{name}: outputs changed\n" + "\n".join(found)
    )


def test_there_are_notebooks() -> None:
    assert "01_longtail.ipynb" in NAMES
