"""The checks of the notebooks report what they exist to report."""

import base64
import copy
import functools
import io
import shutil
from pathlib import Path

import check_notebooks
import matplotlib.pyplot as plt
import nbformat
import pytest
import readme
import run_notebooks
from book import ROOT, cleaned, dumps, loads, read

CHAPTER = """# Two is one and one
> A page that breaks no rule.
---
#| default_exp two
---
## Where we are

A small page.
---
import math
---
#| hide
seed = 0
---
## One is the first number
---
#| export
def two() -> int:
    \"\"\"Two.\"\"\"
    return 2
---
assert two() == 2
---
## Two comes after it
---
#| label: fig-line
#| fig-cap: A line rises. It is drawn from two points.
#| fig-alt: A line from the lower left to the upper right.
draw(two())
---
## Three is not shown
---
## What the paper leaves open

Nothing.
---
## Summary

- one
- two
- three
---
## Try it

Which is next?
"""
PATH = Path("nbs/02_two.ipynb")


@functools.cache
def figure(draw: bool = True, scale: float = 1.0) -> str:
    """A small plot as a notebook stores it, or the same page left blank."""
    fig, ax = plt.subplots(figsize=(3, 2), dpi=100)
    ax.plot([0, scale, 2, 3], [0, 1, 0, 1])
    fig.patches.append(plt.Rectangle((0, 0), 1, 1, fc="w", visible=not draw, zorder=9))
    if not draw:
        ax.set_visible(False)
    with io.BytesIO() as file:
        fig.savefig(file, format="png")
        plt.close(fig)
        return base64.b64encode(file.getvalue()).decode()


def page(text: str = CHAPTER) -> dict:
    """A notebook of cells set apart by ---; prose begins with `# ` or `## `."""
    nb = nbformat.v4.new_notebook()
    for number, source in enumerate(text.strip().split("\n---\n")):
        prose = source.startswith(("# ", "## "))
        new = nbformat.v4.new_markdown_cell if prose else nbformat.v4.new_code_cell
        nb.cells.append(new(source.strip(), id=f"cell-{number}"))
    for cell in nb.cells:
        if "fig-cap" in cell.source:
            data = {"image/png": figure(), "text/plain": "<Figure>"}
            cell.outputs = [nbformat.v4.new_output("display_data", data)]
        elif cell.source.startswith("assert"):
            cell.outputs = [nbformat.v4.new_output("stream", text="fine\n")]
    return cleaned(loads(nbformat.writes(nb)))


@pytest.fixture(scope="module")
def good() -> dict:
    return page()


def problems(text: str) -> str:
    assert text != CHAPTER, "the edit changed nothing"
    return "\n".join(check_notebooks.check_page(PATH, page(text)))


def test_a_good_page_passes() -> None:
    assert check_notebooks.check_page(PATH, page()) == []


LONG = "\n".join(f"x{i} = {i}" for i in range(26))
MANY_LONG = "\n---\n".join(["\n".join(["x = 1"] * 7)] * 4)
WORDY = "word " * 101
BAD = {
    "markdown and begin with `# Title`": ("# Two is", "## Two is"),
    "needs one `> sentence`": ("> A page", "A page"),
    "must hold `#| default_exp module` alone": ("exp two", "exp two\nx = 1"),
    "cell 3: must begin with": ("## Where we are", "## Where are we"),
    "81 words, at most 80": ("A small page.", "word " * 81),
    "must close with": ("## Summary", "## In short"),
    "2 sections, must have 3 to 6": ("## Three is", "### Three is"),
    "bullets, must be 3": ("- three\n", ""),
    "imports must stand alone": ("import math", "import math\nx = 1"),
    "before the sections": ("assert two() == 2", "assert two() == 2\n---\nimport os"),
    "star import": ("import math", "from math import *"),
    "a second hidden cell": ("import math", "#| hide\nx = 1\n---\nimport math"),
    "26 lines of code, at most 25": ("assert two() == 2", LONG),
    "median of": ("import math\n---\n#| hide\nseed = 0", MANY_LONG),
    "101 words, at most 100": ("Nothing.", WORDY),
    "at most 60": ("Which is next?", "Which?" + "\n---\n## x" * 50),
    "bytes, at most 500,000": ("assert two() == 2", f"# {'x' * 500_000}\nassert two()"),
    "MyST": ("Nothing.", "Nothing, see {ref}`here`."),
    "MyST role, directive": ("Nothing.", "```{note}\nNothing.\n```"),
    "HTML <b>": ("Nothing.", "<b>Nothing</b>."),
    "decoration": ("Nothing.", "Nothing \U0001f680."),
    "path of one machine": ("seed = 0", "seed = open('/home/somebody/seed')"),
    "without `#| label": ("#| label: fig-line\n", ""),
    "caption of two sentences": (" It is drawn from two points.", ""),
    "without alt text": ("#| fig-alt: A line from", "# A line from"),
    "two is not asserted": ("assert two() == 2", "two()"),
    "three is not asserted": ("return 2", "return 2\n\n\nthree = 3"),
    "was never closed": ("import math", "print("),
}


