"""result.json: what a finished run has reached, and its summary as text."""

import json
import math
from pathlib import Path

from utils.data.splits import NAMES
from utils.errors import UserError
from utils.metrics import best_of, criterion_text, percent
from utils.records.files import replace_file
from utils.records.run_folder import CURVES, EVENTS, METRICS, RESULT
from utils.records.weights import AVERAGED, BEST, LAST

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
    last = last_measured(run_dir)
    weights = [name for name in (BEST, last) if name == last or "best" in result]
    titles = [("weights", weights[0]), *(("", name) for name in weights[1:])]
    titles += [("result", RESULT), ("metrics", METRICS), ("curves", CURVES), ("TensorBoard", EVENTS)]
    for title, name in titles:
        path = f"tensorboard --logdir {run_dir}" if name == EVENTS else run_dir / name
        exists = any(run_dir.glob(name))
        note = "" if exists and name not in incomplete else "  (incomplete)" if exists else "  (missing)"
        lines.append(f"  {title:<11}  {path}{note}")
    return "\n".join(lines)


def last_measured(run_dir):
    """The name of the weights that "last" in a result describes."""
    return AVERAGED if (run_dir / AVERAGED).exists() else LAST


def accuracy_lines(result, num_classes):
    """A line for the last and one for the best weights, and one on how the best ones were chosen."""
    entries = {name: result[name] for name in ("last", "best") if name in result}
    width = max(len(str(entry["step"])) for entry in entries.values())
    for name, entry in entries.items():
        measured = [split_text(split, entry[split], num_classes) for split in ("val", "test") if entry.get(split)]
        yield f"{name}, step {entry['step']:>{width}}   {'   '.join(measured)}"
    notes = []
    if "best" in result and result["best"].get(result["chosen_on"]):
        chosen_on = result["chosen_on"]
        optimistic = "" if chosen_on == "val" and "test" in result["best"] else ": optimistic"
        criterion = criterion_text(result["chosen_by"], result["best"][chosen_on][result["chosen_by"]])
        notes.append(f"best: {criterion}, chosen on the {NAMES[chosen_on]} set{optimistic}")
    if any("images" in measured for measured in result["last"].values() if isinstance(measured, dict)):
        notes.append("[low, high]: 95 % interval")
    if notes:
        yield "; ".join(notes)


def split_text(split, measured, num_classes):
    """The accuracies on a split, {metric: number}, of many classes the top-5 accuracy too."""
    images, top5 = measured.get("images"), measured["top5_accuracy"]
    shows_top5 = num_classes > FEW_CLASSES and not math.isnan(top5)
    text = f"{NAMES[split]} accuracy {percent(measured['accuracy'], images)}"
    return f"{text}, top-5 {percent(top5, images)}" if shows_top5 else text
