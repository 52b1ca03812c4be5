"""The figure of a study's group: accuracy over epochs, over FLOPs and over time."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.figures import OKABE_ITO, escape_math, style_axes, wrap_text
from utils.study_tables import (
    NO_TIMES,
    accuracies_of,
    by_contender,
    epochs_of,
    training_flops,
)

LEGEND_CHARACTERS = 11  # per inch


def plot_budgets(records, title, order=(), times=NO_TIMES):
    """Training accuracy of final runs of one group over three budgets, and the test accuracy as points at the end.

    Lines are means over the seeds, shaded from lowest to highest. Runs that diverged are omitted. Without the Times of
    all contenders that are trained there is no panel of time.
    """
    contenders = by_contender([record for record in records if not record["diverged"]], order)
    budgets = {
        "epochs": lambda of_name: epochs_of(of_name[0]),
        "training FLOPs": lambda of_name: training_flops(of_name[0]),
    }
    trained = {name for name, of_name in contenders.items() if of_name[0]["num_steps"]}
    if trained <= times.seconds.keys():
        budgets[f"minutes, {times.origin}"] = times.minutes
    figure = Figure(figsize=(4.2 * len(budgets), 4 + 0.2 * len(contenders)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True)
    for axes, (label, budget_of) in zip(panels, budgets.items(), strict=True):
        for number, of_name in enumerate(contenders.values()):
            draw_contender(axes, of_name, budget_of(of_name), OKABE_ITO[number % len(OKABE_ITO)])
        axes.set_xlabel(wrap_text(label, 40))
        axes.set_xlim(left=0)
        style_axes(axes)
    panels[0].set_ylabel("accuracy (%)")
    handles = [Line2D([], [], color=OKABE_ITO[i % len(OKABE_ITO)], linewidth=1.8) for i in range(len(contenders))]
    handles += [Line2D([], [], color="grey"), Line2D([], [], color="grey", marker="o", linestyle="none")]
    labels = [*map(escape_math, contenders), "training", "test (each seed)"]
    columns = int(LEGEND_CHARACTERS * figure.get_figwidth() / (6 + max(map(len, labels))))  # 6 for line and space
    columns = max(1, min(len(labels), columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(wrap_text(title, 110), fontsize="medium")
    return figure


def draw_contender(axes, records, budget, colour):
    """The runs of one contender, whose last step is at x = `budget`."""
    x = budget * np.array(records[0]["metrics"]["step"]) / records[0]["num_steps"]
    training = 100 * np.array([record["metrics"]["train_accuracy"] for record in records])
    axes.plot(x, training.mean(axis=0), color=colour, linewidth=1.8)
    if len(records) > 1:
        axes.fill_between(x, training.min(axis=0), training.max(axis=0), color=colour, alpha=0.2, lw=0)
    tests = [100 * accuracy for accuracy in accuracies_of(records).values()]
    axes.plot([budget] * len(tests), tests, "o", color=colour, markersize=4, clip_on=False)
