"""Pictures of runs: loss and accuracy curves, confusion matrices. Colours that the colour-blind can tell apart."""

import csv

import matplotlib

matplotlib.use("Agg")  # files only; a window is never opened
from matplotlib import pyplot as plt  # noqa: E402

TRAIN, TEST = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito's palette


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
