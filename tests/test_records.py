"""Records: matching, verdicts, and what is never overwritten."""

import json
import math
from dataclasses import asdict, replace

import pytest

pytest.importorskip("pandas")

from eql_repro.recipe import Recipe, run_source  # noqa: E402
from eql_repro.recipes import RECIPES  # noqa: E402
from eql_repro.records import (  # noqa: E402
    Cell,
    RecipeChanged,
    add_record,
    changed_fields,
    check_record,
    load_records,
    missing,
    paper_numbers,
    paper_value,
    project_root,
    provenance_line,
    readable,
    results_table,
    verdict,
)

TINY = Recipe("tiny", iterations=2, warmup=0, milestones=())


def record(of=TINY, seed=0, top1=0.4, **changes):
    data = {
        "recipe": json.loads(json.dumps(asdict(of))),
        "seed": seed,
        "iterations": of.iterations,
        "device": "cpu: none",
        "minutes": 1.0,
        "metrics": {"top1": top1, "few": 0.1},
        "per_class": {"accuracy": [0.9, None]},
        "calibration": {"accuracy": [0.5, None], "count": [3, 0]},
        "curves": {"iteration": [1, 2], "loss": [2.0, 1.0], "evaluations": []},
        "versions": {"torch": "2.0"},
        "commit": "0123456789",
        "source": run_source(of),
    }
    return data | changes


def save(folder, data):
    folder.mkdir(exist_ok=True)
    path = folder / f"{data['recipe']['name']}-s{data['seed']}.json"
    path.write_text(json.dumps(data))
    return path


def finished(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps(data))
    return folder


# Matching


@pytest.mark.parametrize(
    "field, value",
    [("gamma", 0.5), ("lr", 0.1), ("milestones", (1,)), ("augment", ("crop_flip",))],
)
def test_a_changed_field_is_an_error_that_names_it(tmp_path, field, value):
    save(tmp_path, record())
    with pytest.raises(RecipeChanged, match=rf"tiny-s0\.json.*: {field} changed"):
        load_records(replace(TINY, **{field: value}), tmp_path)


def test_a_field_the_record_does_not_know_means_its_default(tmp_path):
    data = record()
    del data["recipe"]["momentum"]
    save(tmp_path, data)
    assert len(load_records(TINY, tmp_path)) == 1
    with pytest.raises(RecipeChanged, match="momentum"):
        load_records(replace(TINY, momentum=0.5), tmp_path)


def test_a_field_that_no_longer_exists_is_a_change():
    recorded = record()["recipe"] | {"label_smoothing": 0.1}
    assert changed_fields(recorded, TINY) == ["label_smoothing"]


def test_every_field_but_the_name_counts():
    recorded = record()["recipe"]
    for field in recorded.keys() - {"name"}:
        assert changed_fields(recorded | {field: "other"}, TINY) == [field]
    assert changed_fields(recorded | {"name": "other"}, TINY) == []


def test_seeds_come_in_order_and_other_recipes_stay_out(tmp_path):
    for seed in (10, 2, 0):
        save(tmp_path, record(seed=seed))
    save(tmp_path, record(replace(TINY, name="tiny-short")))
    save(tmp_path, record(replace(TINY, name="tiny-s")))
    assert [r.seed for r in load_records(TINY, tmp_path)] == [0, 2, 10]


def test_source_changed_since_marks_the_row(tmp_path):
    for seed in range(3):
        save(tmp_path, record(seed=seed, source="another"))
    table = results_table([Cell("tiny", TINY, 40.0)], folder=tmp_path)
    assert table.changed.all()
    assert readable(table).iloc[0, 2] == "40.0 ± 0.0 (3) †"
    assert "†" in provenance_line(load_records(TINY, tmp_path))


def test_a_removed_record_turns_the_row_to_not_run(tmp_path):
    path = save(tmp_path, record())
    cells = [Cell("tiny", TINY, 40.0)]
    assert results_table(cells, folder=tmp_path).verdict[0] == "too few seeds"
    path.unlink()
    text = readable(results_table(cells, folder=tmp_path))
    assert text.verdict[0] == "not run: `eql run tiny --seed 0`"
    assert text.iloc[0, 2] == text.difference[0] == "–"


def test_a_table_page_goes_red_when_a_recipe_changes(tmp_path):
    save(tmp_path, record())
    with pytest.raises(RecipeChanged, match="batch"):
        results_table([Cell("tiny", replace(TINY, batch=8), 40.0)], folder=tmp_path)


def test_an_unknown_metric_or_recipe_is_named(tmp_path):
    save(tmp_path, record())
    with pytest.raises(ValueError, match="metric is 'AP', the records have top1, few"):
        results_table([Cell("tiny", TINY, 40.0)], "AP", folder=tmp_path)
    with pytest.raises(ValueError, match="recipe is 'nothing'"):
        load_records("nothing", tmp_path)


