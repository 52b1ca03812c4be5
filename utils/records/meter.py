"""The metrics of the training steps: kept on the device until they are read, averaged between two evaluations."""

import math
import time

import torch

from utils.parallel.devices import device_of_sums
from utils.parallel.processes import sum_over_processes

READ_EVERY = {"cpu": 1, "cuda": 20, "mps": 20}  # steps after which the metrics are read, which waits for the device


class Meter:
    """Collects the metrics that steps return, {name: 0-dim tensor}, without naming any of them.

    A metric that is NaN in a step was not measured there and is omitted from its mean.
    """

    def __init__(self, processes):
        self.processes = processes
        self.unread = []  # the metrics of the steps since the last `read`
        self.totals = {}  # {name: [sum, number of steps]} since the last `reset`
        self.steps = 0
        self.seconds = 0.0
        self.start_clock()

    def start_clock(self):
        """Count the time of the steps from now on; evaluation and saving are not training time."""
        self.started = time.perf_counter()

    def add(self, metrics):
        """Add the metrics of a step; does not wait for the device."""
        self.unread.append(metrics)

    @property
    def is_full(self):
        """Whether it is time to `read`."""
        return len(self.unread) >= READ_EVERY[self.processes.device.type]

    def read(self):
        """{name: values of the unread steps}, each the mean over the processes; empty if there is none."""
        if not self.unread:
            return {}
        names = list(self.unread[0])
        device = device_of_sums(self.processes.device)
        table = torch.stack([torch.stack([step[name].to(device).double() for name in names]) for step in self.unread])
        columns = (sum_over_processes(table) / self.processes.size).t().tolist()
        metrics = dict(zip(names, columns, strict=True))
        for name, values in metrics.items():
            measured = [value for value in values if not math.isnan(value)]
            total, count = self.totals.get(name, (0.0, 0))
            self.totals[name] = [total + sum(measured), count + len(measured)]
        self.steps += len(self.unread)
        self.seconds += time.perf_counter() - self.started
        self.unread = []
        self.start_clock()
        return metrics

    def means(self):
        """{name: mean over the steps since the last `reset`}; NaN if it was never measured."""
        return {name: total / count if count else math.nan for name, (total, count) in self.totals.items()}

    def steps_per_second(self):
        """The speed since the last `reset`; NaN if the clock is too coarse to measure it."""
        return self.steps / self.seconds if self.seconds > 0 else math.nan

    def reset(self):
        """Start a new period after an evaluation."""
        self.totals, self.steps, self.seconds = {}, 0, 0.0

    def state_dict(self):
        """The sums since the last evaluation, for a checkpoint."""
        return {"totals": self.totals, "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state):
        """Continue with the sums of a checkpoint."""
        self.totals, self.steps, self.seconds = dict(state["totals"]), state["steps"], state["seconds"]
