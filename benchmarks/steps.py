"""What the benchmarks share: flags, the training step of train.py on a fixed batch, its memory, and titles of tables.

Importing this module puts the repository on the path.
"""

import gc
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import train_parser
from inference import make_model
from models import CONFORMERS, MODEL_TYPES, REDUCTION_METHODS, canonical_model_type
from models.bit_resnet import BiTResNet
from models.token_reduction import EveryBlock, cluster_tokens, match_tokens
from utils.data.stream import MicroBatch
from utils.errors import UserError
from utils.flag_types import argument, one_of, positive
from utils.parallel.precision import OPT_LEVELS, trained_parameters
from utils.parallel.processes import device_name, one_process
from utils.profiling import activation_bytes, count_flops
from utils.train_state import TrainState
from utils.training import train_step

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 10
LEARNING_RATE = 1e-3
EVERY_BLOCK = "tome in every block"
FORWARD, TRAINING = "forward", "training step"
FIRST_TRIED, LAST_TRIED = 64, 2**14  # batch sizes
PRODUCTS_PER_CALL = 20


def add_model_flag(group, default):
    group.add_argument(
        "--model_type",
        type=argument(canonical_model_type),
        default=default,
        metavar="NAME",
        help=f"The model is one of {', '.join(MODEL_TYPES)}.",
    )


def add_step_flags(group, batch_size, rounds):
    """The flags of the step to be timed; `batch_size` and `rounds` are the defaults."""
    add_size_flag(group)
    group.add_argument(
        "--batch_size", type=positive, default=batch_size, metavar="N", help="The number of images per step."
    )
    precisions = ", ".join(DTYPES)
    group.add_argument(
        "--precision", type=one_of("precision", DTYPES), default="bf16", help=f"The precision is one of {precisions}."
    )
    group.add_argument(
        "--fp16_opt_level",
        type=one_of("opt level", OPT_LEVELS),
        default="O2",
        help="In 16 bits, this project runs at this opt level.",
    )
    add_round_flags(group, rounds)


def add_size_flag(group):
    group.add_argument(
        "--img_size", type=positive, default=224, metavar="PIXELS", help="The side of the square images in pixels."
    )


def add_round_flags(group, rounds):
    group.add_argument("--compile", action="store_true", help="Every model is compiled by torch.compile.")
    group.add_argument(
        "--rounds", type=positive, default=rounds, metavar="N", help="The number of timed rounds, after a warm-up."
    )


def add_clock_flag(group):
    group.add_argument(
        "--processor_time",
        action="store_true",
        help="For a CPU that other work shares: times are the processor seconds of this process divided by its number "
        "of threads, which should be one (OMP_NUM_THREADS=1).",
    )


def clock_of(args, device):
    """The clock in seconds. Raises UserError for the processor time of a GPU."""
    if not args.processor_time:
        return time.perf_counter
    if device.type != "cpu":
        raise UserError("--processor_time is for a CPU; it does not measure the work of a GPU")
    return lambda: time.process_time() / torch.get_num_threads()


def check_precision(name, device):
    """Raises UserError for float16 on a CPU or an Apple GPU."""
    if name == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs an NVIDIA GPU; use --precision bf16 for 16 bits elsewhere")


def forward_flops(model_type, img_size, **keywords):
    """FLOPs of the forward pass for one image. Raises UserError where the model can't be built."""
    with torch.device("meta"):
        return count_flops(make_model(model_type, img_size, NUM_CLASSES, **keywords), img_size)


def random_batch(batch_size, img_size, device):
    """Images float32 (B, 3, H, W) and labels int64 (B,)."""
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    return images, torch.randint(NUM_CLASSES, (batch_size,), device=device)


