"""Images/s of the forward pass and the full training step, beside timm, transformers and lucidrains' vit-pytorch.

Before anything is timed, each of them gets our weights and must return our logits (benchmarks/peers.py). Then all run
in one process in turns, so that a machine's moods hit them alike; medians over the rounds are reported, with the
slowest and the fastest. The achieved FLOP/s stand beside those of a matrix product of the model's own MLP size and
precision, measured in the same turns. A training step is forward, loss, backward, clipping, optimizer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py --model_type ViT-B_16 --batch_size 16 --precision bf16
    python benchmarks/throughput.py --model_type ViT-B_16 R50-ViT-B_16 ResNet50x3_Params --precision bf16 fp16 \\
        --fp16_opt_level O1 O2 --batch_size 1 16 64 256 max --output benchmarks/results/my-gpu.md --json my-gpu.json
"""

import contextlib
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import BOUND, logits_of, peers, versions
from steps import (
    DTYPES,
    LEARNING_RATE,
    NUM_CLASSES,
    OurStep,
    add_clock_flag,
    add_size_flag,
    add_turn_flags,
    check_precision,
    clock_of,
    clock_text,
    compile_for_fixed_shapes,
    fits,
    forward_flops,
    forward_memory,
    free,
    machine,
    make_model,
    memory_title,
    random_batch,
    ratio,
    speed_cells,
    take_turns,
    training_memory,
)

from models import MODEL_TYPES, canonical_model_type
from models.bit_resnet import BiTResNet
from utils.arguments import Parser, argument, one_of, positive
from utils.errors import UserError, run_script
from utils.parallel.precision import OPT_LEVELS
from utils.parallel.processes import choose_device

OURS = "this project"
LARGEST, FIRST_TRIED, LAST_TRIED = "max", 64, 2**14  # batch sizes
PASSES = {"forward": 1, "training step": 3}  # FLOPs, in forward passes


def main():
    args = parse_flags()
    device = choose_device()
    check(args, device)
    results = []
    for model_type in args.model_type:
        flops = forward_flops(model_type, args.img_size)
        torch.manual_seed(0)
        model = make_model(model_type, args.img_size, NUM_CLASSES)
        modules = peers(model_type, model, args.img_size)
        for precision in args.precision:
            steps = {**our_steps(args, model, precision, device), **peer_steps(args, modules, precision, device)}
            for batch_size in args.batch_sizes:
                setting = {"model_type": model_type, "img_size": args.img_size, "precision": precision}
                result = measure(args, setting, steps, batch_size, flops, product_shape(model, args.img_size), device)
                results.append(result)
                publish(args, results)
            del steps
            free(device)


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    names = ", ".join(MODEL_TYPES)
    several = {"nargs": "+", "metavar": "NAME"}
    group.add_argument("--model_type", type=argument(canonical_model_type), default=["ViT-B_16"], help=names, **several)
    add_size_flag(group)
    group.add_argument(
        "--batch_sizes",
        "--batch_size",
        type=batch_size_of,
        nargs="+",
        default=[16],
        metavar="N",
        help=f"images at once; {LARGEST} is the largest batch that fits a GPU in the training step of all models",
    )
    names = ", ".join(DTYPES)
    group.add_argument(
        "--precision",
        type=one_of("precision", DTYPES),
        default=["bf16"],
        help=f"{names}; in 16 bits the others run by autocast",
        **several,
    )
    group.add_argument(
        "--fp16_opt_level",
        type=one_of("opt level", OPT_LEVELS),
        default=["O2"],
        help="this project's, in 16 bits; several are timed beside each other",
        **several,
    )
    add_turn_flags(group, rounds=7)
    add_clock_flag(group)
    group.add_argument("--output", metavar="FILE", help="append the Markdown tables to this file")
    group.add_argument("--json", metavar="FILE", help="write the results there, with the seconds of every round")
    return parser.parse_args()


def batch_size_of(text):
    return text if text == LARGEST else positive(text)


def check(args, device):
    """Raises UserError, before any work, for what can't be measured or written."""
    for model_type in args.model_type:
        forward_flops(model_type, args.img_size)
    for precision in args.precision:
        check_precision(precision, device)
    clock_of(args, device)
    if LARGEST in args.batch_sizes and device.type == "cpu":
        print(f"--batch_size {LARGEST} is left out: it is for a GPU's memory", file=sys.stderr)
        args.batch_sizes = [size for size in args.batch_sizes if size != LARGEST]
        if not args.batch_sizes:
            raise UserError("no --batch_size is left; give a number")
    for flag in ("output", "json"):
        path = getattr(args, flag)
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise UserError(f"--{flag} {path} can't be written; give a file in a folder that exists")


def our_steps(args, model, precision, device):
    """{name: OurStep} for each opt level."""
    levels = [None] if precision == "fp32" else args.fp16_opt_level
    names = [OURS] if len(levels) == 1 else [f"{OURS}, {level}" for level in levels]
    return {
        name: OurStep(copy.deepcopy(model), precision, level, device, args.compile)
        for name, level in zip(names, levels, strict=True)
    }


def peer_steps(args, modules, precision, device):
    return {name: PeerStep(copy.deepcopy(module), precision, device, args.compile) for name, module in modules.items()}


