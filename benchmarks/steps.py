"""What the benchmarks share: the steps that are timed, as train.py runs them, and timing them in turns.

Importing this puts the repository on the path.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import make_model
from models.dropout import Dropout
from utils.arguments import one_of, positive
from utils.errors import UserError
from utils.parallel.precision import OPT_LEVELS, Precision
from utils.profiling import activation_bytes, count_flops
from utils.records.tracker import device_name
from utils.training import compile_in_place

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 10
LEARNING_RATE = 1e-3
SECONDS_OF_A_ROUND, STEPS_OF_A_ROUND = 0.5, 10  # on a GPU, at most


def add_step_flags(group, batch_size, rounds):
    """The flags of what is timed; `batch_size` and `rounds` are the defaults."""
    add_size_flag(group)
    group.add_argument("--batch_size", type=positive, default=batch_size, metavar="N", help="images at once")
    group.add_argument("--precision", type=one_of("precision", DTYPES), default="bf16", help=", ".join(DTYPES))
    group.add_argument(
        "--fp16_opt_level", type=one_of("opt level", OPT_LEVELS), default="O2", help="this project's, in 16 bits"
    )
    add_turn_flags(group, rounds)


def add_size_flag(group):
    group.add_argument(
        "--img_size", type=positive, default=224, metavar="PIXELS", help="side of the square images in pixels"
    )


def add_turn_flags(group, rounds):
    group.add_argument("--compile", action="store_true", help="compile every model by torch.compile")
    group.add_argument(
        "--rounds", type=positive, default=rounds, metavar="N", help="turns that are timed, after one that is not"
    )


def compiled(args):
    return ", compiled" if args.compile else ""


def check_precision(name, device):
    """Raises UserError for float16 on a CPU."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU 16-bit is --precision bf16")


def forward_flops(model_type, img_size, **keywords):
    """Of one image. Raises UserError where the model can't be built, before anything that takes time."""
    with torch.device("meta"):
        return count_flops(make_model(model_type, img_size, NUM_CLASSES, **keywords), img_size)


def random_batch(batch_size, img_size, device):
    """Images float32 (B, 3, H, W) and labels int64 (B,)."""
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    return images, torch.randint(NUM_CLASSES, (batch_size,), device=device)


class OurStep:
    """Forward pass and training step as train.py runs them, but without dropout, which timm has none of by default."""

    def __init__(self, model, precision, level, device, compile=False):
        """`model` is cast in place; `precision` is one of DTYPES, `level` an opt level, which fp32 has no use for."""
        self.model = model.to(device)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.rate = 0.0
        self.precision = Precision("O0" if precision == "fp32" else level, DTYPES[precision], device)
        self.optimizer = self.precision.prepare(model, momentum_sgd)
        if compile:
            compile_for_fixed_shapes(model)

    @torch.no_grad()
    def forward(self, images):
        self.model.eval()
        with self.precision.autocast():
            return self.model(self.precision.inputs(images))

    def train(self, images, labels):
        self.model.train()
        with self.precision.autocast():
            logits = self.model(self.precision.inputs(images)).float()
        self.precision.backward(F.cross_entropy(logits, labels))
        self.precision.step(self.optimizer, max_grad_norm=1.0)


def ours(args, model, device, images, labels):
    """(forward, training step) of `model` on one batch, by the flags of `add_step_flags`."""
    check_precision(args.precision, device)
    step = OurStep(model, args.precision, args.fp16_opt_level, device, args.compile)
    return lambda: step.forward(images), lambda images=images, labels=labels: step.train(images, labels)


def compile_for_fixed_shapes(model):
    """Each batch size is compiled for itself, as in a run, also where several are timed."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    compile_in_place(model)


def momentum_sgd(named):
    return torch.optim.SGD([p for _, p in named], lr=LEARNING_RATE, momentum=0.9, fused=True)


def add_clock_flag(group):
    group.add_argument(
        "--processor_time",
        action="store_true",
        help="on a CPU that other work shares: time by the processor seconds of this process, over its threads, which "
        "are then best one (OMP_NUM_THREADS=1)",
    )


def clock_of(args, device):
    """The function that tells seconds. Raises UserError for a GPU's processor time."""
    if not args.processor_time:
        return time.perf_counter
    if device.type != "cpu":
        raise UserError("--processor_time is for a CPU; a GPU's work is none of the processor's")
    return lambda: time.process_time() / torch.get_num_threads()


