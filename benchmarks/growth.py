"""How images/s and memory of a ViT grow with batch size, resolution and model size: a table and a figure.

For the memory of a training step a lower bound is counted: weights, gradients, optimizer state, and the activations
that the backward pass needs, with and without --grad_checkpointing. On a GPU the allocator's peak is reported as well.

    python benchmarks/growth.py --figure img/growth.png                       # on two CPU cores
    python benchmarks/growth.py --model_type ViT-B_16 --batch_size 64 --batch_sizes 1 16 64 256 512 --figure gpu.png
"""

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter
from steps import (
    FORWARD,
    NUM_CLASSES,
    TRAINING,
    add_clock_flag,
    add_step_flags,
    check_precision,
    clock_of,
    fits,
    forward_flops,
    free_memory,
    machine,
    our_step,
    precision_text,
    random_batch,
    state_bytes,
    training_memory,
)

from inference import make_model
from models.configs import VITS
from utils.checks import check_figure_path
from utils.errors import run_script
from utils.figures import OKABE_ITO, save, style_axes, wrap_text
from utils.flag_types import Parser, one_of, positive
from utils.parallel.processes import choose_device
from utils.profiling import activation_bytes, markdown_table, speed_cells, time_interleaved

MODELS = ("ViT-Ti_16", "ViT-S_16", "ViT-B_16", "ViT-L_16")
CHECKPOINTING = "with --grad_checkpointing"
PARTS = ("weights", "gradients", "optimizer", "activations")
COLOURS = dict(zip(PARTS, (*OKABE_ITO[3:6], "#999999"), strict=True))


class Point(NamedTuple):
    """The setting of one measurement."""

    model_type: str
    img_size: int
    batch_size: int


class Measured(NamedTuple):
    """One measurement: time and memory of the passes."""

    seconds: dict  # {pass: [seconds of each round]}
    floor: dict  # {TRAINING or CHECKPOINTING: {part: bytes}}
    peak: dict  # {TRAINING or CHECKPOINTING: bytes} on a GPU


def main():
    args = parse_flags()
    device = choose_device()
    check_precision(args.precision, device)
    clock_of(args, device)
    panels = panels_of(args)
    points = list(dict.fromkeys(point for panel in panels.values() for point in panel))
    for point in points:
        forward_flops(point.model_type, point.img_size)  # reports a wrong size before the work
    measured = {point: measure(point, args, device) for point in points}
    measured = {point: found for point, found in measured.items() if found}
    title = (
        "training step and forward pass, "
        f"{precision_text(args.precision, [args.fp16_opt_level], args.compile)}\n{machine()}, median of {args.rounds} "
        f"rounds{', by processor time' if args.processor_time else ''}"
    )
    print(f"{title}\n\n{table(measured)}")
    if args.figure:
        save(draw(panels, measured, title), args.figure)


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    model = one_of("ViT", VITS)
    group.add_argument(
        "--model_type", type=model, default="ViT-S_16", metavar="NAME", help="The ViT for batch size and resolution."
    )
    group.add_argument(
        "--model_types", type=model, nargs="+", default=MODELS, metavar="NAME", help="The ViTs for model size."
    )
    add_step_flags(group, batch_size=4, rounds=3)
    add_clock_flag(group)
    several = {"type": positive, "nargs": "+", "metavar": "N"}
    group.add_argument("--batch_sizes", default=[1, 2, 4, 8, 16], help="Batch sizes at --img_size.", **several)
    group.add_argument("--img_sizes", default=[224, 384, 512], help="Resolutions at --batch_size.", **several)
    group.add_argument("--figure", metavar="PNG", help="Draw this figure.")
    args = parser.parse_args()
    if args.figure:
        check_figure_path(args.figure, "--figure")
    return args


def panels_of(args):
    """{title of a panel: {Point: label of its tick}}"""
    return {
        f"batch size ({args.model_type} at {args.img_size})": {
            Point(args.model_type, args.img_size, size): str(size) for size in args.batch_sizes
        },
        f"resolution ({args.model_type}, batch {args.batch_size})": {
            Point(args.model_type, size, args.batch_size): str(size) for size in args.img_sizes
        },
        f"model (at {args.img_size}, batch {args.batch_size})": {
            Point(model_type, args.img_size, args.batch_size): model_type for model_type in args.model_types
        },
    }