class PeerStep:
    """As OurStep, in ordinary PyTorch: autocast, clipping by norm, momentum SGD as it is by default."""

    def __init__(self, model, precision, device, compile=False):
        self.model = model.to(device)
        self.dtype = None if precision == "fp32" else DTYPES[precision]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if compile:
            compile_for_fixed_shapes(model)

    def autocast(self, images):
        return torch.autocast(images.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    @torch.no_grad()
    def forward(self, images):
        self.model.eval()
        with self.autocast(images):
            return logits_of(self.model(images))

    def train(self, images, labels):
        self.model.train()
        with self.autocast(images):
            loss = F.cross_entropy(logits_of(self.model(images)), labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def measure(args, setting, steps, batch_size, flops, shape, device):
    """One table as a dictionary; `shape` is (rows an image, inputs, outputs) of the matrix product beside it."""
    largest = {}
    if batch_size == LARGEST:
        largest = {name: largest_batch(step, args.img_size, device) for name, step in steps.items()}
        batch_size = min(largest.values())
        if not batch_size:
            raise UserError(f"{setting['model_type']} does not fit this GPU beside its peers at one image")
    images, labels = random_batch(batch_size, args.img_size, device)
    memory, out_of_memory = {}, []
    for name, step in steps.items():
        if fits(step, images, labels, device):
            memory[name, "forward"] = forward_memory(step, images)
            memory[name, "training step"] = training_memory(step, images, labels)
        else:
            out_of_memory.append(name)
        free(device)
    contenders = {}
    for name in steps:
        if name not in out_of_memory:
            contenders[name, "forward"] = lambda step=steps[name]: step.forward(images)
            contenders[name, "training step"] = lambda step=steps[name]: step.train(images, labels)
    rows, inputs, outputs = batch_size * shape[0], *shape[1:]
    repeats = 20
    contenders["matrix product", ""] = matrix_product(rows, inputs, outputs, setting["precision"], repeats, device)
    seconds = take_turns(contenders, args.rounds, device, clock_of(args, device))
    peak = repeats * 2 * rows * inputs * outputs / statistics.median(seconds.pop(("matrix product", "")))
    return {
        **setting,
        "batch_size": batch_size,
        "largest_batch": largest,
        "opt_levels": args.fp16_opt_level,
        "compiled": args.compile,
        "rounds": f"{args.rounds} rounds{clock_text(args)}",
        "machine": machine(),
        "versions": versions(),
        "memory": memory_title(device),
        "matrix_product": {"shape": [rows, inputs, outputs], "flops_per_second": peak},
        "out_of_memory": out_of_memory,
        "rows": [
            {
                "pass": task,
                "model": name,
                "x_timm": ratio(seconds["timm", task], times) if ("timm", task) in seconds else None,
                "images_per_second": batch_size / statistics.median(times),
                "share_of_matrix_product": batch_size * PASSES[task] * flops / statistics.median(times) / peak,
                "memory_bytes": memory[name, task],
                "seconds": times,
            }
            for (name, task), times in seconds.items()
        ],
    }


def product_shape(model, img_size):
    """(rows an image, inputs, outputs) of an MLP's first layer, or of a ResNet's 1x1 convolution in its third stage."""
    if isinstance(model, BiTResNet):
        side, width = -(-img_size // (4 * model.config.root_stride)), model.config.stage_widths[2]
        return side**2, width, width // 4
    return model.pos_embed.shape[1], model.config.hidden_size, model.config.mlp_dim


def matrix_product(rows, inputs, outputs, precision, repeats, device):
    dtype = DTYPES[precision]
    x, weight = (torch.randn(count, inputs, device=device, dtype=dtype) for count in (rows, outputs))

    def multiply():
        for _ in range(repeats):
            F.linear(x, weight)

    return multiply


def largest_batch(step, img_size, device):
    """Doubled until memory runs out, then to an eighth of it; 0 where one image does not fit."""

    def fits_with(size):
        return size <= LAST_TRIED and fits(step, *random_batch(size, img_size, device), device)

    size = FIRST_TRIED
    while size and not fits_with(size):
        size //= 2
    if not size:
        return 0
    while fits_with(2 * size):
        size *= 2
    for part in (size // 2, size // 4, size // 8):
        if part and fits_with(size + part):
            size += part
    return size


def publish(args, results):
    """The newest result as Markdown, and all of them as JSON."""
    text = report(results[-1])
    print(text + "\n", flush=True)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


def report(result):
    """A Markdown table; `x timm` is the median over the rounds of timm's time divided by this one's."""
    levels = " and ".join(result["opt_levels"])
    level = "" if result["precision"] == "fp32" else f" (this project at {levels}, the others by autocast)"
    compiling = ", compiled" if result["compiled"] else ""
    side, product = result["img_size"], result["matrix_product"]
    lines = [
        f"{result['model_type']} at {side}x{side}, batch {result['batch_size']}, {result['precision']}{level}"
        f"{compiling}",
        f"{result['machine']}, {result['versions']}; momentum SGD, by this project PyTorch's fused one, by the others "
        f"its default; median of {result['rounds']}; logits equal to {BOUND:.0e} before; a matrix product of "
        f"{' x '.join(map(str, product['shape']))} runs at {product['flops_per_second'] / 1e9:.0f} GFLOP/s",
    ]
    if result["largest_batch"]:
        sizes = ", ".join(f"{name} {size}" for name, size in result["largest_batch"].items())
        lines.append(f"largest batches whose training step fits, one model beside the others' weights: {sizes}")
    if result["out_of_memory"]:
        lines.append(f"out of memory: {', '.join(result['out_of_memory'])}")
    titles = ["pass", "model", "x timm", "images/s", "slowest to fastest round"]
    titles += ["share of the matrix product's FLOP/s", result["memory"]]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in result["rows"]:
        cells = [
            row["pass"],
            row["model"],
            "" if row["x_timm"] is None else f"{row['x_timm']:.2f}",
            *speed_cells(result["batch_size"], row["seconds"]),
            f"{100 * row['share_of_matrix_product']:.0f} %",
            "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
