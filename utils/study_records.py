"""The results of a study: one small JSON file per run, and which of them may share a table.

A record is {"study", "kind", "contender", "contender_flags", "reference", "group", "seed", "data", "flags", ...}; see
results/README.md. Runs of one kind and group are compared in one table.
"""

import json
import math
import os
import re
from pathlib import Path

from utils.errors import UserError
from utils.records.files import file_checksum, replace_file
from utils.records.result import read_result
from utils.records.run_folder import EARLIER_FLAGS, WITHOUT_EFFECT, read_config, read_metrics
from utils.records.weights import LAST

NOT_RECORDED = WITHOUT_EFFECT | {"name", "data_dir"}  # where a run was, not what it learned
KEYS = ("study", "kind", "contender", "contender_flags", "reference", "group", "seed", "data", "flags", "model")
GRID, FINAL = "grid", "final"  # kinds: short runs that choose the learning rate, and runs that are reported
SPLIT = {GRID: "val", FINAL: "test"}  # on which a kind is judged
SEEDS = {"seed", "split_seed"}  # flags in which the runs of a contender differ
DIGITS = 6  # significant digits of metrics


def portable_flags(flags, root):
    """{flag: value} of parsed flags without places; a path is relative to `root`, or a name if it is outside."""
    kept = {name: value for name, value in vars(flags).items() if name not in NOT_RECORDED}
    return {name: portable(value, root) for name, value in kept.items()}


def portable(value, root):
    if not isinstance(value, str | Path) or not os.path.isabs(value):
        return list(value) if isinstance(value, tuple) else value
    path = Path(value)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def group_text(group):
    """`epochs 10, examples_per_class 500`"""
    return ", ".join(f"{name} {value}" for name, value in group.items())


def group_name(entry):
    """The beginning of the names of a group's files: kind and group."""
    return plain("-".join([entry["kind"], *(f"{name}={value}" for name, value in entry["group"].items())]))


def file_name(entry):
    """The name of a record's file: group, contender, learning rate of a grid run, seed."""
    rate = [f"lr={entry['flags']['learning_rate']:g}"] if entry["kind"] == GRID else []
    return plain("-".join([group_name(entry), entry["contender"], *rate, f"seed{entry['seed']}"])) + ".json"


def plain(text):
    """The text with `_` in place of what is not suitable for a file's name."""
    return re.sub(r"[^\w.+=-]", "_", text, flags=re.ASCII)


def complete_record(entry, folder, at_once, diverged=False):
    """The record of the run in `folder`, whose `entry` was known before it; a run that `diverged` has no result."""
    config, result = read_config(folder), None if diverged else read_result(folder)
    columns = read_metrics(folder).items()
    metrics = {name: [float(f"{value:.{DIGITS}g}") for value in column] for name, column in columns}
    versions = config["versions"]
    return entry | {
        "num_steps": config["num_steps"],
        "images": config["images"],
        "classes": len(config["classes"]),
        "diverged": diverged,
        "result": result and {name: value for name, value in result.items() if name != "flags"},
        "hardware": {
            "device": versions["device"],
            "threads": None if versions["cuda"] else config["threads"],
            "runs_at_once": at_once,
        },
        "torch": versions["torch"],
        "commit": versions.get("commit"),
        "weights": file_checksum(folder / LAST) if (folder / LAST).exists() else None,
        "metrics": metrics,
    }


def write_record(path, record):
    """Write a record: a line per key, and per column of the metrics. NaN, which JSON does not have, becomes null."""
    record = without_nan(record)
    lines = [f'"{key}": {json.dumps(value)}' for key, value in record.items() if key != "metrics"]
    columns = [f'  "{key}": {json.dumps(value)}' for key, value in record["metrics"].items()]
    text = ",\n".join([*lines, '"metrics": {\n' + ",\n".join(columns) + "\n}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(f"{{\n{text}\n}}\n"))


def without_nan(value):
    """The value, in whose dictionaries and lists None replaces NaN."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_record(path):
    """The record in a file. Raises UserError for any other file."""
    try:
        record = json.loads(path.read_text())
        missing = [key for key in (*KEYS, "metrics", "hardware", "result") if key not in record]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a result of a study: {error}") from error
    if missing:
        raise UserError(f"{path} is not a result of a study: it has no {missing[0]!r}")
    metrics = record["metrics"].items()
    return record | {"metrics": {name: [math.nan if v is None else v for v in column] for name, column in metrics}}


def read_records(folder):
    """{path: record} of the JSON files in a folder. Raises UserError for a damaged one, or if some can't be mixed."""
    records = {path: read_record(path) for path in sorted(Path(folder).glob("*.json"))}
    check_comparable(records)
    return records


def grouped(records):
    """{(kind, group as text): {path: record}}, in the order of the records."""
    groups = {}
    for path, record in records.items():
        groups.setdefault((record["kind"], group_text(record["group"])), {})[path] = record
    return groups


def check_comparable(records):
    """Raise UserError, which names two files, if records of one group differ in more than contender, rate and seed.

    `records` are {path: record}, or entries of runs to come. Those of one contender may differ in the seed alone, in a
    grid also in the learning rate.
    """
    for (kind, _), group in grouped(records).items():
        varied = {*SEEDS, "learning_rate"}.union(*(record["contender_flags"] for record in group.values()))
        check_same(group, lambda record, varied=varied: settings(record, varied))
        for contender in dict.fromkeys(record["contender"] for record in group.values()):
            own = {path: record for path, record in group.items() if record["contender"] == contender}
            varied = {*SEEDS, "learning_rate"} if kind == GRID else SEEDS
            check_same(own, lambda record, varied=varied: settings(record, varied))


def settings(record, varied):
    """{what: value} that records of one table must share; `varied` are flags that may differ."""
    flags = {**EARLIER_FLAGS, **record["flags"]}
    flags = {f"--{name}": value for name, value in flags.items() if name not in varied}
    return flags | {name: record[name] for name in ("study", "reference", "data")}


def check_same(records, settings_of):
    """Raise UserError if the settings of a record differ from those of the first one.

    A flag that only one of them has was added to train.py after the other one, or removed.
    """
    (first, expected), *others = ((path, settings_of(record)) for path, record in records.items())
    for path, found in others:
        for name in sorted(expected.keys() & found.keys()):
            one, other = expected[name], found[name]
            if one != other:
                raise UserError(
                    f"{first} and {path} can't be in one table: {name.lstrip('-')} is {one} and {other}; remove one of "
                    "the files, or give another --results"
                )


def judged_accuracy(record):
    """The accuracy after the last step on the split by which its kind is judged; NaN if the run diverged."""
    return math.nan if record["diverged"] else record["result"]["last"][SPLIT[record["kind"]]]["accuracy"]


def grid_of(records, contender, labels):
    """{learning rate: validation accuracy} of a contender's grid runs, in ascending order; `labels` are its group."""
    found = {
        record["flags"]["learning_rate"]: judged_accuracy(record)
        for record in records
        if (record["kind"], record["contender"], record["group"]) == (GRID, contender, labels)
    }
    return dict(sorted(found.items()))


def best_rate(grid):
    """The learning rate with the highest validation accuracy, the lowest of equal ones. Raises UserError."""
    measured = {rate: accuracy for rate, accuracy in grid.items() if not math.isnan(accuracy)}
    if not measured:
        raise UserError(f"no run of the grid has finished without divergence: {', '.join(map(str, grid))}")
    return max(measured, key=measured.get)
