"""Figures of runs: curves over the steps, grids of flags, confusion matrix, calibration, wrong predictions.

Each `plot_...` function returns a Figure.
"""

import math
import statistics

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from utils.data.splits import NAMES, evaluated_split
from utils.figures import OKABE_ITO, TEST, TRAIN, escape_math, style_axes, wrap_text
from utils.grids import value_text
from utils.metrics import BEST_METRICS, expected_calibration_error, percent, wilson_interval

FEW_POINTS = 30  # below this many evaluations each one has a marker
FEW_CLASSES = 20  # up to this many classes the confusion matrix shows counts
MAX_CELLS = 250  # rows of a confusion matrix that can be told apart
MAX_LABELS = 100  # class names at an axis
MAX_POINTS = 50  # of a grid, one below the other
MARKERS = ("o", "s", "^", "D")
BARS = "mean and range of the seeds"
SHIFT = 0.06  # inches between the lines of a grid
RING = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none"}


def plot_curves(metrics, title):
    """Loss and accuracy of one run over the steps, of training and evaluation; `metrics` is {column: values}."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    split = evaluated_split(metrics)
    for name, colour, line in (("train", TRAIN, "--"), (split, TEST, "-")):
        style = {"color": colour, "linestyle": line, "label": name, **markers(metrics[f"{name}_accuracy"])}
        loss.plot(metrics["step"], metrics[f"{name}_loss"], **style)
        accuracy.plot(metrics["step"], [100 * value for value in metrics[f"{name}_accuracy"]], **style)
    accuracy.set_title(accuracy_text(split, metrics[f"{split}_accuracy"]), fontsize="medium")
    loss.set_title(escape_math(title), fontsize="medium")
    label_curves(loss, accuracy)
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    return figure


def markers(values):
    """The style of a line with these values: a marker at each, unless there are many."""
    return {"marker": "o", "markersize": 3} if np.isfinite(values).sum() < FEW_POINTS else {}


def accuracy_text(split, accuracies):
    """The best accuracy on a split, or the only one of --test_at_end; those that were not measured are NaN."""
    measured = [accuracy for accuracy in accuracies if not math.isnan(accuracy)]
    if not measured:
        return f"{NAMES[split]} accuracy not measured yet"
    best = "best " if len(measured) == len(accuracies) else ""
    return f"{best}{NAMES[split]} accuracy {100 * max(measured):.2f} %"


def plot_runs(runs, title=""):
    """Loss and accuracy of several runs in one figure, training dashed; {label: [metrics of each seed, ...]}.

    Several seeds are drawn as their mean; for the evaluated split the range from lowest to highest is shaded. If the
    runs were evaluated on different splits, the labels name them.
    """
    figure = Figure(figsize=(10, 4 + 0.2 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 2)
    splits = [NAMES[evaluated_split(seeds[0])] for seeds in runs.values()]
    if len(set(splits)) > 1:
        runs = {f"{label}, {split}": seeds for split, (label, seeds) in zip(splits, runs.items(), strict=True)}
    for number, (label, seeds) in enumerate(runs.items()):
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        for axes, quantity, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
            plot_seeds(axes, seeds, quantity, factor, colour, label)
    label_curves(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    lines = {NAMES["train"]: "--"} if len(set(splits)) > 1 else {NAMES["train"]: "--", splits[0]: "-"}
    handles += [Line2D([], [], color="grey", linestyle=line, linewidth=1) for line in lines.values()]
    columns = min(len(handles), max(1, 100 // max(map(len, labels))))
    labels = [*map(escape_math, labels), *lines]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(escape_math(title), fontsize="medium")
    return figure


def plot_seeds(axes, seeds, quantity, factor, colour, label):
    """Draw one quantity, "loss" or "accuracy", of the runs of all seeds, multiplied by `factor`."""
    steps = seeds[0]["step"]
    parts = ("train", evaluated_split(seeds[0]))
    train, evaluated = (factor * np.array([run[f"{part}_{quantity}"] for run in seeds]) for part in parts)
    train_mean, mean = train.mean(axis=0), evaluated.mean(axis=0)
    axes.plot(steps, train_mean, color=colour, linestyle="--", linewidth=1, **markers(train_mean))
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=label, **markers(mean))
    if len(seeds) > 1:
        axes.fill_between(steps, evaluated.min(axis=0), evaluated.max(axis=0), color=colour, alpha=0.2, lw=0)


def label_curves(loss, accuracy):
    """Axis labels, ticks and grid of a panel of losses and one of accuracies."""
    loss.set_ylabel("cross-entropy (nats)")
    accuracy.set_ylabel("top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))  # labels of five digits must not touch
        axes.yaxis.get_major_formatter().set_useOffset(False)
        style_axes(axes)


def plot_grid(grid, values, chosen, metric, what, title):
    """A metric, called `what`, of runs with several values of some flags: its mean and range over the seeds.

    `grid` is {flag: values}, `values` is {point: [metric of each seed]}, where a point has a value of each flag, and
    `chosen` is the best point. One flag with several values is the x axis, the values of a second one are lines. With
    more of them the points are sorted by their mean.
    """
    factor, unit = (1, " (nats)") if metric == "loss" else (100, " (%)")
    varied = [number for number, name in enumerate(grid) if len(grid[name]) > 1] or [0]
    label = f"{what}{unit}"
    summaries = {
        point: tuple(factor * summary(of_point) for summary in (statistics.mean, min, max))
        for point, of_point in values.items()
    }
    if len(varied) > 2:
        figure = ranked_points(grid, varied, summaries, chosen, BEST_METRICS[metric].higher_is_better, label)
    else:
        figure = lines_of_points(grid, varied, summaries, chosen, label)
    figure.suptitle(wrap_text(title, 80), fontsize="medium")
    return figure


def lines_of_points(grid, varied, summaries, chosen, label):
    """The means over the values of the flag `varied[0]`, one line per value of the flag `varied[1]` if there is one.

    Values that are not numbers are not connected. Lines are shifted a little, so that no bar covers another.
    """
    names = list(grid)
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    place, is_numeric = label_values(axes, grid[names[varied[0]]])
    axes.set(xlabel=names[varied[0]], ylabel=label)
    lines = grid[names[varied[1]]] if len(varied) > 1 else [None]
    has_bars = any(low < high for _, low, high in summaries.values())
    for number, value in enumerate(lines):
        points = [point for point in summaries if value is None or repr(point[varied[1]]) == repr(value)]
        points.sort(key=lambda point: place[value_text(point[varied[0]])])
        if not points:
            continue
        x = [place[value_text(point[varied[0]])] for point in points]
        mean, low, high = np.array([summaries[point] for point in points]).T
        shift = ScaledTranslation(SHIFT * (number - (len(lines) - 1) / 2), 0, figure.dpi_scale_trans)
        style = {
            "color": OKABE_ITO[number % len(OKABE_ITO)],
            "marker": MARKERS[number // len(OKABE_ITO) % len(MARKERS)],
        }
        style |= {"linestyle": "-" if is_numeric else "none", "capsize": 3, "transform": axes.transData + shift}
        text = wrap_text(value_text(value), 30) if len(varied) > 1 else BARS if has_bars else None
        axes.errorbar(x, mean, (mean - low, high - mean) if has_bars else None, label=text, **style)
        axes.update_datalim([*zip(x, low, strict=True), *zip(x, high, strict=True)])  # shifted artists are not counted
        if chosen in points:
            spot = [x[points.index(chosen)]], [summaries[chosen][0]]
            axes.plot(*spot, label="chosen", transform=axes.transData + shift, **RING)
    axes.margins(0.08)
    if not is_numeric:
        axes.set_xlim(-0.5, len(place) - 0.5)
    style_axes(axes)
    legend_below(figure, axes, names[varied[1]] if len(varied) > 1 else "")
    return figure


def label_values(axes, values):
    """Label the x axis with the values of a flag; returns ({value as text: its place}, whether they are numbers).

    Numbers that span a decade or more are on a logarithmic axis, on which 0 is left of the smallest.
    """
    texts = [value_text(value) for value in values]
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = values if is_numeric else range(len(values))
    positive = [value for value in places if value > 0]
    if is_numeric and positive and max(positive) / min(positive) > 9.99:
        if 0 in values:
            axes.set_xscale("symlog", linthresh=min(positive))
        else:
            axes.set_xscale("log")
    lines = [wrap_text(text.replace("/", "/\n"), 18) for text in texts]
    crowded = sum(max(map(len, text.splitlines())) for text in lines) > 60
    axes.set_xticks(places, lines, **({"rotation": 30, "ha": "right"} if crowded else {}))
    axes.minorticks_off()
    return dict(zip(texts, places, strict=True)), is_numeric


def ranked_points(grid, varied, summaries, chosen, higher_is_better, label):
    """The means of all points, or of the MAX_POINTS best, one below the other, the best first."""
    order = sorted(summaries, key=lambda point: summaries[point][0], reverse=higher_is_better)
    shown, names = order[:MAX_POINTS], list(grid)
    texts = [", ".join(f"{names[i]} {shorten(value_text(point[i]), 40)}" for i in varied) for point in shown]
    figure = Figure(figsize=(4.5 + 0.07 * max(map(len, texts)), 1.5 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    mean, low, high = np.array([summaries[point] for point in shown]).T
    bars = {"xerr": (mean - low, high - mean), "label": BARS} if (low < high).any() else {}
    axes.errorbar(mean, np.arange(len(shown)), fmt="o", color=TRAIN, capsize=3, **bars)
    axes.plot(summaries[chosen][0], shown.index(chosen), label="chosen", **RING)
    axes.set_yticks(range(len(shown)), map(escape_math, texts), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(label if len(shown) == len(order) else f"{label}, the best {len(shown)} of {len(order)}")
    style_axes(axes)
    legend_below(figure, axes)
    return figure


def legend_below(figure, axes, title=""):
    """A legend below the panel, in which the chosen point is the last entry."""
    entries = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == "chosen")
    columns = max(1, min(len(entries), 60 // max(len(text) for _, text in entries)))
    style = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(*zip(*entries, strict=True), title=escape_math(title), **style)


def plot_confusion_matrix(confusion, classes, title):
    """Rows are true classes, columns are predictions; each row is a share of the images of its class.

    `confusion` is an int64 tensor (classes, classes) of counts. With more than FEW_CLASSES classes, those that are
    confused with each other are neighbours, and the colours show small shares too. With more than MAX_CELLS, a cell
    shows the highest share among several neighbours.
    """
    shares = 100 * (confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    few = len(classes) <= FEW_CLASSES
    order = np.arange(len(classes)) if few else similar_together(shares)
    group = math.ceil(len(classes) / MAX_CELLS)
    starts = np.arange(0, len(classes), group)
    cells = shares[np.ix_(order, order)]
    cells = np.maximum.reduceat(np.maximum.reduceat(cells, starts, axis=0), starts, axis=1)
    side = min(14.0, 3 + (0.4 if few else 0.11) * len(cells))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(cells, cmap="Blues", norm=PowerNorm(1 if few else 0.5, vmin=0, vmax=100))
    of_several = f", highest of {group} x {group} classes" if group > 1 else ""
    figure.colorbar(drawn, ax=axes, label=f"share of the true class (%){of_several}", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=escape_math(title))
    label_classes(axes, [classes[index] for index in order[starts]], few)
    if few:
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    return figure


def similar_together(shares):
    """An order of the classes in which those that are often confused are neighbours, by average linkage.

    `shares` are percentages (classes, classes), rows are true classes.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # slow imports that other figures do not need
    from scipy.spatial.distance import squareform

    distances = 100 - (shares + shares.T) / 2
    np.fill_diagonal(distances, 0)
    return leaves_list(linkage(squareform(distances), method="average"))


