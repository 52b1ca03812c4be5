"""The means of training metrics between two evaluations."""

import json
import math

import torch

from utils.parallel.processes import one_process
from utils.records.meter import Meter


def add(meter, loss, grad_norm):
    meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)})


def test_means_omit_steps_in_which_a_metric_was_not_measured():
    meter = Meter(one_process())
    for values in ((1.0, math.nan), (2.0, 5.0), (6.0, 7.0)):
        add(meter, *values)
    assert meter.read()["loss"] == [1.0, 2.0, 6.0]
    assert meter.read() == {}
    assert meter.means() == {"loss": 3.0, "grad_norm": 6.0}
    meter.reset()
    assert meter.means() == {}


def test_a_restored_meter_continues_with_the_same_means():
    meter = Meter(one_process())
    add(meter, 1.0, 5.0)
    add(meter, 5.0, math.nan)
    meter.read()
    restored = Meter(one_process())
    restored.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for each in (meter, restored):
        add(each, 3.0, 9.0)
        each.read()
    assert restored.means() == meter.means() == {"loss": 3.0, "grad_norm": 7.0}
