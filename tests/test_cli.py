"""The command `eql` as a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs eql_repro[run]")
from eql_repro import __version__, cli  # noqa: E402
from eql_repro.cli import main  # noqa: E402
from eql_repro.recipes import find_recipe  # noqa: E402
from eql_repro.records import project_root  # noqa: E402
from eql_repro.training import Interrupted, train  # noqa: E402

EQL = [sys.executable, "-m", "eql_repro"]
LVIS = Path(os.environ.get("EQL_DATA", "")) / "lvis_v0.5_val_64/lvis_v0.5_val_64.json"
RECIPE = """
from eql_repro.recipe import Recipe

slow = Recipe("slow", data="crops", num_classes=5, imbalance=10, network="resnet8",
              loss="eql", lambda_=0.1, iterations=120, batch=8, background=8, lr=0.05,
              warmup=0, milestones=())
"""


def eql(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [*EQL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_a_folder_with_a_space_is_quoted(tmp_path, capsys):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "checkpoint.pt").touch()
    with pytest.raises(SystemExit), cli.resumable([tmp_path / "a b"]):
        raise Interrupted("stopped after iteration 3")
    assert f"eql resume '{tmp_path}/a b'\n" in capsys.readouterr().err


def test_interrupt_then_resume_then_refuse(tmp_path):
    (tmp_path / "my.py").write_text(RECIPE)
    command = [*EQL, "run", "my.py:slow", "--seed", "1", "--checkpoint-every", "5"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = tmp_path / "runs" / "slow-s1"
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "eql resume runs/slow-s1" in said and "Traceback" not in said
    assert not (folder / "record.json").exists()

    done = eql("resume", "runs/slow-s1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "record.json").read_text())
    assert record["iterations"] == 120 and record["seed"] == 1

    again = eql("run", "my.py:slow", "--seed", 1, cwd=tmp_path)
    assert again.returncode == 2 and "finished run; --force replaces it" in again.stderr
    assert json.loads((folder / "record.json").read_text()) == record


def test_error_is_one_line_and_exit_code_2(tmp_path):
    out = eql("run", "cifar100lt_if200_softmax", "--data", "nowhere", cwd=tmp_path)
    lines = [line for line in out.stderr.splitlines() if line.startswith("eql:")]
    assert out.returncode == 2 and len(lines) == 1 and "nowhere" in lines[0]
    assert "Traceback" not in out.stderr and not (tmp_path / "runs").exists()


@pytest.mark.skipif(not LVIS.is_file(), reason="no LVIS file under EQL_DATA")
def test_frequencies_of_a_real_lvis_file():
    out = eql("frequencies", LVIS, "--lambda", 0.02)
    assert out.returncode == 0, out.stderr
    content = json.loads(LVIS.read_text())
    pairs = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    counts = [0] * len(content["categories"])
    for _, category in pairs:
        counts[category - 1] += 1
    tail = sum(n / len(content["images"]) < 0.02 for n in counts)
    assert f"{len(counts)} classes, {len(content['images'])} images (all)" in out.stdout
    assert f"0.02  {tail:7d}" in out.stdout


def error_of(capsys, *arguments: object) -> str:
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    said = capsys.readouterr().err.splitlines()[-1]  # below a bar, perhaps
    assert end.value.code == 2 and said.startswith("eql: ")
    return said


@pytest.mark.parametrize("text", ["{", "{}", '{"recipe": {"name": "a"}}'])
def test_a_broken_run_is_one_line_with_the_file(tmp_path, capsys, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "weights.pt").touch()
    for command in (["resume", tmp_path], ["evaluate", tmp_path]):
        assert str(tmp_path / "run.json") in error_of(capsys, *command)


def test_broken_weights_are_one_line_with_the_file(tmp_path, capsys):
    (tmp_path / "my.py").write_text(RECIPE)
    short = find_recipe(f"{tmp_path / 'my.py'}:slow")
    short = replace(short, name="short", iterations=2)
    (folder,) = train([(short, 0)], tmp_path)
    file = folder / "weights.pt"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        assert f"{file}: broken" in error_of(capsys, "evaluate", folder)
        (folder / "checkpoint.pt").write_bytes(content)
        (folder / "record.json").unlink(missing_ok=True)
        assert "checkpoint.pt: broken" in error_of(capsys, "resume", folder)


def test_a_broken_record_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EQL_ROOT", str(tmp_path))
    (tmp_path / "records").mkdir()
    for text in ("{}", '{"metrics": {}}'):
        (tmp_path / "records" / "a-s0.json").write_text(text)
        assert "a-s0.json: " in error_of(capsys, "records")


def test_records_take_ap_by_negative_categories_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("hotcoco")
    (tmp_path / "records").mkdir()
    real = project_root() / "records"
    monkeypatch.setenv("EQL_ROOT", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    assert "record.json" in error_of(capsys, "records", "--negatives", str(run))
    shutil.copy(real / "crops_eql-s0.json", run / "record.json")
    error = error_of(capsys, "records", "--negatives", str(run))
    assert "'crops_eql' was not run on scenes" in error
    shutil.copy(real / "pocket_heads_eql-s0.json", run / "record.json")
    (run / "detections.jsonl").write_text("")
    with pytest.raises(SystemExit, match="0"):
        main(["records", "--negatives", str(run)])
    rows = (tmp_path / "records" / "negatives.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 and rows[1].startswith("pocket_heads_eql,0,own,0.0,0.0,")
    error = error_of(capsys, "records", "--negatives", str(run))
    assert "has rows of pocket_heads_eql with seed 0" in error


def test_options_that_do_not_apply_are_refused(tmp_path, capsys):
    none = "--engine", "lvis", "--no-masks", "--ground-truth", tmp_path
    said = error_of(capsys, "evaluate", tmp_path, *none)
    assert "--ground-truth, --engine, --masks/--no-masks: not for" in said
    files = "--ground-truth", "a.json", "--detections", "b.json"
    assert "--data: not for" in error_of(capsys, "evaluate", *files, "--data", "x")
    assert "device: got 'gpu'" in error_of(capsys, "bench", "losses", "--device", "gpu")
    said = error_of(capsys, "bench", "losses", "--out", Path(__file__))
    assert "test_cli.py is no folder" in said
    (tmp_path / "own.py").write_text("def recipe(:")
    assert "own.py, line 1" in error_of(capsys, "run", f"{tmp_path / 'own.py'}:recipe")
    said = error_of(capsys, "run", "quickstart_eql", "--together", 3)
    assert "give names, or --missing --minutes N [--together N]" in said


def test_an_evaluation_without_objects_says_so(tmp_path, capsys):
    pytest.importorskip("hotcoco", reason="needs eql_repro[run]")
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    truth = {"images": [{"id": 1} | lists], "annotations": []}
    truth["categories"] = [{"id": 1, "name": "cat", "frequency": "r"}]
    files = [tmp_path / name for name in ("truth.json", "found.json")]
    for file, content in zip(files, (truth, []), strict=True):
        file.write_text(json.dumps(content))
    options = "--ground-truth", files[0], "--detections", files[1], "--no-masks"
    assert f"{files[0]}: no object to find" in error_of(capsys, "evaluate", *options)


@pytest.mark.parametrize("group", [[], ["data"], ["scenes"]])
def test_a_group_alone_prints_its_help_and_no_error(capsys, group):
    with pytest.raises(SystemExit) as end:
        main(group)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "Usage:" in out + err
    assert not [line for line in err.splitlines() if line.startswith("eql:")]


def test_predict_checks_its_threshold_first(tmp_path, capsys):
    for threshold in ("1.5", "-0.1", "nan"):
        said = error_of(capsys, "predict", "no_run", "a.png", "--threshold", threshold)
        assert said.startswith(f"eql: threshold: got {threshold}, expected a score")


def test_recipes_are_listed_outside_a_clone(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("EQL_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["recipes"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and not err
    assert "lvis_v05_r50_fpn_eql" in out.split("Estimates")[1] and "22.8" not in out


def test_data_check_fails_for_broken_files_only(tmp_path, capsys):
    for code in (0, 1):
        with pytest.raises(SystemExit) as end:
            main(["data", "check", str(tmp_path)])
        assert end.value.code == code
        (tmp_path / "lvis_v0.5_val.json").write_text("{")
    assert "lvis_v0.5_val.json" in capsys.readouterr().out


def test_frequencies_proposes_no_empty_tail_and_names_a_broken_file(tmp_path, capsys):
    rows = [{"image_id": i, "category_id": 1 + (i > 3)} for i in range(5)]
    small = {"images": [{"id": i} for i in range(9)], "annotations": rows}
    small["categories"] = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    file = tmp_path / "small.json"
    file.write_text(json.dumps(small))
    with pytest.raises(SystemExit) as end:
        main(["frequencies", str(file)])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert not end.value.code and last[1:3] == ["2", "1"]  # classes 2 and 3
    file.write_text("{")
    assert f"{file}: not JSON" in error_of(capsys, "frequencies", file)


def test_help_and_evaluation_load_no_torch(tmp_path):
    pytest.importorskip("hotcoco", reason="needs eql_repro[run]")
    image = {"id": 1, "height": 9, "width": 9, "neg_category_ids": []}
    truth = {"images": [image | {"not_exhaustive_category_ids": []}]}
    truth["categories"] = [{"id": 2, "name": "cup", "frequency": "r"}]
    row = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 1, 5, 5], "area": 25}
    (tmp_path / "truth.json").write_text(json.dumps(truth | {"annotations": [row]}))
    (tmp_path / "found.json").write_text(json.dumps([row | {"score": 0.5}]))
    evaluate = "evaluate --ground-truth truth.json --detections found.json --no-masks"
    code = """
import sys
from eql_repro.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules and "torchvision" not in sys.modules
"""
    version = ["--version"], __version__
    for words, expected in (
        (["--help"], "quickstart"),
        version,
        (evaluate.split(), "100.00"),
    ):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_interrupt_ends_the_whole_list_of_missing_runs(tmp_path):
    code = """
import signal
from dataclasses import replace
from my import slow
import eql_repro.missing as module
from eql_repro.cli import main
class Table:
    recipe, seed = ["slow", "other"], [0, 0]
module.missing = lambda folder: Table
module.RECIPES = {"slow": slow, "other": replace(slow, name="other", iterations=200)}
save = module.train.__globals__["save_checkpoint"]
signals = iter([signal.SIGTERM])
def stop(*arguments):
    save(*arguments)
    for number in signals:
        signal.raise_signal(number)
module.train.__globals__["save_checkpoint"] = stop
main("run --missing --minutes 9 --checkpoint-every 2".split())
"""
    (tmp_path / "my.py").write_text(RECIPE)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "eql resume runs/slow-s0" in done.stderr
    assert "time is up" not in done.stdout and not (tmp_path / "runs/other-s0").exists()
