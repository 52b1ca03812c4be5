"""The share of each kernel (on a GPU) or operator (on a CPU) in the time of a training step or a forward pass.

python benchmarks/kernels.py --model_type ViT-B_16 --batch_size 16
python benchmarks/kernels.py --model_type R50-ViT-B_16 --batch_size 128 --compile          # on a GPU
"""

import time
from collections import Counter

from steps import NUM_CLASSES, add_model_flag, add_step_flags, machine, random_batch, setting, step_of
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from inference import make_model
from utils.errors import UserError, run_script
from utils.flag_types import Parser, one_of, positive
from utils.parallel.processes import choose_device
from utils.profiling import markdown_table, time_calls

FORWARD, TRAINING = "forward", "training"
WARM_UP = 4  # steps, until the memory of freed tensors is reused
LONGEST_NAME = 90


def main():
    args = parse_flags()
    device = choose_device()
    if args.compile and device.type != "cuda":
        raise UserError("--compile needs a GPU here: compiled operators of a CPU can't be timed one by one")
    model = make_model(args.model_type, args.img_size, NUM_CLASSES)
    images, labels = random_batch(args.batch_size, args.img_size, device)
    step = step_of(args, model, device)
    function = (lambda: step.forward(images)) if args.task == FORWARD else (lambda: step.train(images, labels))
    time_calls(function, WARM_UP, device)
    whole = time_calls(function, args.rounds, device) / args.rounds
    observe = kernels if device.type == "cuda" else operators
    seconds, calls = observe(lambda: time_calls(function, args.rounds, device))
    print(report(args, whole, seconds, calls))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    add_model_flag(group, default="ViT-B_16")
    group.add_argument(
        "--task", type=one_of("task", (FORWARD, TRAINING)), default=TRAINING, help="What is timed: forward or training."
    )
    add_step_flags(group, batch_size=16, rounds=3)
    group.add_argument("--rows", type=positive, default=20, metavar="N", help="Rows of the table, the longest first.")
    return parser.parse_args()


def kernels(run):
    """({name: seconds}, {name: calls}) of the kernels that the GPU runs during `run()`."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    seconds = {event.key: event.self_device_time_total / 1e6 for event in events}
    return seconds, {event.key: event.count for event in events}


def operators(run):
    """({name: seconds}, {name: calls}) of PyTorch's operators on a CPU."""
    with OperatorTimes() as times:
        run()
    return times.seconds, times.calls


class OperatorTimes(TorchDispatchMode):
    """Times each operator where PyTorch dispatches it to its kernel.

    PyTorch's profiler prevents the reuse of freed memory, so its times would include page faults.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        self.seconds[str(operator)] += time.perf_counter() - start
        self.calls[str(operator)] += 1
        return result


def report(args, whole, seconds, calls):
    """A Markdown table; `whole` is the time in seconds of a step that is not observed."""
    what = "training step" if args.task == TRAINING else "forward pass"
    observed = sum(seconds.values())
    longest = sorted(seconds, key=seconds.get, reverse=True)
    named = [(shortened(name), seconds[name], calls[name]) for name in longest[: args.rows]]
    rest = longest[args.rows :]
    if rest:
        named.append((f"{len(rest)} others", sum(map(seconds.get, rest)), sum(map(calls.get, rest))))
    rows = [
        [name, f"{time / observed:.1%}", f"{1e3 * time / args.rounds:.2f}", f"{count / args.rounds:.0f}"]
        for name, time, count in named
    ]
    return (
        f"{args.model_type} at {args.img_size}x{args.img_size}, {setting(args)}: a {what} takes {1e3 * whole:.1f} ms, "
        f"{1e3 * observed / args.rounds:.1f} ms with the times below\n{machine()}, {args.rounds} steps\n\n"
        + markdown_table(["kernel", "share", "ms per step", "calls per step"], rows)
    )


def shortened(name):
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
    return name.replace("|", "/")


if __name__ == "__main__":
    run_script(main)
