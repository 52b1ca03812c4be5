"""Metrics of counts, compared with scikit-learn and SciPy; calibration in closed form; what makes a result the best."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from utils.metrics import (
    BEST_METRICS,
    BINS,
    Best,
    best_of,
    calibration_sums,
    class_metrics,
    criterion_text,
    expected_calibration_error,
    frequent_confusions,
    mean_metrics,
    percent,
    wilson_interval,
)

LABELS = {  # name: (classes, true labels, predictions) that are drawn
    "all classes": (7, range(7), range(7)),
    "two classes": (2, range(2), range(2)),
    "a single class": (1, range(1), range(1)),
    "no images of two classes": (7, [0, 1, 2, 4, 5], range(7)),
    "classes that are never predicted": (7, range(7), [2, 5]),
    "no class is correct": (6, [0, 1, 2], [3, 4]),
    "a class without images or predictions": (4, [0, 1, 3], [0, 3]),
}


def draw_labels(name):
    """(number of classes, true labels, predictions) of a case, with a third of the predictions correct if possible."""
    classes, true, predicted = LABELS[name]
    random = np.random.default_rng(len(name))
    labels, predictions = random.choice(true, 200), random.choice(predicted, 200)
    repeat = (random.random(200) < 1 / 3) & np.isin(labels, list(predicted))
    return classes, labels, np.where(repeat, labels, predictions)


def count(classes, labels, predictions):
    return torch.from_numpy(confusion_matrix(labels, predictions, labels=range(classes)))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize("name", LABELS)
def test_metrics_equal_those_of_scikit_learn(name):
    classes, labels, predictions = draw_labels(name)
    confusion = count(classes, labels, predictions)
    options = {"labels": range(classes), "zero_division": 0}
    expected = precision_recall_fscore_support(labels, predictions, **options)
    found = class_metrics(confusion)
    for metric, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(found[metric].numpy(), values, rtol=1e-12, err_msg=metric)
    macro = precision_recall_fscore_support(labels, predictions, average="macro", **options)
    means = mean_metrics(confusion)
    assert [means[f"macro_{metric}"] for metric in ("precision", "recall", "f1")] == pytest.approx(macro[:3])
    assert means["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    share = (confusion.diagonal().sum() / confusion.sum()).item()
    assert share == pytest.approx(accuracy_score(labels, predictions))


def test_the_most_frequent_confusions_come_first_and_equal_ones_in_the_order_of_the_classes():
    classes, labels, predictions = draw_labels("all classes")
    errors = Counter(pair for pair in zip(labels.tolist(), predictions.tolist(), strict=True) if pair[0] != pair[1])
    expected = [(*pair, number) for pair, number in sorted(errors.items(), key=lambda item: (-item[1], item[0]))]
    confusion = count(classes, labels, predictions)
    assert frequent_confusions(confusion, 5) == expected[:5]
    assert frequent_confusions(confusion, 1000) == expected
    assert frequent_confusions(torch.eye(3, dtype=torch.int64), 5) == []


@pytest.mark.parametrize("images", [1, 2, 35, 360, 50_000])
def test_the_interval_of_an_accuracy_is_that_of_scipy(images):
    for correct in sorted({0, 1, images // 3, images - 1, images}):
        expected = binomtest(correct, images).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct / images, images) == pytest.approx((expected.low, expected.high), abs=1e-12)
        low, high = wilson_interval(correct / images, images)
        assert 0 <= low <= correct / images <= high <= 1


def test_an_accuracy_as_text():
    assert percent(0.975, 360) == "97.50 % [95.32, 98.68]"
    assert percent(0.975) == "97.50 %"
    assert percent(math.nan, 360) == "nan %"


def test_the_calibration_error_in_closed_form():
    """Two groups of images: 300 of confidence 0.9 with 70 % correct, 100 of confidence 0.5 with 60 % correct."""
    confidence = torch.tensor([0.9] * 300 + [0.5] * 100)
    correct = torch.tensor([True] * 210 + [False] * 90 + [True] * 60 + [False] * 40)
    sums = calibration_sums(confidence, correct)
    assert expected_calibration_error(sums) == pytest.approx((300 * 0.2 + 100 * 0.1) / 400, abs=1e-6)
    assert sums[13].tolist() == pytest.approx([300, 210, 270])
    assert sums[7].tolist() == pytest.approx([100, 60, 50])
    assert sums.sum(dim=0).tolist() == pytest.approx([400, 270, 320])


def test_a_perfectly_calibrated_model_has_no_calibration_error():
    """Errors of several confidences within one bin cancel out: the error is that of the bin's mean."""
    correct = torch.tensor([True, True, True, False])
    assert expected_calibration_error(calibration_sums(torch.full((4,), 0.75), correct)) == pytest.approx(0, abs=1e-12)
    confidence = torch.tensor([0.74, 0.76, 0.745, 0.755])
    assert expected_calibration_error(calibration_sums(confidence, correct)) == pytest.approx(0, abs=1e-7)


