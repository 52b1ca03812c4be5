"""The figure of few-shot accuracies."""

import numpy as np
from matplotlib.figure import Figure

from utils.figures import OKABE_ITO, style_axes, wrap_text


def plot_over_images(accuracies, title, split):
    """Accuracy on a split over the training images per class: a line per contender, the mean over the seeds.

    `accuracies` are {contender: {images per class: {seed: accuracy}}}; a band is the range over the seeds.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for colour, (name, of_counts) in zip(OKABE_ITO, accuracies.items(), strict=False):
        values = [100 * np.array(list(of_seeds.values())) for of_seeds in of_counts.values()]
        lowest, means, highest = ([summary(of_count) for of_count in values] for summary in (np.min, np.mean, np.max))
        axes.plot(list(of_counts), means, marker="o", markersize=4, color=colour, label=name)
        axes.fill_between(list(of_counts), lowest, highest, color=colour, alpha=0.2, lw=0)
    counts = sorted(set().union(*accuracies.values()))
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="training images per class", ylabel=f"{split} accuracy (%)")
    style_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(wrap_text(title, 90), fontsize="medium")
    return figure
