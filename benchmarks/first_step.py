"""Run train.py to the end of its first step and print, as JSON, where the seconds went; benchmarks/startup.py calls it.

The first argument is the time at which this process was started, the second a JSON file with the md5 sums of made
CIFAR files, the rest are train.py's flags. Nothing slow is imported here before its time is measured.
"""

import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path

begun_here = time.time()
seconds = {}  # {phase: [seconds, processor seconds]}
at_work = []


@contextlib.contextmanager
def phase(name):
    """Counts for `name`, unless it happens within another phase."""
    at_work.append(name)
    start = clocks()
    try:
        yield
    finally:
        at_work.pop()
        if not at_work:
            seconds[name] = [
                before + now - then
                for before, now, then in zip(seconds.get(name, (0, 0)), clocks(), start, strict=True)
            ]


def clocks():
    """The time, and this process's processor time."""
    return time.time(), time.process_time()


def timed(name, function):
    @functools.wraps(function)
    def measured(*arguments, **keywords):
        with phase(name):
            return function(*arguments, **keywords)

    return measured


def main():
    started, cifar, *flags = sys.argv[1:]
    seconds["Python itself"] = [begun_here - float(started), time.process_time()]
    sys.argv = ["train.py", *flags]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with phase("import torch"):
        import torch  # noqa: F401
    with phase("import all else"):
        import train
        from utils import training
    use_made_files(json.loads(Path(cifar).read_text()))
    train.make_parser = timed("flags and their checks", train.make_parser)
    train.check_training_flags = timed("flags and their checks", train.check_training_flags)
    make_model_maker = train.model_maker
    train.model_maker = lambda args: timed("model", make_model_maker(args))
    training.take_pretrained = timed("checkpoint", training.take_pretrained)
    for name, source in training.DATASETS.items():
        training.DATASETS[name] = source._replace(load=timed("data", source.load))
    make_precision = training.make_precision
    training.make_precision = lambda *arguments: with_first_step(make_precision(*arguments), float(started))
    training.Tracker = timed("TensorBoard and records", training.Tracker)
    train.main()


def use_made_files(lists):
    """Let torchvision expect the files that stand in for CIFAR-10's."""
    if lists:
        from torchvision.datasets import CIFAR10

        for name, value in lists.items():
            setattr(CIFAR10, name, value)


def with_first_step(precision, started):
    """`precision`, whose first step is the end."""
    step = precision.step
    precision.prepare = timed("optimizer", precision.prepare)

    def first_step(*arguments):
        step(*arguments)
        total = [time.time() - started, time.process_time()]
        counted = [sum(values) for values in zip(*seconds.values(), strict=True)]
        seconds["first step, and what lies between"] = [
            all_of - rest for all_of, rest in zip(total, counted, strict=True)
        ]
        print(json.dumps({**seconds, "total": total}), flush=True)
        os._exit(0)

    precision.step = first_step
    return precision


if __name__ == "__main__":
    main()