def label_classes(axes, names, few):
    """Names at both axes, at most MAX_LABELS of them."""
    ticks = np.arange(0, len(names), math.ceil(len(names) / MAX_LABELS))
    labels = [escape_math(names[tick] if few else shorten(names[tick])) for tick in ticks]
    style = {} if few else {"fontsize": 7}
    axes.set_xticks(ticks, labels, rotation=45 if few else 90, ha="right" if few else "center", **style)
    axes.set_yticks(ticks, labels, **style)


def shorten(name, length=24):
    """A name of at most `length` characters."""
    return name if len(name) <= length else f"{name[: length - 3].rstrip()}..."


def plot_reliability(calibration, title):
    """The accuracy of the images in each bin of confidence, and below it the share of the images in the bin.

    `calibration` is the tensor (BINS, 3) of `calibration_sums`. Error bars are 95 % intervals; a well calibrated model
    is on the diagonal.
    """
    count, correct, confidence = calibration.numpy().T
    filled = count > 0
    count, centres = count[filled], ((np.arange(len(filled)) + 0.5) / len(filled))[filled]
    accuracy, mean = correct[filled] / count, confidence[filled] / count
    intervals = np.array([wilson_interval(*pair) for pair in zip(accuracy.tolist(), count.tolist(), strict=True)])
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 100 / len(filled)
    upper.bar(100 * centres, 100 * accuracy, width, color=TRAIN, alpha=0.35, edgecolor="white", label="accuracy")
    upper.plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1, label="perfect calibration")
    bars = 100 * np.abs(intervals.T - accuracy)
    upper.errorbar(
        100 * mean,
        100 * accuracy,
        bars,
        fmt="o",
        color=TEST,
        markersize=4,
        capsize=2,
        label="95 % interval, at the mean confidence",
    )
    lower.bar(100 * centres, 100 * count / count.sum(), width, color=TRAIN, alpha=0.35, edgecolor="white")
    error = expected_calibration_error(calibration)
    upper.set_title(f"{escape_math(title)}\nexpected calibration error {100 * error:.2f} %", fontsize="medium")
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 101))
    lower.set(xlabel="confidence (%)", ylabel="images (%)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", columnspacing=1, frameon=False)
    for axes in (upper, lower):
        style_axes(axes)
    return figure