def clock_text(args):
    return ", by processor time" if args.processor_time else ""


def take_turns(contenders, rounds, device, clock=time.perf_counter):
    """{contender: [seconds of each round]}; before the first round each is called to warm up.

    On a GPU a round is up to ten steps, which its queue takes one after the other as in training.
    """
    steps = {name: warm_up(step, device) for name, step in contenders.items()}
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            seconds[name].append(time_of(step, steps[name], device, clock) / steps[name])
    return seconds


def warm_up(step, device):
    """The steps that make a round."""
    step()
    if device.type == "cpu":
        return 1
    return max(1, min(STEPS_OF_A_ROUND, round(SECONDS_OF_A_ROUND / time_of(step, 1, device))))


def time_of(step, count, device, clock=time.perf_counter):
    """Seconds of `count` steps."""
    synchronise(device)
    start = clock()
    for _ in range(count):
        step()
    synchronise(device)
    return clock() - start


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(reference, mine):
    """How many times as fast as the reference: the median over the rounds, in which both met the same moods."""
    return statistics.median(theirs / own for theirs, own in zip(reference, mine, strict=True))


def speed_cells(images, seconds):
    """Images/s for a Markdown table: the median, and the slowest to the fastest round."""
    median, slowest, fastest = (images / value for value in (statistics.median(seconds), max(seconds), min(seconds)))
    return [f"{median:.1f}", f"{slowest:.1f} to {fastest:.1f}"]


def machine():
    """The device, the CPU threads and the version of torch, for a title."""
    return f"{device_name()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def state_bytes(model, optimizer):
    """{"weights", "gradients", "optimizer"}: what a training step needs beside activations, after the first step.

    At level O2 the weights and their gradients are of 16 bits; the float32 masters count as the optimizer's, their
    gradients as gradients.
    """
    own = {id(p) for p in model.parameters()}
    masters = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in (*model.parameters(), *masters)),
        "optimizer": sum(tensor.nbytes for tensor in (*masters, *state)),
    }


def training_memory(step, images, labels):
    """Bytes of a training step of an object like OurStep, which has taken one before.

    On a GPU the allocator's peak, what other models hold beside it taken off. On a CPU weights, gradients, optimizer
    state and the activations kept for the backward pass are counted, which leaves short-lived buffers out.
    """
    state = state_bytes(step.model, step.optimizer)
    if images.is_cuda:
        lasting = (
            state["weights"]
            + state["optimizer"]
            + sum(p.grad.nbytes for group in step.optimizer.param_groups for p in group["params"] if p.grad is not None)
        )
        return lasting + rise_of_memory(lambda: step.train(images, labels))
    return sum(state.values()) + activation_bytes(step.model, lambda: step.train(images, labels))


def forward_memory(step, images):
    """Bytes of a forward pass on a GPU; None on a CPU, where nothing is kept that could be counted."""
    if not images.is_cuda:
        return None
    return state_bytes(step.model, step.optimizer)["weights"] + rise_of_memory(lambda: step.forward(images))


def rise_of_memory(step):
    """By how many bytes the memory that PyTorch's allocator has given out rises at most during a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fits(step, images, labels, device):
    """Whether a training step of these images fits; the memory that it took is free again. A CPU is not asked."""
    if device.type == "cpu":
        step.train(images, labels)  # the optimizer's state is there from now on
        return True
    try:
        step.train(images, labels)
        torch.cuda.synchronize()
        fitted = True
    except torch.OutOfMemoryError:
        fitted = False
    step.model.zero_grad()
    free(device)
    return fitted


def free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_title(device):
    return "peak memory (MiB)" if device.type == "cuda" else "memory, counted (MiB)"
