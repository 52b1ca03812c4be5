"""Where the time of a training step or a forward pass goes: a GPU's kernels, a CPU's operators, by their share.

python benchmarks/kernels.py --model_type ViT-B_16 --batch_size 16
python benchmarks/kernels.py --model_type R50-ViT-B_16 --batch_size 128 --compile          # on a GPU
"""

import time
from collections import Counter

from steps import NUM_CLASSES, add_step_flags, compiled, machine, make_model, ours, random_batch, time_of
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from models import MODEL_TYPES, canonical_model_type
from utils.arguments import Parser, argument, one_of, positive
from utils.errors import UserError, run_script
from utils.parallel.processes import choose_device

FORWARD, TRAINING = "forward", "training"
WARM_UP = 4  # steps, until the memory that freed tensors leave is used again
LONGEST_NAME = 90


def main():
    args = parse_flags()
    device = choose_device()
    if args.compile and device.type == "cpu":
        raise UserError("--compile needs a GPU here: a CPU's operators can't be told apart once they are compiled")
    model = make_model(args.model_type, args.img_size, NUM_CLASSES)
    images, labels = random_batch(args.batch_size, args.img_size, device)
    forward, training = ours(args, model, device, images, labels)
    step = forward if args.task == FORWARD else training
    time_of(step, WARM_UP, device)
    whole = time_of(step, args.rounds, device) / args.rounds
    seconds, calls = (kernels if device.type == "cuda" else operators)(lambda: time_of(step, args.rounds, device))
    print(report(args, whole, seconds, calls))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-B_16", help=names)
    group.add_argument("--task", type=one_of("task", (FORWARD, TRAINING)), default=TRAINING, help="forward, training")
    add_step_flags(group, batch_size=16, rounds=3)
    group.add_argument("--rows", type=positive, default=20, metavar="N", help="of the table, the longest first")
    return parser.parse_args()


def kernels(run):
    """({name: seconds}, {name: calls}) of the kernels that the GPU runs during `run()`."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    seconds = {event.key: event.self_device_time_total / 1e6 for event in events}
    return seconds, {event.key: event.count for event in events}


def operators(run):
    """The same of PyTorch's operators on a CPU."""
    with OperatorTimes() as times:
        run()
    return times.seconds, times.calls


class OperatorTimes(TorchDispatchMode):
    """Times each operator where PyTorch hands it to its kernel.

    PyTorch's profiler keeps freed memory from being used again, and page faults would then stand in its times.
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
    """A Markdown table; `whole` are the seconds of a step that is not watched."""
    what = "training step" if args.task == TRAINING else "forward pass"
    level = "" if args.precision == "fp32" else f" at {args.fp16_opt_level}"
    watched = sum(seconds.values())
    lines = [
        f"{args.model_type} at {args.img_size}x{args.img_size}, batch {args.batch_size}, {args.precision}{level}"
        f"{compiled(args)}: a {what} takes {1e3 * whole:.1f} ms, {1e3 * watched / args.rounds:.1f} ms of them here",
        f"{machine()}, {args.rounds} steps",
        "",
        "| kernel | share | ms a step | calls a step |",
        "|---|---|---|---|",
    ]
    longest = sorted(seconds, key=seconds.get, reverse=True)
    for name in longest[: args.rows]:
        short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
        lines.append(row(short.replace("|", "/"), seconds[name], calls[name], watched, args.rounds))
    rest = longest[args.rows :]
    if rest:
        others = sum(map(seconds.get, rest)), sum(map(calls.get, rest))
        lines.append(row(f"{len(rest)} others", *others, watched, args.rounds))
    return "\n".join(lines)


def row(name, seconds, calls, watched, rounds):
    return f"| {name} | {seconds / watched:.1%} | {1e3 * seconds / rounds:.2f} | {calls / rounds:.0f} |"


if __name__ == "__main__":
    run_script(main)
