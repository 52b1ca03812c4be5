"""result.json: what a finished run has reached, and its summary as text."""

import json
import math
from pathlib import Path

from utils.data.splits import NAMES
from utils.errors import UserError
from utils.metrics import best_of, percent
from utils.records.files import replace_file
from utils.records.run_folder import CURVES, EVENTS, METRICS, RESULT
from utils.records.weights import BEST, LAST

COLUMNS = ("loss", "accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1")  # of an evaluation in metrics.csv
FEW_CLASSES = 10  # up to this number of classes the terminal omits the top-5 accuracy


def write_result(run_dir, result):
    """Write result.json; see `TrainState.finish` for its content."""
    replace_file(run_dir / RESULT, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))


def read_result(run_dir):
    """The result.json of a finished run, or None for a run of an earlier version. Raises UserError."""
    path = Path(run_dir) / RESULT
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; delete it, and --resume writes it again") from error


def result_of_rows(rows, metric):
    """The same from the rows of metrics.csv, {column: text}, of a run of an earlier version, chosen by `metric`."""
    best = best_of(rows, metric, "test")
    [row] = [row for row in rows if int(row["step"]) == best.step] or rows[-1:]
    entries = {
        name: {"step": int(row["step"]), "test": {key: float(row.get(f"test_{key}", "nan")) for key in COLUMNS}}
        for name, row in (("last", rows[-1]), ("best", row))
    }
    return {"chosen_on": "test", "chosen_by": metric, **entries}


def summary(run_dir, result, num_classes, incomplete=()):
    """The results of a run and the paths of its files as text; `incomplete` names records that could not be written."""
    lines = ["", *accuracy_lines(result, num_classes)]
    for title, name in (
        ("weights", BEST),
        ("", LAST),
        ("result", RESULT),
        ("metrics", METRICS),
        ("curves", CURVES),
        ("TensorBoard", EVENTS),
    ):
        if name == BEST and "best" not in result:
            continue
        path = f"tensorboard --logdir {run_dir}" if name == EVENTS else run_dir / name
        exists = any(run_dir.glob(name))
        note = "" if exists and name not in incomplete else "  (incomplete)" if exists else "  (missing)"
        lines.append(f"  {title:<11}  {path}{note}")
    return "\n".join(lines)


def accuracy_lines(result, num_classes):
    """A line for each evaluated split, with what its numbers are worth."""
    last, best, chosen_on = result["last"], result.get("best"), result["chosen_on"]
    has_intervals = False
    for split in ("val", "test"):
        measured = last.get(split)
        if not measured:
            continue
        images, top5 = measured.get("images"), measured["top5_accuracy"]
        has_intervals |= bool(images)
        shows_top5 = num_classes > FEW_CLASSES and not math.isnan(top5)
        line = f"{NAMES[split]} accuracy {percent(measured['accuracy'], images)}"
        line += f", top-5 {percent(top5, images)}" if shows_top5 else ""
        if best and best.get(split):
            line += f", best {best_text(best[split], result['chosen_by'])} at step {best['step']}"
        if split == chosen_on and "test" not in set(last) - {chosen_on}:
            line += f"; the best step is chosen on the {NAMES[split]} set: optimistic"
        yield line
    if has_intervals:
        yield "[low, high]: the 95 % interval of an accuracy"


def best_text(measured, metric):
    """The accuracy of the best weights, and the metric by which they are chosen if it is another one."""
    text = percent(measured["accuracy"], measured.get("images"))
    if metric == "accuracy":
        return text
    value = f"{measured[metric]:.4f}" if metric == "loss" else percent(measured[metric])
    return f"{text} ({metric.replace('_', ' ')} {value})"