def test_a_bin_contains_its_upper_edge():
    """Bins are (m / 15, (m + 1) / 15], and the first one contains 0."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    sums = calibration_sums(edges, torch.ones(BINS + 1, dtype=torch.bool))
    assert sums[:, 0].tolist() == [2, *[1] * (BINS - 1)]
    above = calibration_sums(edges[:-1] + 1e-9, torch.ones(BINS, dtype=torch.bool))
    assert above[:, 0].tolist() == [1] * BINS


def test_calibration_equals_an_independent_computation_and_adds_up_over_batches():
    random = np.random.default_rng(0)
    confidence = (0.1 + 0.9 * random.beta(4, 1.5, 1000)).astype(np.float32)
    correct = random.random(1000) < confidence**2
    parts = [slice(0, 7), slice(7, 500), slice(500, 1000)]
    tensors = torch.from_numpy(confidence), torch.from_numpy(correct)
    sums = sum(calibration_sums(tensors[0][part], tensors[1][part]) for part in parts)
    accuracy, mean = calibration_curve(correct, confidence.astype(np.float64), n_bins=BINS)
    filled = sums[sums[:, 0] > 0]
    np.testing.assert_allclose(filled[:, 1] / filled[:, 0], accuracy)
    np.testing.assert_allclose(filled[:, 2] / filled[:, 0], mean)
    bins = np.minimum(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, BINS - 1)
    gaps = [abs(correct[bins == m].mean() - confidence[bins == m].mean()) * (bins == m).mean() for m in set(bins)]
    assert expected_calibration_error(sums) == pytest.approx(sum(gaps), rel=1e-6)
    assert sum(gaps) > 0.01


@pytest.mark.parametrize("metric", BEST_METRICS)
def test_what_is_better(metric):
    """The first result is the best one; an equal one does not replace it; NaN never replaces a number."""
    better, worse = (0.2, 0.3) if metric == "loss" else (0.3, 0.2)
    assert Best(metric, None, 0).is_improved_by(worse)
    assert Best(metric, None, 0).is_improved_by(math.nan)
    assert Best(metric, math.nan, 1).is_improved_by(worse)
    assert Best(metric, worse, 1).is_improved_by(better)
    assert not Best(metric, better, 1).is_improved_by(worse)
    assert not Best(metric, worse, 1).is_improved_by(worse)
    assert not Best(metric, worse, 1).is_improved_by(math.nan)
    rows = [
        {"step": str(step), f"test_{metric}": str(x)} for step, x in enumerate([worse, better, better, worse, "nan"])
    ]
    assert best_of(rows, metric, "test") == Best(metric, better, 1)


def test_what_the_best_weights_have_as_text():
    assert criterion_text("accuracy", 0.975) == "highest accuracy"
    assert criterion_text("balanced_accuracy", 0.975) == "highest balanced accuracy 97.50 %"
    assert criterion_text("macro_f1", 0.975) == "highest macro F1 97.50 %"
    assert criterion_text("loss", 0.0448) == "lowest loss 0.0448"


def test_metrics_suit_json():
    confusion = count(*draw_labels("no images of two classes"))
    assert json.loads(json.dumps(mean_metrics(confusion))) == mean_metrics(confusion)
