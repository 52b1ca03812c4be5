"""Figures of runs: which lines, ranges and labels they have."""

import math
import re

import numpy as np
import pytest
import torch

from utils.curves import MAX_POINTS, plot_confusion_matrix, plot_curves, plot_grid, plot_reliability, plot_runs
from utils.grids import best_point, grid_points
from utils.metrics import calibration_sums, wilson_interval


def metrics_of(steps, offset=0.0, split="test"):
    """Metrics of a run, each column different; `offset` is added to all values."""
    columns = ("train_loss", f"{split}_loss", "train_accuracy", f"{split}_accuracy")
    values = {name: [0.1 * number + 0.01 * step + offset for step in steps] for number, name in enumerate(columns)}
    return {"step": list(steps), **values}


def test_curves_show_loss_and_accuracy_in_percent():
    figure = plot_curves(metrics_of(range(1, 5)), "run: $x^$")
    figure.draw_without_rendering()
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["train", "test"]
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [0.11, 0.12, 0.13, 0.14])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [21, 22, 23, 24])
    assert accuracy.get_title() == "best test accuracy 34.00 %"
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("cross-entropy (nats)", "top-1 accuracy (%)")


@pytest.mark.parametrize("evaluations, marker", [(29, "o"), (30, "None")])
def test_few_evaluations_are_marked(evaluations, marker):
    figure = plot_runs({"run": [metrics_of(range(evaluations))]})
    assert figure.axes[0].lines[0].get_marker() == marker


def measured_at_the_end(steps):
    """Metrics of a run with --test_at_end, whose last row alone has test results; without it if it is interrupted."""
    metrics = metrics_of(steps)
    for name in ("test_loss", "test_accuracy"):
        metrics[name] = [math.nan] * (len(steps) - 1) + metrics[name][-1:]
    return metrics


@pytest.mark.filterwarnings("error")
def test_the_only_test_of_a_run_is_marked_and_not_called_the_best():
    metrics = measured_at_the_end(range(40))
    of_run, of_several = plot_curves(metrics, "run"), plot_runs({"run": [metrics]})
    for figure in (of_run, of_several):
        figure.draw_without_rendering()
        assert [axes.lines[1].get_marker() for axes in figure.axes] == ["o", "o"]
    assert of_run.axes[1].get_title() == "test accuracy 69.00 %"
    interrupted = {name: values[:-1] for name, values in metrics.items()}
    figure = plot_curves(interrupted, "run")
    figure.draw_without_rendering()
    assert figure.axes[1].get_title() == "test accuracy not measured yet"
    plot_runs({"run": [interrupted]}).draw_without_rendering()


def test_the_legend_of_several_runs_names_the_evaluated_split():
    runs = {split: [metrics_of(range(4), split=split)] for split in ("val", "test")}
    for shown, labels in (
        (runs, ["val, validation", "test, test", "training"]),
        ({"val": runs["val"]}, ["val", "training", "validation"]),
    ):
        [legend] = plot_runs(shown).legends
        assert [text.get_text() for text in legend.get_texts()] == labels


def test_runs_show_the_mean_and_the_test_range_of_their_seeds():
    steps = range(10, 50, 10)
    figure = plot_runs({"one $": [metrics_of(steps)], "three": [metrics_of(steps, offset) for offset in (0, 1, 5)]})
    figure.draw_without_rendering()
    for axes, factor in zip(figure.axes, (1, 100), strict=True):
        assert len(axes.lines) == 4  # training and test of both
        difference = axes.lines[3].get_ydata() - axes.lines[1].get_ydata()
        np.testing.assert_allclose(difference, factor * 2)  # the mean of 0, 1 and 5
        [shaded] = axes.collections
        heights = shaded.get_paths()[0].vertices[:, 1]
        test = axes.lines[1].get_ydata()
        assert (heights.min(), heights.max()) == (pytest.approx(test.min()), pytest.approx(test.max() + 5 * factor))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one \\$", "three", "training", "test"]


def grid_figure(grid, metric="accuracy", seeds=(0, 0.1, 0.5)):
    """The figure of a grid whose points have the values 0.1, 0.11, ... plus the `seeds`."""
    points = grid_points(grid)
    values = {point: [0.1 + 0.01 * number + seed for seed in seeds] for number, point in enumerate(points)}
    figure = plot_grid(grid, values, best_point(values, metric), metric, "validation $", "title $")
    figure.draw_without_rendering()
    [axes], [legend] = figure.axes, figure.legends
    return axes, [text.get_text() for text in legend.get_texts()]


def test_a_grid_of_one_flag_has_its_values_on_the_x_axis():
    axes, legend = grid_figure({"lr": [0.03, 0.003, 0.01], "wd": [0.0]})
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "lr", "validation $ (%)")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.03", "0.003", "0.01"]
    [container] = axes.containers
    line, _, (bars,) = container.lines
    np.testing.assert_allclose(line.get_xydata(), [[0.003, 31], [0.01, 32], [0.03, 30]])  # the means
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[11, 61], [12, 62], [10, 60]])
    assert legend == ["mean and range of the seeds", "chosen"]
    assert axes.lines[-1].get_xydata().tolist() == [[0.01, pytest.approx(32)]]
    low, high = axes.get_ylim()
    assert low < 10 and high > 62


