"""What the chapter of the metrics cannot hold: errors, and what is not there."""

import json

import pytest
import torch

from eql_repro.metrics import (
    calibration,
    class_accuracy,
    classification_results,
    mean_positive_score,
    top_k,
)


@pytest.mark.parametrize("measure", [top_k, calibration])
def test_wrong_shapes(measure):
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(3,\), expected"):
        measure(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("measure", [class_accuracy, mean_positive_score])
def test_one_label_for_each_row(measure):
    with pytest.raises(ValueError, match=r"got shapes \(2, 4\) and \(3,\), expected"):
        measure(torch.zeros(2, 4), torch.zeros(3), 4)


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_at_most_the_number_of_classes(k):
    with pytest.raises(ValueError, match=f"k: got {k}, expected 1 to 4"):
        top_k(torch.zeros(2, 4), torch.zeros(2).long(), k)


def test_scores_and_labels_that_say_nothing_are_refused():
    labels = torch.tensor([0, 0, 0, 1, 2])
    counts, sure = torch.tensor([500, 50, 5]), torch.eye(3)[labels]
    lost = sure.clone()
    lost[3] = torch.nan
    for measure in (top_k, calibration):
        with pytest.raises(ValueError, match="scores: got NaN for 1 of 5 images"):
            measure(lost, labels)
        with pytest.raises(ValueError, match="labels: got 3, expected 0 to 2"):
            measure(sure, labels + 1)
        with pytest.raises(ValueError, match="labels: got -1, expected 0 to 2"):
            measure(sure, labels - 1)
    for scores in (30 * sure, -sure):
        with pytest.raises(ValueError, match="expected probabilities in"):
            calibration(scores - 1, labels)
    with pytest.raises(ValueError, match="bins: got 0"):
        calibration(sure, labels, bins=0)
    with pytest.raises(ValueError, match="counts: got 2, expected 3"):
        classification_results(sure, labels, counts[:2])
    assert classification_results(sure, labels, counts)["metrics"]["top1"] == 1


def test_results_are_json_though_a_class_and_a_group_have_no_images():
    scores, labels = torch.eye(3)[:2], torch.arange(2)
    results = classification_results(scores, labels, torch.tensor([500, 50, 5]))
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["per_class"]["mean_positive_score"] == [1, 1, None]
    assert (
        "few" not in results["metrics"]
        and "few" not in results["calibration"]["groups"]
    )


def test_bins_have_their_edges_and_take_the_ends():
    scores = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.03, 0.02], [0.65, 0.35]])
    found = calibration(scores, torch.tensor([0, 0, 1, 1]))
    assert found["edges"] == pytest.approx([n / 10 for n in range(11)])
    assert found["count"] == [1, 0, 0, 0, 0, 1, 1, 0, 0, 1]
    assert [found["accuracy"][n] for n in (0, 6, 9)] == [0, 0, 1]


def test_results_of_eight_classes_hold_the_best_five_and_every_group():
    scores = torch.arange(8, 0, -1).expand(8, 8) / 36  # class 0 is always the best
    counts = torch.tensor([500, 200, 90, 60, 30, 9, 5, 1])
    results = classification_results(scores, torch.arange(8), counts)
    assert results["metrics"]["top1"] == 1 / 8 and results["metrics"]["top5"] == 5 / 8
    groups = results["calibration"]["groups"]
    assert {k: sum(v["count"]) for k, v in groups.items()} == {
        "few": 3,
        "medium": 3,
        "many": 2,
    }
    assert sum(results["calibration"]["count"]) == 8
