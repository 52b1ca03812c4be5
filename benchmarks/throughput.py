"""Images/s of a model's forward pass and full training step, beside timm's and transformers' model of the same shape.

All run in one process in turns, so that a machine's moods hit them alike; medians are reported. The achieved FLOP/s
stand beside those of a matrix product of the model's own MLP size and precision, measured in the same turns.

    python benchmarks/throughput.py --model_type ViT-B_16 --batch_size 16 --precision bf16
"""

import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import make_model
from models import MODEL_TYPES, canonical_model_type
from models.bit_resnet import BiTResNet
from models.dropout import Dropout
from utils.arguments import Parser, argument, one_of, positive
from utils.distributed import choose_device
from utils.errors import run_script
from utils.precision import OPT_LEVELS, Precision
from utils.profiling import count_flops
from utils.tracking import device_name
from utils.training import compile_in_place

TIMM = {
    "ViT-Ti_16": "vit_tiny_patch16_224",
    "ViT-S_16": "vit_small_patch16_224",
    "ViT-S_32": "vit_small_patch32_224",
    "ViT-B_8": "vit_base_patch8_224",
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-B_32": "vit_base_patch32_224",
    "ViT-L_16": "vit_large_patch16_224",
    "ViT-L_32": "vit_large_patch32_224",
    "ViT-H_14": "vit_huge_patch14_224",
    "R-ViT-Ti_16": "vit_tiny_r_s16_p8_224",
    "R26-ViT-S_32": "vit_small_r26_s32_224",
    "R26-ViT-B_32": "vit_base_r26_s32_224",
    "R50-ViT-B_16": "vit_base_r50_s16_224",
    "R50-ViT-L_32": "vit_large_r50_s32_224",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 10


def main():
    args = parse_flags()
    flops = forward_flops(args.model_type, args.img_size)
    torch.manual_seed(0)
    model = make_model(args.model_type, args.img_size, NUM_CLASSES)
    shape = matrix_product_shape(model, args)
    device = choose_device()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    contenders = {}
    for name, make in (("this project", ours), ("timm", timms), ("transformers", transformers_vit)):
        steps = make(args, model, device, images, labels)
        if steps:
            contenders[name, "forward"], contenders[name, "training step"] = steps
    contenders["matrix product", ""] = matrix_product(shape, args, device)
    seconds = take_turns(contenders, args.rounds, device)
    print(report(args, seconds, flops, shape))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-B_16", help=names)
    add_step_flags(group, batch_size=16, rounds=7)
    return parser.parse_args()


def add_step_flags(group, batch_size, rounds):
    """The flags of what is timed; `batch_size` and `rounds` are the defaults."""
    group.add_argument("--img_size", type=positive, default=224, help="side of the square images in pixels")
    group.add_argument("--batch_size", type=positive, default=batch_size, help="images at once")
    group.add_argument("--precision", type=one_of("precision", DTYPES), default="bf16", help=", ".join(DTYPES))
    group.add_argument(
        "--fp16_opt_level", type=one_of("opt level", OPT_LEVELS), default="O2", help="this project's, in 16 bits"
    )
    group.add_argument("--compile", action="store_true", help="compile every model by torch.compile")
    group.add_argument("--rounds", type=positive, default=rounds, help="turns that are timed, after one that is not")


def ours(args, model, device, images, labels):
    """(forward, training step) as train.py runs them, but without dropout."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = 0.0  # timm's default
    level = "O0" if args.precision == "fp32" else args.fp16_opt_level
    precision = Precision(level, DTYPES[args.precision], device)
    optimizer = precision.prepare(model, momentum_sgd)
    if args.compile:
        compile_in_place(model)

    def forward():
        model.eval()
        with torch.no_grad(), precision.autocast():
            model(precision.inputs(images))

    def train(images=images, labels=labels):
        model.train()
        with precision.autocast():
            logits = model(precision.inputs(images)).float()
        precision.backward(F.cross_entropy(logits, labels))
        precision.step(optimizer, max_grad_norm=1.0)

    return forward, train


def momentum_sgd(named):
    return torch.optim.SGD([p for _, p in named], lr=1e-3, momentum=0.9, fused=True)


def timms(args, model, device, images, labels):
    """timm's model of the same shape; a ResNet is its resnetv2_50x3_bit with this model's layers and channels."""
    if isinstance(model, BiTResNet) and model.config.root_stride == 4:
        factor = model.config.root_width // 64
        model = ResNetV2(
            model.config.resnet_layers,
            channels=[width // factor for width in model.config.stage_widths],
            num_classes=NUM_CLASSES,
            width_factor=factor,
            stem_type="fixed",
            conv_layer=functools.partial(StdConv2d, eps=1e-8),
        )
    elif args.model_type in TIMM:
        model = timm.create_model(TIMM[args.model_type], img_size=args.img_size, num_classes=NUM_CLASSES)
    else:
        return None
    model.to(device)
    return eager_autocast(model, model, args, device, images, labels)


def transformers_vit(args, model, device, images, labels):
    """transformers' ViT of the same size, where that package is installed."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        return None
    ours = model.config
    if ours.resnet_layers is not None:
        return None
    config = ViTConfig(
        hidden_size=ours.hidden_size,
        intermediate_size=ours.mlp_dim,
        num_attention_heads=ours.num_heads,
        num_hidden_layers=ours.num_layers,
        patch_size=ours.patch_size,
        image_size=args.img_size,
        num_labels=NUM_CLASSES,
        hidden_act="gelu_pytorch_tanh",
    )
    model = ViTForImageClassification(config).to(device)
    return eager_autocast(model, lambda x: model(x).logits, args, device, images, labels)


def eager_autocast(model, call, args, device, images, labels):
    """(forward, training step) of a model in ordinary PyTorch: autocast, clipping by norm, momentum SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if args.compile:
        compile_in_place(model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    def autocast():
        if args.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, DTYPES[args.precision])

    def forward():
        model.eval()
        with torch.no_grad(), autocast():
            call(images)

    def train():
        model.train()
        with autocast():
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return forward, train


def forward_flops(model_type, img_size):
    """Of one image. Raises UserError where the model can't be built, before anything that takes time."""
    with torch.device("meta"):
        return count_flops(make_model(model_type, img_size, NUM_CLASSES), img_size)


def matrix_product_shape(model, args):
    """(rows, inputs, outputs) of an MLP's first layer, or of a ResNet's 1x1 convolution in its third stage."""
    if isinstance(model, BiTResNet):
        side, width = -(-args.img_size // (4 * model.config.root_stride)), model.config.stage_widths[2]
        return args.batch_size * side**2, width, width // 4
    return args.batch_size * model.pos_embed.shape[1], model.config.hidden_size, model.config.mlp_dim


def matrix_product(shape, args, device):
    tokens, hidden, mlp = shape
    dtype = DTYPES[args.precision]
    x, weight = (
        torch.randn(tokens, hidden, device=device, dtype=dtype),
        torch.randn(mlp, hidden, device=device, dtype=dtype),
    )

    def multiply():
        for _ in range(20):
            F.linear(x, weight)

    return multiply


def take_turns(contenders, rounds, device):
    """{contender: [seconds of each round]}; the first round only warms up.

    On a GPU a round is ten steps, which its queue takes one after the other as in training.
    """
    steps = 10 if device.type == "cuda" else 1
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            synchronise(device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronise(device)
            if turn:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(args, seconds, flops, shape):
    """A Markdown table; `x timm` is the median over the rounds of timm's time divided by this one's."""
    tokens, hidden, mlp = shape
    peak = 20 * 2 * tokens * hidden * mlp / statistics.median(seconds["matrix product", ""])
    flops = {"forward": flops, "training step": 3 * flops}
    level = "" if args.precision == "fp32" else f" (this project at {args.fp16_opt_level}, the others by autocast)"
    optimizers = "momentum SGD, by this project PyTorch's fused one, by the others its default"
    lines = [
        f"{args.model_type} at {args.img_size}x{args.img_size}, batch {args.batch_size}, {args.precision}{level}"
        f"{compiled(args)}",
        f"{device_name()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, timm {timm.__version__}; "
        f"{optimizers}; "
        f"median of {args.rounds} rounds; a matrix product of {tokens} x {hidden} x {mlp} runs at "
        f"{peak / 1e9:.0f} GFLOP/s",
        "",
        "| pass | model | x timm | images/s | slowest to fastest round | share of the matrix product's FLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for (name, task), times in seconds.items():
        if task:
            speed = args.batch_size / statistics.median(times)
            spread = f"{args.batch_size / max(times):.1f} to {args.batch_size / min(times):.1f}"
            share = f"{100 * speed * flops[task] / peak:.0f} %"
            lines.append(f"| {task} | {name} | {ratio(seconds, name, task)} | {speed:.1f} | {spread} | {share} |")
    return "\n".join(lines)


def compiled(args):
    return ", compiled" if args.compile else ""


def ratio(seconds, name, task):
    if ("timm", task) not in seconds:
        return ""
    pairs = zip(seconds["timm", task], seconds[name, task], strict=True)
    return f"{statistics.median(theirs / mine for theirs, mine in pairs):.2f}"


if __name__ == "__main__":
    run_script(main)
