"""What the records of a study say: one Markdown table per group, with paired comparisons and equal budgets."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from utils.profiling import markdown_table
from utils.study_records import FINAL, GRID, SPLIT, group_name, judged_accuracy

CONFIDENCE = 0.95
STEP = "training step"  # what is timed of each contender


def paired_interval(differences):
    """(low, high) of the mean of paired differences, the 95 % interval of Student's t; None of fewer than two."""
    if len(differences) < 2:
        return None
    from scipy.stats import t  # a slow import

    half = t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    half *= statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return mean - half, mean + half


def difference_text(ours, reference):
    """The mean difference of accuracies {seed: accuracy} from the reference's, in points, over the seeds of both."""
    differences = [100 * (ours[seed] - reference[seed]) for seed in ours if seed in reference]
    if not differences:
        return "no common seeds"
    mean, interval = statistics.mean(differences), paired_interval(differences)
    if interval is None:
        return f"{mean:+.2f}, one seed: no interval"
    low, high = interval
    shown = "" if low > 0 or high < 0 else "; no difference shown"
    missing = "" if ours.keys() == reference.keys() else f", {len(differences)} common seeds"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}{missing}){shown}"


def by_contender(records, order=()):
    """{contender: [records]} with those in `order` first."""
    found = dict.fromkeys([*order, *(record["contender"] for record in records)])
    found = {name: [record for record in records if record["contender"] == name] for name in found}
    return {name: of_name for name, of_name in found.items() if of_name}


def accuracies_of(records):
    """{seed: accuracy} of the runs that did not diverge."""
    return {record["seed"]: judged_accuracy(record) for record in records if not record["diverged"]}


def images_seen(record):
    """Training images of the whole run, repeated ones included."""
    return record["num_steps"] * record["flags"]["train_batch_size"]


def epochs_of(record):
    """Passes over the training images in the whole run."""
    return images_seen(record) / record["images"]["train"]


def training_flops(record):
    """FLOPs of the whole training."""
    return record["model"]["training_flops"] * images_seen(record)


def hardware_text(record):
    """`AMD EPYC, 1 thread per run, 2 runs at a time`"""
    hardware = record["hardware"]
    threads = hardware["threads"] and f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''} per run"
    together = f"{hardware['runs_at_once']} runs at a time" if hardware["runs_at_once"] > 1 else None
    return ", ".join(filter(None, [hardware["device"], threads, together]))


class Times(NamedTuple):
    """How long the contenders of a group take, interleaved in one process."""

    seconds: dict = {}  # {contender: median of a training step}
    origin: str = ""  # machine and number of rounds

    def minutes(self, records):
        """Minutes of training of one of a contender's runs, 0 without steps, NaN if its step was not timed."""
        steps = records[0]["num_steps"]
        return steps * self.seconds.get(records[0]["contender"], math.nan) / 60 if steps else 0.0


NO_TIMES = Times()


def speed_file(folder, entry):
    """Where the times of an entry's group are."""
    return Path(folder) / "speed" / f"{group_name(entry)}.json"


def read_times(folder, entry):
    """The Times of an entry's group."""
    file = speed_file(folder, entry)
    if not file.exists():
        return NO_TIMES
    content = json.loads(file.read_text())
    seconds = {name: statistics.median(of_name[STEP]) for name, of_name in content["seconds"].items()}
    return Times(seconds, f"{content['machine']}, median of {content['rounds']} interleaved rounds")


def accuracy_text(records):
    """Mean, range and number of the runs: `61.52 % (60.90 to 62.01), n = 3`"""
    accuracies = [100 * accuracy for accuracy in accuracies_of(records).values()]
    diverged = len(records) - len(accuracies)
    note = f", {diverged} diverged" if diverged else ""
    if not accuracies:
        return f"{diverged} diverged"
    span = f" ({min(accuracies):.2f} to {max(accuracies):.2f})" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.2f} %{span}, n = {len(accuracies)}{note}"


