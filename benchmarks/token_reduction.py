"""A training step with and without token reduction, in turns in one process, and how well the kept tokens cover all.

A ViT without reduction, by each method at each number of tokens, and the ViT's Conformer; then f(S) of facility
location, of the tokens that ToMe merges the others into, and of random ones, relative to an upper bound.

Images/s are medians of rounds. `x none` is the median over the rounds of the whole model's time divided by this one's;
the choice of tokens is part of a step, and its share is told.

    python benchmarks/token_reduction.py --model_type ViT-B_16 --batch_size 8 --reduction_layer 4
    python benchmarks/token_reduction.py --batch_size 128 --compile       # a GPU: also compiled
"""

import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from throughput import NUM_CLASSES, add_step_flags, ours, take_turns  # puts the repository on the path

from evaluate import load_published, make_model, prepare_image
from models.configs import CONFORMERS, VITS
from models.token_reduction import METHODS, Reduction, cluster_tokens, coverage, similarity, upper_bound
from utils.arguments import Parser, count_or_share, one_of, positive
from utils.augmentation import normalise
from utils.datasets import pictures_below, read_image
from utils.errors import UserError, run_script
from utils.tracking import device_name

RANDOM_DRAWS = 20


def main():
    args = parse_flags()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = contenders_of(args)
    for model_type, reduction in contenders.values():
        with torch.device("meta"):
            make_model(model_type, args.img_size, NUM_CLASSES, **reduction)  # a mistake shows before the work
    table = coverage_table(args, device) if args.checkpoint else None
    print(speed_table(args, contenders, device))
    if table:
        print(f"\n{table}")


def contenders_of(args):
    """{(name, patches kept): (model type, keywords of build_model)}; the ViT's Conformer where there is one."""
    layer = {"reduction_layer": args.reduction_layer}
    contenders = {("none", "all"): (args.model_type, {})}
    for keep in args.keep_tokens:
        for method in METHODS:
            reduction = {"token_reduction": method, "keep_tokens": keep, **layer}
            contenders[method, keep] = (args.model_type, reduction)
    conformer = args.model_type.replace("ViT", "Conformer")
    if conformer in CONFORMERS:
        contenders[conformer, CONFORMERS[conformer].keep_tokens] = (conformer, layer)
    return contenders


def parse_flags():
    parser = Parser(__doc__.split("\n\n")[0])
    group = parser.add_argument_group("benchmark")
    group.add_argument("--model_type", type=one_of("ViT", VITS), default="ViT-B_16", help=", ".join(VITS))
    group.add_argument(
        "--keep_tokens",
        type=count_or_share,
        nargs="+",
        default=[0.75, 0.5, 0.25],
        metavar="N",
        help="patches that stay, numbers or shares",
    )
    group.add_argument(
        "--reduction_layer", type=positive, default=4, metavar="N", help="blocks before the token reduction"
    )
    add_step_flags(group, batch_size=8, rounds=5)
    group.add_argument("--compile", action="store_true", help="time each model also compiled by torch.compile")
    tokens = parser.add_argument_group("coverage")
    tokens.add_argument(
        "--checkpoint",
        default="checkpoint/ViT-Nano_4-digits.npz",
        metavar="FILE",
        help="an .npz named after its model, whose tokens are chosen from; '' for no such table",
    )
    tokens.add_argument("--images", default="img/digits", metavar="DIR", help="pictures for it, all at once")
    return parser.parse_args()