@pytest.mark.parametrize("message", BAD)
def test_a_broken_page_is_reported(message: str) -> None:
    assert message in problems(CHAPTER.replace(*BAD[message], 1))


def test_one_class_may_have_forty_lines() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(39))
    whole = CHAPTER.replace("seed = 0", f"class Table:\n{body}")
    assert "lines of code, at most" not in problems(whole)
    assert "at most 40" in problems(whole.replace("    x0 = 0", "    x = 0\n    y = 0"))


def test_docstrings_blanks_and_directives_are_not_lines() -> None:
    source = '#| export\ndef f():\n    """One.\n\n    Two.\n    """\n\n    return 1'
    assert check_notebooks.code_lines(source) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (nbformat.v4.new_output("stream", name="stderr", text="!"), "stderr"),
        (nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]), "error"),
        (nbformat.v4.new_output("stream", text="<f at 0x7f12ab34>"), "address"),
        (nbformat.v4.new_output("stream", text="/home/me/x"), "path of one machine"),
    ],
)
def test_a_bad_output_is_reported(good: dict, output: dict, message: str) -> None:
    bad = copy.deepcopy(good)
    bad["cells"][7]["outputs"] = [output]
    assert message in "\n".join(check_notebooks.check_outputs(PATH, bad))


def test_math_and_code_are_not_html(good: dict) -> None:
    fine = CHAPTER.replace("Nothing.", "If $a<b$ and `<b>`, <https://a.org>.")
    assert problems(fine) == ""


