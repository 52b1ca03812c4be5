"""Metrics of a classifier from counts: its confusion matrix, its calibration, and the interval of an accuracy.

A confusion matrix is an int64 tensor (classes, classes): rows are true classes, columns predictions. Names and
definitions are those of scikit-learn with all classes as `labels` and `zero_division=0`. All values are fractions.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch

BINS = 15  # of the confidence, of equal width, as in Guo et al. (2017)
Z = NormalDist().inv_cdf(0.975)  # of an interval that contains the true value with a probability of 95 %


def class_metrics(confusion):
    """{"precision", "recall", "f1": float64 (classes,), "support": int64 (classes,), the images of the class}.

    The recall of a class is its accuracy. A ratio without a denominator is 0.
    """
    correct, support, predicted = confusion.diagonal().double(), confusion.sum(dim=1), confusion.sum(dim=0)
    return {
        "precision": correct / predicted.clamp(min=1),
        "recall": correct / support.clamp(min=1),
        "f1": 2 * correct / (support + predicted).clamp(min=1),
        "support": support,
    }


def mean_metrics(confusion):
    """{"balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"}: means over the classes.

    The balanced accuracy is the mean recall of the classes that have images, the macro recall that of all classes.
    """
    metrics = class_metrics(confusion)
    present = metrics["support"] > 0
    macro = {f"macro_{name}": metrics[name].mean().item() for name in ("precision", "recall", "f1")}
    return {"balanced_accuracy": metrics["recall"][present].mean().item(), **macro}


def frequent_confusions(confusion, count):
    """The `count` most frequent errors: [(true class, predicted class, images), ...], most frequent first."""
    errors = confusion - confusion.diagonal().diag()
    cells = errors.nonzero()
    images = errors[cells[:, 0], cells[:, 1]]
    order = images.argsort(descending=True, stable=True)[:count]
    return [(*cell, number) for cell, number in zip(cells[order].tolist(), images[order].tolist(), strict=True)]


def calibration_sums(confidence, correct):
    """The images of each bin of confidence, float64 (BINS, 3): their number, the correct ones, the sum of confidences.

    `confidence` is the probability of the prediction, float (B,), `correct` is bool (B,). Bin m has the confidences
    above m / BINS up to (m + 1) / BINS. Sums of several batches or processes can be added.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence.double(), edges[1:-1])
    is_in_bin = bins == torch.arange(BINS, device=bins.device)[:, None]
    columns = torch.stack([torch.ones_like(edges[:1]).expand(len(bins)), correct.double(), confidence.double()], dim=1)
    return is_in_bin.double() @ columns


def expected_calibration_error(calibration):
    """The mean difference between confidence and accuracy over the images, from `calibration_sums` (BINS, 3)."""
    count, correct, confidence = calibration.unbind(dim=1)
    return ((correct - confidence).abs().sum() / count.sum()).item()


def wilson_interval(accuracy, count):
    """The 95 % interval (low, high) of an accuracy that was measured on `count` > 0 images (Wilson, 1927)."""
    centre = accuracy + Z**2 / (2 * count)
    half = Z * math.sqrt(accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2))
    low, high = ((centre + sign * half) / (1 + Z**2 / count) for sign in (-1, 1))
    return low if accuracy > 0 else 0.0, high if accuracy < 1 else 1.0  # without rounding errors


def percent(accuracy, count=None):
    """An accuracy as text, with its interval if the number of images is known: "97.50 % [95.32, 98.68]"."""
    if not count or math.isnan(accuracy):
        return f"{100 * accuracy:.2f} %"
    low, high = wilson_interval(accuracy, count)
    return f"{100 * accuracy:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


class BestMetric(NamedTuple):
    """A metric that may choose the best weights; its name is a key in the result of `evaluate`."""

    title: str
    from_confusion: bool = False  # whether it needs the confusion matrix, and two classes to say more than the accuracy
    higher_is_better: bool = True


BEST_METRICS = {
    "accuracy": BestMetric("accuracy"),
    "balanced_accuracy": BestMetric("balanced accuracy", from_confusion=True),
    "macro_f1": BestMetric("macro F1", from_confusion=True),
    "loss": BestMetric("loss", higher_is_better=False),
}


class Best(NamedTuple):
    """The best evaluation of a run so far."""

    metric: str  # one of BEST_METRICS
    value: float | None  # None before the first evaluation
    step: int

    def is_improved_by(self, value):
        """Whether `value` is better. The first one is; an equal one is not, nor is NaN better than a number."""
        if self.value is None or math.isnan(self.value):
            return True
        return value > self.value if BEST_METRICS[self.metric].higher_is_better else value < self.value


def criterion_text(metric, value):
    """What the best weights have, in words: "highest accuracy", or with the value "lowest loss 0.0448"."""
    title, _, higher_is_better = BEST_METRICS[metric]
    text = f"{'highest' if higher_is_better else 'lowest'} {title}"
    return text if metric == "accuracy" else f"{text} {value:.4f}" if metric == "loss" else f"{text} {percent(value)}"


def best_of(rows, metric, evaluated_on):
    """The Best of the rows of a metrics.csv, {column: text}, on a split, the earliest of equal ones."""
    best = Best(metric, None, 0)
    for row in rows:
        value = float(row.get(f"{evaluated_on}_{metric}", "nan"))
        if best.is_improved_by(value):
            best = Best(metric, value, int(row["step"]))
    return best
