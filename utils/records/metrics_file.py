"""metrics.csv: one row per evaluation of a run."""

import csv
import itertools
import math

from utils.data.splits import evaluated_split
from utils.errors import UserError
from utils.records.best_effort import reason
from utils.records.files import replace_file
from utils.terminal import say

REQUIRED_COLUMNS = ("step", "train_loss", "train_accuracy", "images_per_second", "seconds")


class MetricsFile:
    """The rows of a run's metrics.csv, {column: text}, in memory and in the file."""

    def __init__(self, path, first_step, evaluated_on="test"):
        """Read the rows of an existing file up to `first_step`, at which the run resumes.

        `evaluated_on` is the split that the run evaluates: "val", which earlier versions called test, or "test".
        """
        self.path = path
        rows, self.damage = readable_rows(path) if path.exists() else ([], None)
        if evaluated_on == "val":
            rows = [{name.replace("test_", "val_"): text for name, text in row.items()} for row in rows]
        self.rows = [row for row in rows if float(row["step"]) <= first_step]

    def add(self, row):
        """Add the row of an evaluation, {column: number}; it replaces an earlier one of the same step."""
        self.rows = [earlier for earlier in self.rows if float(earlier["step"]) != row["step"]]
        self.rows.append({name: format(value, ".8g") for name, value in row.items()})

    def write(self):
        """Write all rows; the columns are those of the newest row, and NaN where an earlier row lacks one.

        A damaged file is kept under another name. Raises OSError, after which it can be called again.
        """
        if self.damage:
            kept = unused_name(self.path)
            self.path.rename(kept)
            say(f"warning: {self.path} is damaged ({self.damage}); kept as {kept}, {len(self.rows)} of its rows remain")
            self.damage = None
        if not self.rows:
            self.path.unlink(missing_ok=True)  # all its rows are later than the step at which the run resumes
            return
        columns = dict.fromkeys(name for row in reversed(self.rows) for name in row)

        def write(path):
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="nan")
                writer.writeheader()
                writer.writerows(self.rows)

        replace_file(self.path, write)


def unused_name(path):
    """metrics-damaged.csv for metrics.csv, with a number if there is one already."""
    names = itertools.chain(["damaged"], (f"damaged-{number}" for number in itertools.count(2)))
    paths = (path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names)
    return next(path for path in paths if not path.exists())


def read_rows(path):
    """The rows of a metrics.csv as {column: text}. Raises UserError for a damaged file."""
    rows, damage = readable_rows(path)
    if damage:
        raise damaged_metrics(path, damage)
    return rows


def damaged_metrics(path, damage):
    """The UserError of a metrics.csv that can't be used."""
    return UserError(
        f"{path} is damaged: it needs numbers in the columns {', '.join(required_columns(()))}, but {damage}"
    )


def readable_rows(path):
    """(rows of a metrics.csv as {column: text}, its first damage in words or None)."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        return [], f"it can't be read: {reason(error)}"
    header, *lines = text.splitlines() or [""]
    names = cells(header)
    if "step" not in names:
        return [], "line 1 has no column step"
    damage = None
    if lines and not text.endswith("\n"):
        damage = "its last line is incomplete"  # a number of fewer digits would look valid
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=2):
        row = dict(zip(names, cells(line), strict=False))
        if len(cells(line)) == len(names) and all(map(is_number, row.values())) and float(row["step"]).is_integer():
            rows.append(row)
        elif line:
            damage = damage or f"line {number} is not a step and its numbers"
    return rows, damage


def cells(line):
    """The cells of a line of CSV, which contain no line breaks; none if they are not valid."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a cell that is longer than csv's limit
        return []


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def required_columns(columns):
    """The columns without which a metrics.csv is damaged."""
    split = evaluated_split(columns)
    return (*REQUIRED_COLUMNS, f"{split}_loss", f"{split}_accuracy")


def as_columns(rows):
    """{column: list of floats} of rows {column: text}; a value that was not measured is NaN."""
    names = dict.fromkeys(name for row in rows for name in (*row, *required_columns(row)))
    return {name: [float(row.get(name, math.nan)) for row in rows] for name in names}