def measure(point, args, device):
    """Measured, or None where the memory of a GPU is too small."""
    images, labels = random_batch(point.batch_size, point.img_size, device)
    functions, floor, peak = {}, {}, {}
    for name in (TRAINING, CHECKPOINTING):
        torch.manual_seed(0)
        model = make_model(point.model_type, point.img_size, NUM_CLASSES)
        level, checkpointing = args.fp16_opt_level, name == CHECKPOINTING
        step = our_step(model, device, args.precision, level, args.compile, grad_checkpointing=checkpointing)
        if not fits(step, images, labels):
            return None
        functions[name] = lambda step=step: step.train(images, labels)
        if name == TRAINING:
            functions[FORWARD] = lambda step=step: step.forward(images)
        kept = activation_bytes(model, functions[name])
        if name == CHECKPOINTING:  # plus those of one block while it is computed again
            kept += (floor[TRAINING]["activations"] - kept) // len(model.blocks)
        floor[name] = {**state_bytes(step), "activations": kept}
        if device.type == "cuda":
            peak[name] = training_memory(step, images, labels)
        free_memory()
    return Measured(time_interleaved(functions, args.rounds, device, clock_of(args, device)), floor, peak)


def table(measured):
    """Markdown: one row per point and pass; memory in MiB."""
    on_gpu = any(found.peak for found in measured.values())
    titles = ["model", "image size", "batch", "step", "images/s", "slowest to fastest round"]
    titles += [f"{part} (MiB)" for part in PARTS] + ["floor (MiB)"]
    titles += ["peak (MiB)", "peak / floor"] if on_gpu else []
    rows = []
    for point, found in measured.items():
        for name in (FORWARD, TRAINING, CHECKPOINTING):
            cells = [*map(str, point), name, *speed_cells(point.batch_size, found.seconds[name])]
            if name in found.floor:
                floor = sum(found.floor[name].values())
                cells += [mebibytes(found.floor[name][part]) for part in PARTS] + [mebibytes(floor)]
                if on_gpu:
                    cells += [mebibytes(found.peak[name]), f"{found.peak[name] / floor:.2f}"]
            rows.append(cells + [""] * (len(titles) - len(cells)))
    return markdown_table(titles, rows)


def mebibytes(count):
    return f"{count / 2**20:,.0f}"


def draw(panels, measured, title):
    """images/s above the memory of a training step, with one column per panel."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    rows = figure.subplots(2, len(panels))
    for (panel, ticks), speeds, memory in zip(panels.items(), *rows, strict=True):
        points = {point: tick for point, tick in ticks.items() if point in measured}
        draw_speeds(speeds, [(point.batch_size, measured[point].seconds) for point in points])
        draw_memory(memory, [measured[point] for point in points])
        for axes in (speeds, memory):
            axes.set_xticks(range(len(points)), points.values())
            axes.set_xlim(-0.6, len(points) - 0.4)
            style_axes(axes)
        memory.set_xlabel(panel)
    rows[0, 0].set_ylabel("images/s")
    rows[1, 0].set_ylabel("memory of a training step (GiB)")
    lines = rows[0, 0].get_legend_handles_labels()[0]
    parts = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    hatched = Patch(facecolor="white", edgecolor="grey", hatch="////", label=CHECKPOINTING)
    peaks = rows[1, 0].get_legend_handles_labels()[0]
    figure.legend(handles=[*lines, *parts, hatched, *peaks], loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(wrap_text(title, 130), fontsize="medium")
    return figure


def draw_speeds(axes, points):
    """`points` are (batch size, {pass: seconds}); error bars range from the slowest to the fastest round."""
    for name, colour, marker in zip((FORWARD, TRAINING, CHECKPOINTING), OKABE_ITO, "os^", strict=False):
        rounds = np.array([batch / np.array(seconds[name]) for batch, seconds in points])  # (points, rounds)
        low, y, high = rounds.min(axis=1), np.median(rounds, axis=1), rounds.max(axis=1)
        axes.errorbar(range(len(points)), y, (y - low, high - y), marker=marker, color=colour, capsize=3, label=name)
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axes.grid(which="minor", alpha=0.15)


def draw_memory(axes, points):
    """Two bars per point with stacked parts, the second with checkpointing; a line across a bar is a GPU's peak."""
    for place, found in enumerate(points):
        for name, shift, hatch in ((TRAINING, -0.2, None), (CHECKPOINTING, 0.2, "////")):
            bottom = 0.0
            for part, colour in COLOURS.items():
                height = found.floor[name][part] / 2**30
                axes.bar(place + shift, height, 0.36, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
                bottom += height
            if name in found.peak:
                label = "the allocator's peak" if (place, name) == (0, TRAINING) else None
                ends = (place + shift - 0.18, place + shift + 0.18)
                axes.plot(ends, [found.peak[name] / 2**30] * 2, color="black", linewidth=2, label=label)


if __name__ == "__main__":
    run_script(main)
