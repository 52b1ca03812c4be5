"""--config FILE: the flags that a run has recorded in its config.json, in place of the defaults."""

import argparse
import sys

from utils.errors import UserError
from utils.flag_groups import EXCLUDED_BY_TOME_R
from utils.flag_types import Parser
from utils.records.run_folder import EARLIER_FLAGS, WITHOUT_EFFECT, load_config

# These do not change what is trained, but the rounding of the results or the images that are read.
REPEATED_WITHOUT_EFFECT = {"parallel", "eval_batch_size", "skip_broken"}
NOT_REPEATED = (WITHOUT_EFFECT | {"name"}) - REPEATED_WITHOUT_EFFECT
# A flag of the command line also replaces recorded ones that it excludes, or that would win against it.
EXCLUDED_BY = {
    "num_steps": {"epochs"},
    "epochs": {"num_steps"},
    "decay_type": {"decay_steps"},
    "rand_augment": {"auto_augment"},
    "auto_augment": {"rand_augment"},
    "min_crop_scale": {"resize_size", "crop_padding"},
    "resize_size": {"crop_padding"},
    "crop_padding": {"resize_size"},
    "fp16": {"bf16"},
    "bf16": {"fp16"},
    "test_at_end": {"val_split", "no_test"},
    "no_test": {"test_at_end"},
    "tome_r": EXCLUDED_BY_TOME_R,
    **dict.fromkeys(EXCLUDED_BY_TOME_R, {"tome_r"}),
}


class RepeatingParser(Parser):
    """A parser whose flag --config puts the flags of an earlier run before those of the command line.

    `complete(flags, given)` fills flags that are not in `given`, {name: value}, and returns what it says about them.
    """

    @staticmethod
    def complete(flags, given):
        return ""

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else list(args)
        finder = Parser("", add_help=False)
        finder.add_argument("--config")
        path = finder.parse_known_args(given)[0].config
        recorded = [] if path is None else self.recorded_arguments(path, given)
        return super().parse_args([*recorded, *given], namespace)

    def recorded_arguments(self, path, given):
        """The flags in a run's config.json as on the command line, without those that the `given` ones replace.

        Raises UserError that names the file.
        """
        flags = load_config(path)["flags"]
        options = self._option_string_actions
        names = {options[flag].dest for flag in map(flag_of, given) if flag in options}
        if "split_seed" not in flags and flags.get("examples_per_class") and "examples_per_class" not in names:
            raise UserError(
                f"{path} is of an earlier version, in which --examples_per_class took the first images of each class; "
                "give --examples_per_class to train on others"
            )
        replaced = NOT_REPEATED.union(names, *(EXCLUDED_BY.get(name, ()) for name in names))
        flags = {**EARLIER_FLAGS, **flags}
        if "val_split" in replaced - names and flags["test_split"] is None and "test_split" not in names:
            replaced |= {"group_by"}  # there is nothing left to divide by groups
        try:
            arguments = [text for name in flags if name not in replaced for text in self.recorded_flag(name, flags)]
            super().parse_args([*arguments, "--name=unused"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return arguments

    def recorded_flag(self, name, flags):
        """One of the recorded `flags` as on the command line."""
        value, action = flags[name], self._option_string_actions.get(f"--{name}")
        if action is None or name in ("help", "help_all"):
            default = self.get_default(name)  # the model of a script that trains a single one
            if value is None:
                return []
            if default in (None, argparse.SUPPRESS):
                raise UserError(f"this script has no flag --{name}; remove it from a copy of the file")
            if value != default:
                raise UserError(f"its run trains {value}, this script {default}; use train.py")
            return []
        excluded = any(flags.get(other) is not None for other, others in EXCLUDED_BY.items() if name in others)
        if value is None and action.default is not None and not excluded:
            raise UserError(f"--{name} has no value")
        return as_arguments(action, value)


def flag_of(text):
    """The flag in an argument such as `--flag=value`."""
    return text.partition("=")[0]


def as_arguments(action, value):
    """The arguments that give an argparse action this parsed value; none for None and for a switch that is off.

    Raises UserError for a switch that is neither on nor off.
    """
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{flag} is true or false, not {value}")
        return [flag] if value else []
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    if action.nargs not in (None, "?"):
        return [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return [f"{flag}={value}"]  # also for a value that begins with a dash
