"""Figures of runs: which lines, ranges and labels they have."""

import numpy as np
import pytest
import torch

from utils.curves import plot_confusion_matrix, plot_curves, plot_runs


def metrics_of(steps, offset=0.0):
    """Metrics of a run, each column different; `offset` is added to all values."""
    columns = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    values = {name: [0.1 * number + 0.01 * step + offset for step in steps] for number, name in enumerate(columns)}
    return {"step": list(steps), **values}


def test_curves_show_loss_and_accuracy_in_percent():
    figure = plot_curves(metrics_of(range(1, 5)), "run: $x^$")
    figure.canvas.draw()
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


def test_runs_show_the_mean_and_the_test_range_of_their_seeds():
    steps = range(10, 50, 10)
    figure = plot_runs({"one $": [metrics_of(steps)], "three": [metrics_of(steps, offset) for offset in (0, 1, 5)]})
    figure.canvas.draw()
    for axes, factor in zip(figure.axes, (1, 100), strict=True):
        assert len(axes.lines) == 4  # training and test of both
        difference = axes.lines[3].get_ydata() - axes.lines[1].get_ydata()
        np.testing.assert_allclose(difference, factor * 2)  # the mean of 0, 1 and 5
        [shaded] = axes.collections
        heights = shaded.get_paths()[0].vertices[:, 1]
        test = axes.lines[1].get_ydata()
        assert (heights.min(), heights.max()) == (pytest.approx(test.min()), pytest.approx(test.max() + 5 * factor))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one \\$", "three", "training"]


def test_the_confusion_matrix_shows_shares_and_counts():
    confusion = torch.tensor([[3, 1], [0, 0]])  # the second class has no image
    figure = plot_confusion_matrix(confusion, ["cat $", "dog"], "run on pets")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 25], [0, 0]]
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("3", (0, 0)), ("1", (1, 0))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat \\$", "dog"]


def test_a_confusion_matrix_of_many_classes_has_no_class_names():
    figure = plot_confusion_matrix(torch.eye(21, dtype=torch.int64), [f"name {i}" for i in range(21)], "")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert not axes.texts
    assert not any("name" in label.get_text() for label in axes.get_yticklabels())