def final_table(records, order=(), times=NO_TIMES):
    """Markdown of the final runs of one group: accuracy, difference from the reference, and budgets."""
    contenders = by_contender(records, order)
    reference = records[0]["reference"]
    to_compare = accuracies_of(contenders.get(reference, ()))
    rows = []
    for name, of_name in contenders.items():
        first, seconds, minutes = of_name[0], times.seconds.get(name, math.nan), times.minutes(of_name)
        compared = "reference" if name == reference else difference_text(accuracies_of(of_name), to_compare)
        rows.append(
            [
                name,
                f"{first['model']['parameters'] / 1e6:.3f} M",
                f"{first['flags']['learning_rate']:g}" if first["num_steps"] else "-",
                accuracy_text(of_name),
                compared,
                f"{epochs_of(first):.3g}",
                f"{training_flops(first):.3g}",
                "-" if math.isnan(seconds) else f"{1000 * seconds:.0f} ms",
                "-" if math.isnan(minutes) or not minutes else f"{minutes:.1f} min",
            ]
        )
    titles = ["contender", "parameters", "learning rate", "test accuracy: mean (range)"]
    titles += [f"points from {reference} (95 % interval)", "epochs", "training FLOPs", "step", "training time"]
    return markdown_table(titles, rows)


def summary_table(columns, reference, order):
    """Markdown of several groups, {title: {contender: records}}: accuracies, differences from the reference's."""
    titles, rows = ["contender"], {name: [name] for name in order}
    for title, contenders in columns.items():
        titles += [title, f"points from {reference} (95 % interval)"]
        to_compare = accuracies_of(contenders.get(reference, ()))
        for name, row in rows.items():
            found = contenders.get(name, ())
            compared = difference_text(accuracies_of(found), to_compare) if found and name != reference else ""
            row += [accuracy_text(found) if found else "", compared]
    return markdown_table(titles, rows.values())


def grid_table(records, order=()):
    """Markdown of the short runs of one group: validation accuracy of each contender at each learning rate."""
    rates = sorted({record["flags"]["learning_rate"] for record in records})
    rows = []
    for name, of_name in by_contender(records, order).items():
        found = {record["flags"]["learning_rate"]: judged_accuracy(record) for record in of_name}
        measured = {rate: accuracy for rate, accuracy in sorted(found.items()) if not math.isnan(accuracy)}
        best = max(measured, key=measured.get) if measured else None
        cells = [cell_of_grid(found.get(rate), rate == best) for rate in rates]
        edge = ", at the edge of the grid" if best in (rates[0], rates[-1]) and len(rates) > 1 else ""
        rows.append([name, *cells, f"{best:g}{edge}" if measured else "none"])
    return markdown_table(["contender", *(f"{rate:g}" for rate in rates), "chosen"], rows)


def cell_of_grid(accuracy, is_best):
    if accuracy is None:
        return ""
    text = "diverged" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %"
    return f"**{text}**" if is_best else text


def conditions(records, times=NO_TIMES):
    """A paragraph: data, budget, flags that matter, hardware and versions of the runs in a table."""
    first = records[0]
    flags = first["flags"]
    seeds = sorted({record["seed"] for record in records})
    where = sorted({hardware_text(record) for record in records})
    precision = f"bfloat16 at level {flags['fp16_opt_level']}" if flags["bf16"] else "float32"
    judged = "validation" if SPLIT[first["kind"]] == "val" else "test"
    images = first["images"]
    lines = [
        f"{first['data']}: {images['train']:,} training images, judged by {images[SPLIT[first['kind']]]:,} {judged} "
        f"images after the last step; {first['num_steps']:,} steps of {flags['train_batch_size']} at "
        f"{flags['img_size']}x{flags['img_size']}, {flags['optimizer']}, {precision}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    ]
    if first["kind"] == FINAL:
        timed = f"Training time: steps x time of a step, {times.origin}." if times.origin else "No step was timed."
        lines.append(f"Training FLOPs: forward and backward pass. {timed}")
    lines.append(f"Hardware: {'; '.join(where)}. torch {', '.join(sorted({record['torch'] for record in records}))}.")
    return "\n".join(lines)


def report_of(groups, order=(), times_of=None):
    """The Markdown of all groups, {(kind, group as text): {path: record}}, final runs first.

    `times_of` are the Times of groups, {(kind, group as text): Times}.
    """
    parts = []
    for kind, title in ((FINAL, "Final runs"), (GRID, "Choice of the learning rate")):
        for (found, text), records in groups.items():
            if found == kind:
                records = list(records.values())
                times = (times_of or {}).get((kind, text), NO_TIMES)
                table = final_table(records, order, times) if kind == FINAL else grid_table(records, order)
                parts.append(f"## {title}: {text}\n\n{table}\n\n{conditions(records, times)}\n")
    return "\n".join(parts)
