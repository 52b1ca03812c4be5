"""Names of another library <-> names of our state dict: a table of rows, read both ways.

A row pairs a name of ours with one of theirs, for example `("blocks.{n}.mlp.fc1", "layers.{n}.mlp.fc1")`. `{n}` is a
number, `{n+1}` on our side the next one. Both names may end with `.weight` or `.bias` in the state dict. Several names
of theirs in a tuple are stacked in ours. Of several rows with the same name of ours, the first is the one to write.
"""

import functools
import re
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One row of a table: our name, and theirs as a tuple."""

    ours: str
    theirs: tuple


def table(*rows):
    """The Rows of (our name, their name or names) pairs."""
    return tuple(Row(ours, (theirs,) if isinstance(theirs, str) else theirs) for ours, theirs in rows)


def to_ours(tensors, rows):
    """{our name: tensor} of {their name: tensor}; a name that is in no row is kept."""
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        for row in rows:
            part, numbers, leaf = match(row.theirs, name)
            if numbers is None:
                continue
            ours = fill(row.ours, numbers) + leaf
            if len(row.theirs) == 1:
                found[ours] = tensor
            else:
                stacks.setdefault(ours, [None] * len(row.theirs))[part] = tensor
            break
        else:
            found[name] = tensor
    for ours, parts in stacks.items():
        if all(part is not None for part in parts):  # otherwise it is reported as missing
            found[ours] = torch.cat(parts)
    return found


def to_theirs(state, rows):
    """{their name: tensor} of {our name: tensor}, the inverse of `to_ours`."""
    found = {}
    for name, tensor in state.items():
        for row in rows:
            _, numbers, leaf = match((row.ours,), name)
            if numbers is None:
                continue
            parts = tensor.chunk(len(row.theirs))
            found |= {fill(theirs, numbers) + leaf: part for theirs, part in zip(row.theirs, parts, strict=True)}
            break
        else:
            found[name] = tensor
    return found


def match(templates, name):
    """(which of the templates has the `name`, its numbers, its ending); the numbers are None if none has it."""
    for part, template in enumerate(templates):
        if found := pattern(template).fullmatch(name):
            shifts = [len(group) > len("{n}") for group in re.findall(r"\{n(?:\+1)?\}", template)]
            numbers = [int(text) - shift for text, shift in zip(found.groups()[:-1], shifts, strict=True)]
            return part, numbers, found[found.lastindex] if found.lastindex == len(shifts) + 1 else ""
    return None, None, ""


@functools.cache
def pattern(template):
    """The regular expression of a name in a table; the last group is the ending."""
    return re.compile(re.sub(r"\\\{n(\\\+1)?\\\}", r"(\\d+)", re.escape(template)) + r"(\.weight|\.bias)?")


def fill(template, numbers):
    """A name in a table with these numbers."""
    remaining = iter(numbers)
    return re.sub(r"\{n(\+1)?\}", lambda found: str(next(remaining) + bool(found[1])), template)


def mean_std_text(mean, std):
    """Means and standard deviations of three channels as one text."""
    return ",".join(repr(float(value)) for value in (*mean, *std))
