"""Pictures of runs: loss and accuracy curves, confusion matrices. Colours that the colour-blind can tell apart."""

import csv

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only; a window is never opened
from matplotlib import pyplot as plt  # noqa: E402

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN, TEST = OKABE_ITO[:2]  # blue and vermilion


def read_metrics(path):
    """The rows of a metrics.csv as {column: list of floats}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def plain(text):
    """A dollar sign begins a formula in matplotlib; names are none."""
    return text.replace("$", r"\$")


def plot_curves(metrics, path, title):
    """Loss and accuracy over the steps, training and test, as a PNG."""
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    few = len(metrics["step"]) < 30
    for name, colour, style in (("train", TRAIN, "--"), ("test", TEST, "-")):
        look = {"color": colour, "linestyle": style, "marker": "o" if few else "", "markersize": 3, "label": name}
        loss.plot(metrics["step"], metrics[f"{name}_loss"], **look)
        accuracy.plot(metrics["step"], [100 * value for value in metrics[f"{name}_accuracy"]], **look)
    loss.set_ylabel("cross-entropy (nats)")
    accuracy.set_ylabel("top-1 accuracy (%)")
    best = max(metrics["test_accuracy"])
    accuracy.set_title(f"best test accuracy {100 * best:.2f} %", fontsize="medium")
    loss.set_title(plain(title), fontsize="medium")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_runs(runs, path, title):
    """Test loss and accuracy of runs over each other, training dashed; {label: [metrics of a seed, ...]}, a PNG.

    Several seeds are drawn as their mean and, for the test set, the range between lowest and highest.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (label, seeds), colour in zip(runs.items(), OKABE_ITO, strict=False):
        steps = seeds[0]["step"]
        for axes, quantity, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            for part, style in (("train", "--"), ("test", "-")):
                values = factor * np.array([metrics[f"{part}_{quantity}"] for metrics in seeds])
                look = {"color": colour, "linestyle": style, "label": label if part == "test" else None}
                axes.plot(steps, values.mean(axis=0), linewidth=1.8 if part == "test" else 1, **look)
                if part == "test" and len(seeds) > 1:
                    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    for axes, name in zip(panels, ("cross-entropy (nats)", "top-1 accuracy (%)"), strict=True):
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="grey", linestyle="--", linewidth=1))
    figure.legend(handles, [*map(plain, labels), "training"], loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(plain(title), fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_confusion_matrix(confusion, classes, path, title):
    """Rows are true classes, columns predictions, each row as a share of its class's images; a PNG."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    few = len(classes) <= 20
    side = min(12.0, 3 + 0.4 * len(classes)) if few else 9
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="share of the true class (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=plain(title))
    if few:
        labels = [plain(name) for name in classes]
        axes.set_xticks(range(len(classes)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), labels)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
