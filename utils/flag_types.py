"""The parser of all scripts and the types of their flags."""

import argparse
import difflib
import functools
import re
import textwrap

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports errors in one line; help shows the defaults.

    With the names of `common` flags --help shows these alone, and --help_all shows all flags.
    """

    def __init__(self, description, common=(), **keywords):
        formatter = functools.partial(HelpFormatter, common=common)
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **keywords)
        if common:
            self.add_argument(
                "--help_all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all flags and exit"
            )

    def error(self, message):
        raise UserError(message)

    def parse_given(self, arguments=None):
        """(flags, names of those that are given in the arguments, by default those of the command line)."""
        flags = self.parse_args(arguments)
        absent = object()
        probe = self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(flags), absent)))
        return flags, {name for name, value in vars(probe).items() if value is not absent}


class HelpAll(argparse.Action):
    """Prints the help of all flags."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.formatter_class = HelpFormatter
        parser.print_help()
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds "(default: ...)" to the help of a flag that has one; omits flags that are not `common`, if any are."""

    def __init__(self, prog, common=()):
        super().__init__(prog, max_help_position=38, width=118)
        self.common = common

    def add_argument(self, action):
        if not self.common or action.dest in {*self.common, "help", "help_all"}:
            super().add_argument(action)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # as in ViT-B_16

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def positive(text):
    """An integer above 0."""
    return number(text, int, "a whole number above 0", lambda n: n > 0)


def natural(text):
    """An integer, 0 or above."""
    return number(text, int, "a whole number, 0 or above", lambda n: n >= 0)


def seed(text):
    """An integer of 32 bits."""
    return number(text, int, "a whole number from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)


def positive_float(text):
    """A finite number above 0."""
    return number(text, float, "a number above 0", lambda x: 0 < x < float("inf"))


def natural_float(text):
    """A finite number, 0 or above."""
    return number(text, float, "a number, 0 or above", lambda x: 0 <= x < float("inf"))


def beta_alpha(text):
    """The alpha of a Beta distribution, or 0. Below 0.01 PyTorch's samples underflow, to 0.5 instead of 0 or 1."""
    return number(text, float, "0 or a number of at least 0.01", lambda x: x == 0 or 0.01 <= x < float("inf"))


def fraction(text):
    """A number from 0 to below 1."""
    return number(text, float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def share(text):
    """A number above 0, at most 1."""
    return number(text, float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def open_share(text):
    """A number above 0 and below 1."""
    return number(text, float, "a number above 0 and below 1", lambda x: 0 < x < 1)


def probability(text):
    """A number from 0 to 1."""
    return number(text, float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def count_or_share(text):
    """An int for a count, a float for a share: `1` is one, `1.0` all."""
    return positive(text) if text.lstrip("+-").isdigit() else share(text)


def switch(text):
    """A flag that may be switched off."""
    if text in ("true", "false"):
        return text == "true"
    raise argparse.ArgumentTypeError(f"{text} is not true or false")


def trained_part(text):
    """The value of --train."""
    if re.fullmatch("all|head|norms|last:[1-9][0-9]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text} is not all, head, norms or last:N with N above 0, for example last:2")


def number(text, kind, what, is_valid):
    """`kind(text)`. Raises ArgumentTypeError that says `what` is expected."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def one_of(what, names):
    """A parser of one of `names`, whose error suggests the nearest."""

    def parse(text):
        if text in names:
            return text
        nearest = difflib.get_close_matches(text, names, n=3, cutoff=0.6) or names
        raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; did you mean {', '.join(nearest)}?")

    return parse


def argument(parse):
    """A flag's parser made of a function that raises ValueError with a message for the user."""

    def parse_argument(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from error

    return parse_argument
