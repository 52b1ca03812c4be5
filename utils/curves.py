"""Figures of runs: their loss and accuracy over the steps, and a confusion matrix. Each function returns a Figure."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.figures import OKABE_ITO, TEST, TRAIN, escape_math, style_axes

FEW_POINTS = 30  # below this many evaluations each one has a marker
FEW_CLASSES = 20  # up to this many classes the confusion matrix shows their names and counts


def plot_curves(metrics, title):
    """Loss and accuracy of one run over the steps, training and test; `metrics` is {column: values}."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(metrics["step"]) < FEW_POINTS else ""
    for name, colour, line in (("train", TRAIN, "--"), ("test", TEST, "-")):
        style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3, "label": name}
        loss.plot(metrics["step"], metrics[f"{name}_loss"], **style)
        accuracy.plot(metrics["step"], [100 * value for value in metrics[f"{name}_accuracy"]], **style)
    best = max(metrics["test_accuracy"])
    accuracy.set_title(f"best test accuracy {100 * best:.2f} %", fontsize="medium")
    loss.set_title(escape_math(title), fontsize="medium")
    label_curves(loss, accuracy)
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    return figure


def plot_runs(runs, title=""):
    """Test loss and accuracy of several runs in one figure, training dashed; {label: [metrics of each seed, ...]}.

    Several seeds are drawn as their mean; for the test set the range from lowest to highest is shaded.
    """
    figure = Figure(figsize=(10, 4 + 0.2 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (label, seeds) in enumerate(runs.items()):
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        for axes, quantity, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            plot_seeds(axes, seeds, quantity, factor, colour, label)
    label_curves(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1))
    columns = min(len(handles), max(1, 100 // max(map(len, labels))))
    labels = [*map(escape_math, labels), "training"]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(escape_math(title), fontsize="medium")
    return figure


def plot_seeds(axes, seeds, quantity, factor, colour, label):
    """Draw one quantity, "loss" or "accuracy", of the runs of all seeds, multiplied by `factor`."""
    steps = seeds[0]["step"]
    markers = {"marker": "o", "markersize": 3} if len(steps) < FEW_POINTS else {}
    train, test = (factor * np.array([run[f"{part}_{quantity}"] for run in seeds]) for part in ("train", "test"))
    axes.plot(steps, train.mean(axis=0), color=colour, linestyle="--", linewidth=1, **markers)
    axes.plot(steps, test.mean(axis=0), color=colour, linewidth=1.8, label=label, **markers)
    if len(seeds) > 1:
        axes.fill_between(steps, test.min(axis=0), test.max(axis=0), color=colour, alpha=0.2, lw=0)


def label_curves(loss, accuracy):
    """Axis labels, ticks and grid of a panel of losses and one of accuracies."""
    loss.set_ylabel("cross-entropy (nats)")
    accuracy.set_ylabel("top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))  # labels of five digits must not touch
        axes.yaxis.get_major_formatter().set_useOffset(False)
        style_axes(axes)


def plot_confusion_matrix(confusion, classes, title):
    """Rows are true classes, columns are predictions; each row is a share of the images of its class.

    `confusion` is an int64 tensor (classes, classes) of counts.
    """
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    few = len(classes) <= FEW_CLASSES
    side = min(12.0, 3 + 0.4 * len(classes)) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(drawn, ax=axes, label="share of the true class (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=escape_math(title))
    if few:
        labels = [escape_math(name) for name in classes]
        axes.set_xticks(range(len(classes)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), labels)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    return figure
