"""tools/same_numbers.py: equal numbers are told from other numbers."""

import shutil

import pytest
import same_numbers
import torch
from book import ROOT

pytest.importorskip("resvg_py", reason="needs eql_repro[run]")
pytest.importorskip("accelerate", reason="needs eql_repro[run]")


SMALL = """
RECIPES["small"] = replace(
    RECIPES["crops_eql_alone"], name="small", num_classes=10, imbalance=20, batch=8
)
"""


def tree(folder, old="", new=""):
    """A copy of the package with a small recipe and one edit in the training step."""
    shutil.copytree(ROOT / "eql_repro", folder / "eql_repro")
    with open(folder / "eql_repro" / "recipes.py", "a") as file:
        file.write("\nfrom dataclasses import replace\n" + SMALL)
    file = folder / "eql_repro" / "lanes.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return folder


def test_edits_that_leave_the_numbers_and_edits_that_do_not(tmp_path):
    plain = tree(tmp_path / "plain")
    line = "    lane.optimizer.step()\n"
    other_words = tree(
        tmp_path / "words", line, "    todo = lane.optimizer\n    todo.step()\n"
    )
    other_steps = tree(tmp_path / "steps", line, 2 * line)
    question = tmp_path, "small", 20
    before, after = same_numbers.compare([plain, other_words], *question)
    assert before != after
    with pytest.raises(RuntimeError, match="other .*weight"):
        same_numbers.compare([plain, other_steps], *question)


def test_constants_of_the_loss_may_be_saved_or_not(tmp_path):
    for name, extra in {"old": "class_loss.tail", "new": "", "wrong": "bias"}.items():
        (tmp_path / name).mkdir()
        state = {"weight": torch.ones(2)} | ({extra: torch.ones(1)} if extra else {})
        torch.save(state, tmp_path / name / "weights.pt")
        (tmp_path / name / "record.json").write_text("{}")
    folder = tmp_path / "old"
    assert same_numbers.difference(folder, tmp_path / "new") == ""
    assert same_numbers.difference(folder, tmp_path / "wrong") == "names of weights"


def test_a_run_that_fails_says_why(tmp_path):
    broken = tree(tmp_path / "broken", "def learning_rate(", "def learning_rat(")
    with pytest.raises(RuntimeError, match="learning_rate"):
        same_numbers.compare([broken, broken], tmp_path, "small", 2)


def test_rows_are_added(tmp_path):
    file = tmp_path / "same_numbers.csv"
    for after in "23":
        row = dict(zip(same_numbers.FIELDS, ["a", "1", after, "c", 2], strict=True))
        same_numbers.add_row(file, row)
    from eql_repro.provenance import same_sources

    assert same_sources("a", "3", file) == {"1", "2", "3"}