class TimedStep:
    """Forward pass and training step of a training script, to be timed on the same batch again and again.

    Dropout and stochastic depth are switched off, since models of other projects have none by default.
    """

    def __init__(self, model, args, num_classes, device):
        """`args` are the flags of a training script; `model` is moved and cast in place."""
        for layer in model.modules():
            if hasattr(layer, "seed_samples") and not getattr(layer, "stays_random", False):
                layer.rate = 0.0
        self.run = TrainState(model, args, one_process(device), num_steps=10**9, classes=range(num_classes))
        self.model, self.optimizer = model, self.run.optimizer

    @torch.no_grad()
    def forward(self, images):
        """Logits of images (B, 3, H, W)."""
        self.model.eval()
        with self.run.precision.autocast():
            return self.model(self.run.precision.inputs(images))

    def train(self, images, labels):
        self.model.train()
        train_step(self.run, itertools.repeat(MicroBatch(np.arange(len(images)), images, labels)))


def our_step(model, device, precision, level, compile=False, grad_checkpointing=False, train="all"):
    """The TimedStep of train.py at one of DTYPES and, in 16 bits, an opt level."""
    flags = ["--name", "benchmark", "--learning_rate", LEARNING_RATE, "--warmup_steps", 0, "--train", train]
    if precision != "fp32":
        flags += [f"--{precision}", "--fp16_opt_level", level]
    flags += ["--compile"] * compile + ["--grad_checkpointing"] * grad_checkpointing
    if compile:
        compile_for_fixed_shapes()
    return TimedStep(model, train_parser().parse_args([*map(str, flags)]), NUM_CLASSES, device)


def step_of(args, model, device):
    """`our_step` by the flags of `add_step_flags`."""
    check_precision(args.precision, device)
    return our_step(model, device, args.precision, args.fp16_opt_level, args.compile)


def compile_for_fixed_shapes():
    """Compile for each batch size separately, as in a run, also where several are timed."""
    torch._dynamo.config.automatic_dynamic_shapes = False


def machine():
    """The device, the CPU threads and the version of torch, for a title."""
    threads = torch.get_num_threads()
    return f"{device_name()}, {threads} CPU thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def setting(args):
    """`batch 8, bf16 at level O2, compiled`: the flags of `add_step_flags`, for a title."""
    return f"batch {args.batch_size}, {precision_text(args.precision, [args.fp16_opt_level], args.compile)}"


def precision_text(precision, levels, compiled):
    level = "" if precision == "fp32" else f" at level {' and '.join(levels)}"
    return f"{precision}{level}{', compiled' if compiled else ''}"