def speed_table(args, contenders, device):
    """Markdown: a training step of each of `contenders_of`, and its choice of tokens alone."""
    torch._dynamo.config.recompile_limit = 64  # each model is another one
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    steps, choices = {}, {}
    for compiled in (False, True) if args.compile else (False,):
        for name, (model_type, reduction) in contenders.items():
            torch.manual_seed(0)
            model = make_model(model_type, args.img_size, NUM_CLASSES, **reduction)
            _, steps[*name, compiled] = ours(args, model, device, images, labels)
            if compiled:
                model.compile()
            elif model.reduction:
                choices[name] = choice_of(model, args.batch_size, device)
    seconds = take_turns({**steps, **choices}, args.rounds, device)
    lines = [
        f"{args.model_type} at {args.img_size}x{args.img_size}, tokens reduced after block {args.reduction_layer} of "
        f"{VITS[args.model_type].num_layers}, training step, batch {args.batch_size}, {args.precision}",
        f"{device_name()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"median of {args.rounds} rounds",
        "",
        "| token reduction | patches kept | compiled | x none | images/s | slowest to fastest round "
        "| choosing alone (ms) | share of the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, keep, compiled in steps:
        mine, choosing = seconds[name, keep, compiled], seconds.get((name, keep))
        pairs = zip(seconds["none", "all", compiled], mine, strict=True)
        cells = [
            name,
            str(keep),
            "yes" if compiled else "no",
            f"{statistics.median(whole / reduced for whole, reduced in pairs):.2f}",
            f"{args.batch_size / statistics.median(mine):.1f}",
            f"{args.batch_size / max(mine):.1f} to {args.batch_size / min(mine):.1f}",
            f"{1000 * statistics.median(choosing):.2f}" if choosing else "",
            f"{100 * statistics.median(choosing) / statistics.median(mine):.1f} %" if choosing else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_of(model, batch_size, device):
    """The choice of tokens alone, from random keys."""
    block, reduction = model.blocks[0], model.reduction
    heads, hidden = block.attn.num_heads, model.config.hidden_size
    keys = torch.randn(batch_size, heads, model.pos_embed.shape[1], hidden // heads, device=device)
    keys = keys.to(block.attn.qkv.weight.dtype)
    return lambda: cluster_tokens(keys, reduction)


@torch.no_grad()
def coverage_table(args, device):
    """Markdown: f(S) / upper bound at each number of tokens, the mean over the pictures."""
    model, _, img_size, _ = load_published(Path(args.checkpoint), None, None, False, None)
    paths = pictures_below(args.images)
    images = normalise(torch.stack([prepare_image(read_image(path), img_size) for path in paths]).to(device))
    if args.reduction_layer >= len(model.blocks):
        raise UserError(f"{args.checkpoint} has {len(model.blocks)} blocks, too few for this --reduction_layer")
    model.to(device).eval()
    x = model.embed(images)
    for block in model.blocks[: args.reduction_layer]:
        x, keys = block.forward_with_keys(x)
    s = similarity(keys[:, :, 1:].mean(dim=1, dtype=torch.float32))
    patches = s.shape[1]
    torch.manual_seed(0)
    lines = [
        f"{args.checkpoint} on the {len(paths)} pictures of {args.images}: f(S) / upper bound, mean and lowest; "
        f"{patches} patches, keys of block {args.reduction_layer}; of random patches the mean of {RANDOM_DRAWS} draws",
        "",
        "| patches kept | facility location | ToMe | ToMe, the best token of each cluster | random |",
        "|---|---|---|---|---|",
    ]
    for share in args.keep_tokens:
        k = share if isinstance(share, int) else max(1, round(share * patches))
        bound = upper_bound(s, k)
        clusters = {method: cluster_tokens(keys, Reduction(method, k, 0)) for method in METHODS}
        chosen = [found.kept[:, 1:] - 1 for found in clusters.values()]
        chosen.append(medoids(s, clusters["tome"].assignment[:, 1:] - 1))
        cells = [text_of(coverage(s, kept) / bound) for kept in chosen]
        draws = [torch.rand(len(s), patches, device=device).topk(k).indices for _ in range(RANDOM_DRAWS)]
        cells.append(text_of(torch.stack([coverage(s, draw) for draw in draws]).mean(dim=0) / bound))
        lines.append(f"| {k} of {patches} | {' | '.join(cells)} |")
    return "\n".join(lines)


def medoids(s, assignment):
    """The member of each cluster that covers the others best: (B, k)."""
    members = F.one_hot(assignment).float()  # (B, N, k)
    return (s @ members).masked_fill(members == 0, -1).argmax(dim=1)


def text_of(ratios):
    return f"{ratios.mean():.4f} ({ratios.min():.4f})"


if __name__ == "__main__":
    run_script(main)