def test_the_gain_is_measured_from_our_own_baseline(tmp_path):
    other = replace(TINY, name="other")
    for seed in range(3):
        save(tmp_path, record(seed=seed, top1=0.40))
        save(tmp_path, record(other, seed, 0.43))
    cells = [Cell("base", TINY, 50.0), Cell("other", other, 53.0)]
    table = results_table(cells, baseline=cells[0], folder=tmp_path)
    assert readable(table).gain.tolist() == ["–", "+3.0"]
    assert table.verdict.tolist() == ["not reproduced", "direction only"]
    stand_in = results_table(
        cells, baseline=cells[0], same_recipe=False, folder=tmp_path
    )
    assert stand_in.verdict.tolist() == ["reference", "direction only"]


def test_provenance_says_when_the_tree_was_dirty(tmp_path):
    save(tmp_path, record(commit="0123456789ab-dirty", minutes=3.0))
    save(tmp_path, record(seed=1, commit="0123456789ab", minutes=5.0))
    line = provenance_line(load_records(TINY, tmp_path))
    assert "commit 0123456 and 0123456-dirty" in line
    assert "3 to 5 minutes" in line and "seeds 0, 1" in line


# Schema


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": "0"}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"seed": -1}, "cannot be 'tiny', -1"),
        ({"minutes": -1.0}, "cannot be 'tiny', 0, -1"),
        ({"recipe": {"name": "../evil", "iterations": 2}}, "cannot be '../evil'"),
        ({"minutes": math.inf}, "record.minutes is inf"),
        ({"metrics": {}}, "no metrics"),
        ({"metrics": {"top1": 41.0}}, "'top1' is 41.0"),
        ({"metrics": {"top1": math.nan}}, "top1 is nan"),
        ({"per_class": {"accuracy": [0.5, math.nan]}}, r"accuracy\[1\] is nan"),
        ({"iterations": 1}, "1 of 2 iterations"),
        ({"surprise": 1}, "unknown entry 'surprise'"),
        ({"recipe": {"iterations": 2}}, "no 'name' in its recipe"),
    ],
)
def test_a_bad_record_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_record(record(**changes))
    with pytest.raises(ValueError, match=message):
        add_record(finished(tmp_path / "run", record(**changes)), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_every_missing_entry_is_named():
    for key in record():
        with pytest.raises(ValueError, match=f"missing entry '{key}'"):
            check_record({k: v for k, v in record().items() if k != key})


def test_a_file_under_a_wrong_name_is_refused(tmp_path):
    save(tmp_path, record()).rename(tmp_path / "tiny-s1.json")
    with pytest.raises(ValueError, match=r"tiny-s1\.json holds .* tiny-s0\.json"):
        load_records(TINY, tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tiny-s0.json").write_text("{")
    with pytest.raises(ValueError, match=r"tiny-s0\.json: "):
        load_records(TINY, tmp_path)


# Adding


def test_add_never_overwrites_silently(tmp_path):
    first = finished(tmp_path / "a", record(top1=0.4))
    second = finished(tmp_path / "b", record(top1=0.5))
    target = add_record(first, tmp_path / "records")
    before = target.read_bytes()
    assert add_record(first, tmp_path / "records") == target
    with pytest.raises(FileExistsError, match="another run"):
        add_record(second, tmp_path / "records")
    assert target.read_bytes() == before
    add_record(second, tmp_path / "records", force=True)
    assert load_records(TINY, tmp_path / "records")[0].metrics["top1"] == 0.5
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["tiny-s0.json"]


def test_add_refuses_an_unfinished_run_and_a_changed_recipe(tmp_path):
    with pytest.raises(ValueError, match="not a finished run"):
        add_record(tmp_path, tmp_path / "records")
    known = replace(RECIPES["cifar100lt_if200_softmax"], lr=0.3)
    with pytest.raises(RecipeChanged, match="lr changed"):
        add_record(finished(tmp_path / "run", record(known)), tmp_path / "records")


def test_missing_shrinks_by_what_is_there(tmp_path):
    recipes = ["cifar100lt_if200_softmax_short", "cifar100lt_if200_softmax"]
    todo = missing(recipes, seeds=(0, 1), folder=tmp_path)
    assert todo.recipe.tolist() == recipes[1:] * 2 + recipes[:1] * 2
    assert (todo.minutes_cpu > todo.minutes_gpu).all()
    save(tmp_path, record(RECIPES[recipes[1]], seed=1))
    left = missing(recipes, seeds=(0, 1), folder=tmp_path)
    assert {*todo.command} - {*left.command} == {f"eql run {recipes[1]} --seed 1"}


# Verdicts


SOFTMAX = dict(baseline=[39.0, 39.2, 39.4], paper_baseline=41.3)
STAND_IN = dict(same_recipe=False)


@pytest.mark.parametrize(
    "ours, paper, options, expected",
    [
        ([], 43.4, {}, "not run"),
        ([], 43.4, SOFTMAX | STAND_IN, "not run"),
        ([43.4], 43.4, SOFTMAX, "too few seeds"),
        ([43.4, 43.4], 43.4, SOFTMAX, "too few seeds"),
        ([43.4] * 3, 43.4, SOFTMAX, "reproduced"),
        ([42.4] * 3, 43.4, SOFTMAX, "reproduced"),  # one point, to the rounding
        ([42.3] * 3, 43.4, SOFTMAX, "direction only"),
        ([44.5] * 3, 43.4, SOFTMAX, "direction only"),
        ([40.0, 42.0, 44.0], 43.4, {}, "reproduced"),  # 1.4 off, sd 2
        ([40.0, 42.0, 44.0], 46.1, {}, "not reproduced"),  # 4.1 off, 2 sd is 4
        ([39.3, 39.2, 39.4], 43.4, SOFTMAX, "not reproduced"),
        ([37.0] * 3, 43.4, SOFTMAX, "not reproduced"),  # the other sign
        ([37.0] * 3, 35.0, SOFTMAX, "direction only"),  # the paper's loss, also a sign
        ([43.4] * 3, 43.4, SOFTMAX | STAND_IN, "direction only"),
        ([39.2] * 3, 43.4, SOFTMAX | STAND_IN, "not reproduced"),
        ([39.2], 43.4, SOFTMAX | STAND_IN, "too few seeds"),
        ([41.0] * 3, 43.4, SOFTMAX | dict(baseline=[39.0]), "too few seeds"),
        ([41.0] * 3, 41.3, SOFTMAX, "reproduced"),
        ([37.0] * 3, 41.3, SOFTMAX, "not reproduced"),  # the paper shows no gain
        ([41.0] * 3, 41.3, STAND_IN, "reference"),
        ([41.0], 41.3, STAND_IN, "reference"),
    ],
)
def test_verdict(ours, paper, options, expected):
    assert verdict(ours, paper, **options) == expected


def test_the_gain_must_exceed_two_standard_errors():
    base = [39.0, 40.0, 41.0]  # sd 1, so the standard error of the gain is 0.816
    options = dict(baseline=base, paper_baseline=40.0, **STAND_IN)
    assert verdict([v + 1.6 for v in base], 42.0, **options) == "not reproduced"
    assert verdict([v + 1.7 for v in base], 42.0, **options) == "direction only"


# The project's folder and the paper


def test_project_root(tmp_path, monkeypatch):
    inside = tmp_path / "clone" / "nbs" / "results"
    inside.mkdir(parents=True)
    (tmp_path / "clone" / "settings.ini").touch()
    monkeypatch.delenv("EQL_ROOT", raising=False)
    monkeypatch.chdir(inside)
    assert project_root() == tmp_path / "clone"
    monkeypatch.setenv("EQL_ROOT", str(inside))
    assert project_root() == inside
    monkeypatch.setenv("EQL_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="EQL_ROOT"):
        project_root()


def test_outside_a_clone_the_error_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("EQL_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"settings\.ini.*EQL_ROOT"):
        project_root()
    with pytest.raises(ValueError, match=r"settings\.ini"):
        paper_numbers()


def test_the_paper_answers_or_says_what_it_has():
    assert len(paper_numbers()) > len(paper_numbers("table7")) == 20
    assert paper_value("table9", "gamma=0.9", "top1") == 36.4
    with pytest.raises(ValueError, match="expected one of table1"):
        paper_numbers("table99")
    with pytest.raises(ValueError, match="occurs 0 times"):
        paper_value("table9", "gamma=0.9", "AP")


def test_a_row_that_the_paper_does_not_have_has_no_verdict_on_it(tmp_path):
    for seed in range(3):
        save(tmp_path, record(seed=seed))
    text = readable(results_table([Cell("tiny", TINY)], folder=tmp_path))
    assert text.verdict[0] == "not in the paper"
    assert text.paper[0] == text.difference[0] == "–"


def test_a_run_of_unknown_length_is_missing_too(tmp_path):
    table = missing(["lvis_v05_r50_fpn_sigmoid"], (0,), tmp_path)
    assert len(table) == 1 and table.minutes_gpu.isna().all()


def test_a_broken_record_of_a_run_is_named(tmp_path):
    for text in ("{", "{}", '{"metrics": {}}'):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError, match=r"record\.json: "):
            add_record(tmp_path, tmp_path / "records")