def plot_mistakes(images, captions, title, columns=6):
    """A grid of images in squares of one size, each with its true class, the prediction and the name of its file.

    `images` are uint8 (3, H, W) of any sizes, `captions` (true class, predicted class, confidence, name).
    """
    rows, columns = math.ceil(len(images) / columns), max(3, min(columns, len(images)))
    texts = [
        (wrap_text(f"true: {shorten(true, 60)}\npredicted: {shorten(predicted, 60)}\n{percent(confidence)}", 27), name)
        for true, predicted, confidence, name in captions
    ]
    lines = max((text.count("\n") + 1 for text, _ in texts), default=0)
    figure = Figure(figsize=(0.3 + 2 * columns, 0.7 + (2.4 + 0.17 * lines) * rows), layout="constrained")
    for number, (image, (text, name)) in enumerate(zip(images, texts, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, number)
        (height, width), side = image.shape[1:], max(image.shape[1:])
        axes.imshow(image.permute(1, 2, 0).numpy(), extent=(-width / 2, width / 2, height / 2, -height / 2))
        axes.set(xlim=(-side / 2, side / 2), ylim=(side / 2, -side / 2), xticks=[], yticks=[], facecolor="0.95")
        axes.spines[:].set_visible(False)
        axes.set_title(text, fontsize="small", loc="left")
        axes.set_xlabel(escape_math(shorten(name, 30)), fontsize="x-small", color="0.4", loc="left")
    figure.suptitle(wrap_text(title, 24 * columns), fontsize="medium")
    return figure
