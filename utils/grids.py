"""The grid of a sweep: the values of its flags, the name and flags of each point, and the best point."""

import csv
import difflib
import hashlib
import itertools
import re
import statistics

from utils.data.splits import DIVISION
from utils.errors import UserError
from utils.metrics import BEST_METRICS
from utils.recorded_flags import as_arguments
from utils.records.run_folder import WITHOUT_EFFECT

SWITCH = {"true": True, "false": False}
NOT_IN_GRIDS = (WITHOUT_EFFECT | {"name", "seed", "help", "help_all"}) - {"config"}
# Runs whose values of these flags differ are evaluated on other images or by another metric.
SAME_IN_ALL_RUNS = ("dataset", "data_dir", "best_metric", "test_at_end", *DIVISION)
MAX_NAME = 150  # characters; a folder's name may have 255


def parse_grid(entries, parser):
    """{flag: [value, ...]} from texts such as `learning_rate=0.01,0.03`, as the script's `parser` reads the values.

    A value that contains a comma is in double quotes, as in CSV. The values of a switch are `true` and `false`; the
    numbers of a flag that takes several are separated by spaces. Raises UserError.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_GRIDS}
    grid = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        if not text:
            raise UserError(f"--grid {entry}: give a flag and its values, for example learning_rate=0.01,0.03")
        if name in NOT_IN_GRIDS:
            instead = "give --seeds" if name == "seed" else "it does not change what a run learns"
            raise UserError(f"--grid {name}: this flag can't be in a grid; {instead}")
        if name not in actions:
            nearest = difflib.get_close_matches(name, actions, n=3)
            suggestion = f"; did you mean {', '.join(nearest)}?" if nearest else ""
            raise UserError(f"--grid {name}: the training has no flag --{name}{suggestion}")
        if name in grid:
            raise UserError(f"--grid {name}: the flag is given twice; give all of its values at once")
        grid[name] = parse_values(name, text, actions[name], parser)
    return grid


def parse_values(name, text, action, parser):
    """The values of one flag of the grid, from the text behind `name=`."""
    try:
        [fields] = csv.reader([text], strict=True)
    except csv.Error as error:
        raise UserError(f"--grid {name}={text}: {error}") from error
    values = []
    for field in fields:
        if not field.strip():
            raise UserError(f"--grid {name}={text}: a value is empty")
        if action.nargs == 0 and field not in SWITCH:
            raise UserError(f"--grid {name}={field}: the values of this flag are true and false")
        value = SWITCH[field] if action.nargs == 0 else field if action.nargs in (None, "?") else field.split()
        try:
            value = hashable(getattr(parser.parse_args(["--name=unused", *as_arguments(action, value)]), name))
        except UserError as error:
            raise UserError(f"--grid {name}: {error}") from error
        if repr(value) in map(repr, values):  # 1 and 1.0 may mean different things
            raise UserError(f"--grid {name}: the value {field} is given twice")
        values.append(value)
    return values


def hashable(value):
    """The value, or a tuple in place of a list."""
    return tuple(value) if isinstance(value, list) else value


def grid_points(grid):
    """All combinations of the grid's values, as tuples in the order of its flags."""
    return list(itertools.product(*grid.values()))


def point_arguments(grid, point, parser):
    """The arguments of the shell that set the flags of a point."""
    actions = {action.dest: action for action in parser._actions}
    return [text for name, value in zip(grid, point, strict=True) for text in as_arguments(actions[name], value)]


def value_text(value, between=" "):
    """A value as in the shell."""
    if isinstance(value, tuple):
        return between.join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def point_text(grid, point):
    """`learning_rate 0.01, weight_decay 0.1`"""
    return ", ".join(f"{name} {value_text(value)}" for name, value in zip(grid, point, strict=True))


def folder_name(grid, point):
    """The name of the point's runs, without the seed: `learning_rate=0.01-weight_decay=0.1`.

    It is a function of flags and values alone. A hash distinguishes values that are not suitable for a folder's name.
    """
    text = "-".join(f"{name}={value_text(value, '_')}" for name, value in zip(grid, point, strict=True))
    name = re.sub(r"[^\w.+=-]", "_", text, flags=re.ASCII)[:MAX_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_grid(grid, runs):
    """Raise UserError if a flag of the grid has no effect, or if the runs can't be compared.

    `runs` is {(point, seed): Run}, after the checks of their flags.
    """
    first = next(iter(runs.values())).flags
    for (point, _), run in runs.items():
        for name, value in zip(grid, point, strict=True):
            actual = hashable(getattr(run.flags, name))
            if actual != value:
                raise UserError(
                    f"--grid {name}={value_text(value)} has no effect: other flags set it to {value_text(actual)}"
                )
        for name in SAME_IN_ALL_RUNS:
            one, other = getattr(first, name), getattr(run.flags, name)
            if one != other:
                raise UserError(f"runs with --{name} {one} and {other} can't be compared; give one value for all runs")


def best_point(values, metric):
    """The point with the best mean over its runs, the first of equal ones; `values` is {point: [value, ...]}."""
    means = {point: statistics.mean(of_point) for point, of_point in values.items()}
    return (max if BEST_METRICS[metric].higher_is_better else min)(means, key=means.get)
