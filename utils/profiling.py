"""What models cost: parameters, FLOPs, the memory of activations, and time."""

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

SECONDS_PER_ROUND, STEPS_PER_ROUND = 0.5, 10  # on a GPU, at most


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_flops(model, img_size):
    """FLOPs of the forward pass for one image, 2 per multiply-add, of a model built on the meta device.

    All tokens are counted, also those that the last block of a ViT skips in training.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, img_size, img_size, device="meta"))
    return counter.get_total_flops()


def count_training_flops(model, img_size):
    """FLOPs of the forward and backward pass for one image, 2 per multiply-add, of a model on the meta device.

    Without the tokens that the last block of a ViT skips in training.
    """
    images = torch.zeros(2, 3, img_size, img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() // len(images)


def activation_bytes(model, step):
    """Bytes that a training step keeps between forward and backward, in addition to parameters and buffers.

    Memory that several tensors share counts once. `step()` must not save tensors after its backward pass has begun.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def time_interleaved(functions, rounds, device, clock=time.perf_counter):
    """{name: [seconds per call in each round]} of the functions {name: function}; each round calls all of them.

    Noise of the machine thus affects all of them alike. Each is called before the first round to warm up. On a GPU a
    round has up to ten calls, queued one after another as in training.
    """
    calls = {name: warm_up(function, device) for name, function in functions.items()}
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(time_calls(function, calls[name], device, clock) / calls[name])
    return seconds


def warm_up(function, device):
    """Call the function; returns the number of calls per round."""
    function()
    if device.type == "cpu":
        return 1
    return max(1, min(STEPS_PER_ROUND, round(SECONDS_PER_ROUND / time_calls(function, 1, device))))


def time_calls(function, count, device, clock=time.perf_counter):
    """Seconds of `count` calls."""
    synchronise(device)
    start = clock()
    for _ in range(count):
        function()
    synchronise(device)
    return clock() - start


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def speedup(reference, seconds):
    """How many times as fast as the reference: the median over the interleaved rounds."""
    return statistics.median(theirs / own for theirs, own in zip(reference, seconds, strict=True))


def speed_cells(images, seconds):
    """Images/s for a Markdown table: the median, and the slowest to the fastest round."""
    median, slowest, fastest = (images / value for value in (statistics.median(seconds), max(seconds), min(seconds)))
    return [f"{median:.1f}", f"{slowest:.1f} to {fastest:.1f}"]


def rate_cells(rates, reference):
    """Images/s of interleaved rounds for a Markdown table: relative to the reference, median, slowest to fastest."""
    ratio = statistics.median(own / other for own, other in zip(rates, reference, strict=True))
    return [f"{ratio:.2f}", f"{statistics.median(rates):.0f}", f"{min(rates):.0f} to {max(rates):.0f}"]


def markdown_table(titles, rows):
    """A Markdown table of cells that are strings."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def token_reduction_cells(names, seconds, batch_size):
    """(titles, {name: cells}) of a table of training steps with token reduction, relative to those without.

    The `names` are pairs of a method and the patches kept or its r, ("none", "all") among them; `seconds` are those of
    (name, "step") and, where tokens are chosen, of the choice alone (name, "choice").
    """
    titles = ["token reduction", "patches kept or r", "relative to none", "images/s", "slowest to fastest round"]
    titles += ["selection alone (ms)", "share of the time"]
    rows = {}
    for name in names:
        step, choice = seconds[name, "step"], seconds.get((name, "choice"))
        rows[name] = [*map(str, name), f"{speedup(seconds[('none', 'all'), 'step'], step):.2f}"]
        rows[name] += speed_cells(batch_size, step)
        if choice:
            share = statistics.median(choice) / statistics.median(step)
            rows[name] += [f"{1000 * statistics.median(choice):.2f}", f"{100 * share:.1f} %"]
        else:
            rows[name] += ["", ""]
    return titles, rows