def test_an_unclean_file_is_reported(tmp_path: Path, good: dict) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(dumps(good))
    assert check_notebooks.check_clean(path, read(path)) == []
    dirty = copy.deepcopy(good)
    dirty["cells"][3]["execution_count"] = 7
    path.write_text(dumps(dirty))
    assert "not clean" in check_notebooks.check_clean(path, read(path))[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two chapters, exported."""
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for folder in ("nbs", "eql_repro"):
        (tmp_path / folder).mkdir()
    (tmp_path / "eql_repro/__init__.py").write_text("from .two import two\n")
    one = CHAPTER.replace("exp two", "exp one").replace("two()", "one()")
    (tmp_path / "nbs/01_one.ipynb").write_text(dumps(page(one)))
    (tmp_path / "nbs/02_two.ipynb").write_text(dumps(page()))
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "from eql_repro.two import two",
        "import eql_repro.two",
        "from eql_repro import two",
        "def late():\n    from eql_repro.two import two",
    ],
)
def test_import_of_a_later_chapter_is_reported(project: Path, line: str) -> None:
    assert check_notebooks.check_order(project) == []
    text = CHAPTER.replace("exp two", "exp one").replace("import math", line)
    (project / "nbs/01_one.ipynb").write_text(dumps(page(text)))
    assert "imports two of chapter 02_two" in "\n".join(
        check_notebooks.check_order(project)
    )


def test_chapters_of_one_number_stand_in_the_order_of_their_names(
    project: Path,
) -> None:
    (project / "nbs/02_two.ipynb").rename(project / "nbs/01_two.ipynb")
    text = CHAPTER.replace("import math", "from eql_repro.one import one")
    (project / "nbs/01_two.ipynb").write_text(dumps(page(text)))
    assert check_notebooks.check_order(project) == []
    (project / "nbs/01_one.ipynb").rename(project / "nbs/01_zero.ipynb")
    assert "imports one of chapter 01_zero" in check_notebooks.check_order(project)[0]


def test_import_of_an_unknown_module_is_reported(project: Path) -> None:
    text = CHAPTER.replace("import math", "from eql_repro.gone import x")
    (project / "nbs/02_two.ipynb").write_text(dumps(page(text)))
    assert "which no chapter exports" in check_notebooks.check_order(project)[0]


def test_modules_out_of_step_are_reported(project: Path) -> None:
    missing = check_notebooks.check_in_step(project)
    assert [row.split(":")[0] for row in missing] == [
        f"eql_repro/{name}.py" for name in ("_modidx", "one", "two")
    ]
    package = project / "eql_repro"
    check_notebooks.export(project)
    assert check_notebooks.check_in_step(project) == []
    (package / "one.py").write_text((package / "one.py").read_text() + "x = 1\n")
    (package / "old.py").write_text("")
    found = "\n".join(check_notebooks.check_in_step(project))
    assert "old.py: stale" in found and "one.py: not in step" in found


def test_readme_out_of_step_is_reported(project: Path) -> None:
    index = page("# Title\n> Line.\n---\n## Map\n\n[one](01_one.ipynb)\n---\nx = 1")
    table = "<table><tr><th>a</th></tr><tr><td>1</td></tr></table>"
    index["cells"][2]["outputs"] = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": table}}
    ]
    (project / "nbs/index.ipynb").write_text(dumps(index))
    (project / "README.md").write_text(readme.render(index))
    assert readme.in_step(project) == []
    text = (project / "README.md").read_text()
    assert "[one](nbs/01_one.ipynb)" in text and "```python\nx = 1\n```" in text
    assert "| a |\n| --- |\n| 1 |" in text
    (project / "README.md").write_text(text + "more\n")
    assert "not in step" in readme.in_step(project)[0]


def test_bad_format_is_reported(project: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", project)
    for folder in ("tests", "tools"):
        (project / folder).mkdir()
    (project / "setup.py").write_text("import os\n")
    (project / "tools/a.py").write_text("x  =  1\n")
    found = "\n".join(check_notebooks.check_format(project))
    assert "setup.py:1:8: F401" in found and "tools/a.py" in found


def changed(good: dict, cell: int, data: dict) -> str:
    new = copy.deepcopy(good)
    new["cells"][cell]["outputs"][0].update(data)
    return "\n".join(run_notebooks.compare(good, new))


def test_equal_outputs_compare_equal(good: dict) -> None:
    assert run_notebooks.compare(good, good) == []


def test_stale_text_is_reported(good: dict) -> None:
    assert "cell 8: stdout differs" in changed(good, 7, {"text": "fime\n"})


def test_a_stale_table_is_reported(good: dict) -> None:
    old, new = copy.deepcopy(good), copy.deepcopy(good)
    for nb, number in ((old, 1), (new, 2)):
        nb["cells"][9]["outputs"][0]["data"]["text/html"] = f"<td>{number}</td>"
    assert "text/html differs" in run_notebooks.compare(old, new)[0]


def test_a_missing_output_is_reported(good: dict) -> None:
    new = copy.deepcopy(good)
    new["cells"][9]["outputs"] = []
    assert "cell 10: stored outputs are" in run_notebooks.compare(good, new)[0]


def test_figures_are_compared_coarsely(good: dict) -> None:
    def shown(png: str) -> str:
        return changed(good, 9, {"data": {"image/png": png, "text/plain": "<Figure>"}})

    assert shown(figure(scale=1.01)) == ""
    assert "figure differs" in shown(figure(draw=False))
    assert "figure differs" in shown(figure(scale=2.5))


def test_fingerprint_follows_the_imports(project: Path) -> None:
    shutil.copy(ROOT / "constraints.txt", project)
    check_notebooks.export(project)
    text = CHAPTER.replace("import math", "from eql_repro.one import one")
    path = project / "nbs/02_two.ipynb"
    path.write_text(dumps(page(text)))
    before = run_notebooks.fingerprint(path, project)
    assert before == run_notebooks.fingerprint(path, project)
    (project / "eql_repro/one.py").write_text("one = 1\n")
    assert before != run_notebooks.fingerprint(path, project)


def test_execution_shows_errors_and_new_outputs(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(
        dumps(page("x = 1\n---\nprint(x)\nx + 1\n---\n#| eval: false\n1/0"))
    )
    new = run_notebooks.execute(path)
    assert [len(cell["outputs"]) for cell in new["cells"]] == [0, 2, 0]
    assert "stored outputs are []" in run_notebooks.compare(read(path), new)[0]
    path.write_text(dumps(new))
    assert check_notebooks.check_clean(path, read(path)) == []
    path.write_text(dumps(page("assert 1 == 2")))
    with pytest.raises(Exception, match="AssertionError"):
        run_notebooks.execute(path)