def test_the_axis_of_a_grid_is_logarithmic_only_where_numbers_span_a_decade():
    for values, scale in (([1, 2, 9], "linear"), ([1, 10], "log"), ([0.0, 0.001, 0.1], "symlog"), ([0, 5], "linear")):
        axes, _ = grid_figure({"flag": values}, "loss")
        assert (axes.get_xscale(), axes.get_ylabel()) == (scale, "validation $ (nats)")


def test_the_second_flag_of_a_grid_has_one_line_per_value():
    axes, legend = grid_figure({"optimizer": ["sgd", "a/b $"], "flip": [True, False], "lr": [0.1]}, seeds=(0,))
    assert legend == ["true", "false", "chosen"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["sgd", "a/\nb \\$"]
    lines = [container.lines[0] for container in axes.containers]
    assert [line.get_linestyle() for line in lines] == ["None", "None"]  # values without an order
    np.testing.assert_allclose([line.get_xydata()[:, 1] for line in lines], [[10, 12], [11, 13]])
    assert all(container.lines[2] == () for container in axes.containers)  # a single seed has no range


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_grid_of_more_flags_ranks_its_points(metric):
    axes, legend = grid_figure({"a": [1, 2], "b": [(2, 9), (2, 15)], "c": [0.5], "d": list(range(20))}, metric)
    assert legend == ["mean and range of the seeds", "chosen"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == MAX_POINTS
    assert labels[0] == ("a 2, b 2 15, d 19" if metric == "accuracy" else "a 1, b 2 9, d 0")
    assert axes.yaxis_inverted()
    assert axes.lines[-1].get_ydata().tolist() == [0]
    assert axes.get_xlabel().endswith(", the best 50 of 80")


def test_the_confusion_matrix_shows_shares_and_counts():
    confusion = torch.tensor([[3, 1], [0, 0]])  # the second class has no image
    figure = plot_confusion_matrix(confusion, ["cat $", "dog"], "run on pets")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 25], [0, 0]]
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("3", (0, 0)), ("1", (1, 0))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat \\$", "dog"]


def test_a_confusion_matrix_of_many_classes_has_neighbours_that_are_confused():
    """21 classes, of which c is confused with c + 10: names without counts, and all confusions next to the diagonal."""
    confusion = 8 * torch.eye(21, dtype=torch.int64)
    for first in range(10):
        confusion[first, first + 10] = confusion[first + 10, first] = 2
    figure = plot_confusion_matrix(confusion, [f"${i} {'x' * 30}" for i in range(21)], "")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert not axes.texts
    drawn = np.asarray(axes.images[0].get_array())
    rows, columns = drawn.nonzero()
    assert np.abs(rows - columns).max() == 1
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    numbers = [int(re.fullmatch(r"\\\$(\d+) x+\.\.\.", name)[1]) for name in names]
    expected = 100 * (confusion / confusion.sum(dim=1, keepdim=True))[numbers][:, numbers]
    np.testing.assert_allclose(drawn, expected)  # each cell stands at the names of its classes


def test_a_confusion_matrix_of_a_thousand_classes_shows_each_confusion():
    """A cell has the highest share of 4 x 4 classes, so a single confusion of two distant classes is not lost."""
    confusion = 50 * torch.eye(1000, dtype=torch.int64)
    for first in (0, 500):  # two groups of eight similar classes
        group = slice(first, first + 8)
        confusion[group, group] = 2 + 34 * torch.eye(8, dtype=torch.int64)
    confusion[3, 3], confusion[3, 503] = 35, 1
    confusion[900] = 0  # no image
    figure = plot_confusion_matrix(confusion, [f"class {i}" for i in range(1000)], "")
    figure.draw_without_rendering()
    drawn = np.asarray(figure.axes[0].images[0].get_array()).round(6)
    assert drawn.shape == (250, 250)
    assert (drawn == 2).sum() == 1
    assert set(drawn.ravel()) == {0, 2, 4, 72, 100}
    assert (drawn.diagonal() >= 72).all()
    assert len(figure.axes[0].get_yticks()) <= 100
    assert figure.axes[1].get_ylabel() == "share of the true class (%), highest of 4 x 4 classes"


def test_the_reliability_diagram_shows_accuracy_intervals_and_shares():
    confidence = torch.tensor([0.9] * 30 + [0.5] * 10)
    correct = torch.tensor([True] * 21 + [False] * 9 + [True] * 6 + [False] * 4)
    figure = plot_reliability(calibration_sums(confidence, correct), "run $")
    figure.draw_without_rendering()
    upper, lower = figure.axes
    assert upper.get_title() == "run \\$\nexpected calibration error 17.50 %"
    accuracy, bars = upper.containers
    assert [patch.get_height() for patch in accuracy] == pytest.approx([60, 70])
    assert [patch.get_x() for patch in accuracy] == pytest.approx([100 * 7 / 15, 100 * 13 / 15])
    assert [patch.get_height() for patch in lower.containers[0]] == pytest.approx([25, 75])
    np.testing.assert_allclose(bars.lines[0].get_xdata(), [50, 90], rtol=1e-6)
    [segments] = bars.lines[2]
    ends = [segment[:, 1] for segment in segments.get_segments()]
    np.testing.assert_allclose(ends, [[100 * x for x in wilson_interval(*pair)] for pair in ((0.6, 10), (0.7, 30))])