def state_bytes(step):
    """{"weights", "gradients", "optimizer"}: what a training step needs besides activations, after the first step.

    At level O2 the weights and their gradients have 16 bits; the float32 master weights count as the optimizer's,
    their gradients as gradients.
    """
    own = {id(p) for p in step.model.parameters()}
    masters = [p for group in step.optimizer.param_groups for p in group["params"] if id(p) not in own]
    state = [value for values in step.optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return {
        "weights": sum(tensor.nbytes for tensor in (*step.model.parameters(), *step.model.buffers())),
        "gradients": sum(p.nbytes for p in (*trained_parameters(step.model).values(), *masters)),
        "optimizer": sum(tensor.nbytes for tensor in (*masters, *state)),
    }


def training_memory(step, images, labels):
    """Bytes of a training step of a TimedStep or PeerStep that has run one before.

    On a GPU: the peak of the allocator, without what other models occupy. On a CPU: weights, gradients, optimizer
    state and the activations kept for the backward pass, which omits short-lived buffers.
    """
    state = state_bytes(step)
    if not images.is_cuda:
        return sum(state.values()) + activation_bytes(step.model, lambda: step.train(images, labels))
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    return state["weights"] + state["optimizer"] + gradients + peak_increase(lambda: step.train(images, labels))


def activations_per_image(step, img_size, device):
    """Bytes kept for the backward pass: two batches are compared, since some tensors are kept once per batch."""
    images, labels = random_batch(2, img_size, device)
    two, one = (activation_bytes(step.model, lambda n=n: step.train(images[:n], labels[:n])) for n in (2, 1))
    return two - one


def forward_memory(step, images):
    """Bytes of a forward pass on a GPU; None on a CPU, where nothing is kept that could be counted."""
    if not images.is_cuda:
        return None
    return state_bytes(step)["weights"] + peak_increase(lambda: step.forward(images))


def peak_increase(function):
    """By how many bytes the peak of PyTorch's allocator exceeds what is allocated before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_of(step, images, labels):
    """{pass: bytes}; None where the training step does not fit."""
    found = None
    if fits(step, images, labels):
        found = {FORWARD: forward_memory(step, images), TRAINING: training_memory(step, images, labels)}
    free_memory()
    return found


def fits(step, images, labels):
    """Whether a training step of these images fits in memory; what it took is free again. Always true on a CPU."""
    try:
        step.train(images, labels)  # also creates the optimizer's state
        if images.is_cuda:
            torch.cuda.synchronize()
        fitted = True
    except torch.OutOfMemoryError:
        fitted = False
    step.model.zero_grad()
    free_memory()
    return fitted


def free_memory():
    """Return the memory of deleted models to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def largest_batch(step, img_size, device):
    """The largest batch that fits, to an eighth of a power of two; 0 where one image does not fit."""

    def fits_with(size):
        return size <= LAST_TRIED and fits(step, *random_batch(size, img_size, device))

    size = FIRST_TRIED
    while size and not fits_with(size):
        size //= 2
    while size and fits_with(2 * size):
        size *= 2
    for part in (size // 2, size // 4, size // 8):
        if part and fits_with(size + part):
            size += part
    return size


def matrix_product(model_type, precision, batch_size, img_size, device):
    """(a function that multiplies matrices, its FLOPs, [rows, inputs, outputs]).

    The product is that of an MLP's first layer, or of a ResNet's first 1x1 convolution in its third stage.
    """
    with torch.device("meta"):
        model = make_model(model_type, img_size)
    if isinstance(model, BiTResNet):
        inputs = model.config.stage_widths[2]
        rows, outputs = batch_size * (-(-img_size // (4 * model.config.root_stride))) ** 2, inputs // 4
    else:
        rows = batch_size * model.pos_embed.shape[1]
        inputs, outputs = model.config.hidden_size, model.config.mlp_dim
    dtype = DTYPES[precision]
    x, weight = (torch.randn(count, inputs, device=device, dtype=dtype) for count in (rows, outputs))

    def multiply():
        for _ in range(PRODUCTS_PER_CALL):
            F.linear(x, weight)

    return multiply, PRODUCTS_PER_CALL * 2 * rows * inputs * outputs, [rows, inputs, outputs]


def reduction_grid(model_type, keep_tokens, reduction_layer, tome_r):
    """{(method, patches kept): (model type, keywords of `build_model`)} to compare the reductions of a ViT.

    The ViT without reduction is ("none", "all"); ToMe as published has each of `tome_r` in place of the patches kept.
    The last one is the ViT's Conformer, if there is one.
    """
    layer = {"reduction_layer": reduction_layer}
    grid = {("none", "all"): (model_type, {})}
    for keep in keep_tokens:
        for method in REDUCTION_METHODS:
            grid[method, keep] = (model_type, {"token_reduction": method, "keep_tokens": keep, **layer})
    for r in tome_r:
        grid[EVERY_BLOCK, f"r={r}"] = (model_type, {"token_reduction": "tome", "tome_r": r})
    conformer = model_type.replace("ViT", "Conformer")
    if conformer in CONFORMERS:
        grid[conformer, CONFORMERS[conformer].keep_tokens] = (conformer, layer)
    return grid


def choice_of_tokens(model, batch_size):
    """A function that only chooses the tokens of a ViT or Conformer, from random keys, to be timed."""
    weight, attention = model.blocks[0].attn.qkv.weight, model.blocks[0].attn
    size = (batch_size, attention.num_heads, model.pos_embed.shape[1], weight.shape[1] // attention.num_heads)
    keys = torch.randn(size, device=weight.device).to(weight.dtype)
    if not isinstance(model.reduction, EveryBlock):
        return lambda: cluster_tokens(keys, model.reduction)
    merged = model.reduction.merged
    left = [keys[:, :, sum(merged[:block]) :].contiguous() for block in range(len(merged))]
    return lambda: [match_tokens(tokens, count) for tokens, count in zip(left, merged, strict=True)]
