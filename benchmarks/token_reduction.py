"""A training step with and without token reduction, in turns in one process, and how well the kept tokens cover all.

A ViT without reduction, by each method at each number of tokens, and the ViT's Conformer; then f(S) of facility
location, of the tokens that ToMe merges the others into, and of random ones, relative to an upper bound.

Images/s are medians of rounds. `x none` is the median over the rounds of the whole model's time divided by this one's;
the choice of tokens is part of a step, and its share is told. `--runs` adds the test accuracy of runs of these models
(scripts/token_reduction.py makes some), and `--picture` draws it over images/s.

    python benchmarks/token_reduction.py --model_type ViT-B_16 --batch_size 8 --reduction_layer 4
    python benchmarks/token_reduction.py --batch_size 128 --compile       # on a GPU
"""

import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from steps import NUM_CLASSES, add_step_flags, compiled, ours, take_turns  # puts the repository on the path

from evaluate import load_published, make_model, prepare_image
from models.configs import CONFORMERS, VITS
from models.token_reduction import (
    METHODS,
    Reduction,
    cluster_tokens,
    coverage,
    patches_to_keep,
    similarity,
    upper_bound,
)
from utils.arguments import Parser, add_reductions_flags, check_picture_path, one_of, reduction_of
from utils.data.augmentation import normalise
from utils.data.images import pictures_below, read_image
from utils.errors import UserError, run_script
from utils.parallel.processes import choose_device
from utils.records.tracker import device_name, read_run
from utils.sweeps import spread
from utils.visualize import OKABE_ITO, save, tidy, wrapped

RANDOM_DRAWS = 20
SAME = ("dataset", "data_dir", "examples_per_class", "num_steps", "train_batch_size")  # of runs that are compared
LABELS = {"none": "ViT, all patches", "facility": "facility location", "tome": "ToMe"}


def main():
    args = parse_flags()
    device = choose_device()
    contenders = contenders_of(args)
    for model_type, reduction in contenders.values():
        with torch.device("meta"):
            make_model(model_type, args.img_size, NUM_CLASSES, **reduction)  # a mistake shows before the work
    accuracies = accuracies_of(args.runs, contenders, args.img_size)
    table = coverage_table(args, device) if args.checkpoint else None
    seconds = time_steps(args, contenders, device)
    title = (
        f"{args.model_type} at {args.img_size}x{args.img_size}, tokens reduced after block {args.reduction_layer} of "
        f"{VITS[args.model_type].num_layers}, training step, batch {args.batch_size}, {args.precision}"
        f"{compiled(args)}\n"
        f"{device_name()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"median of {args.rounds} rounds"
    )
    print(f"{title}\n\n{speed_table(args, seconds, contenders, accuracies)}")
    if table:
        print(f"\n{table}")
    if args.picture:
        speeds = {name: args.batch_size / statistics.median(seconds[name, "step"]) for name in accuracies}
        save(draw(speeds, accuracies, title), args.picture)


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
    add_reductions_flags(group, reduction_layer=4)
    add_step_flags(group, batch_size=8, rounds=5)
    group.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="folders of finished runs of these models, any seeds"
    )
    group.add_argument("--picture", metavar="PNG", help="draw the runs' test accuracy over images/s")
    tokens = parser.add_argument_group("coverage")
    tokens.add_argument(
        "--checkpoint",
        default="checkpoint/ViT-Nano_4-digits.npz",
        metavar="FILE",
        help="an .npz named after its model, whose tokens are chosen from; '' for no such table",
    )
    tokens.add_argument("--images", default="img/digits", metavar="DIR", help="pictures for it, all at once")
    args = parser.parse_args()
    if args.picture:
        check_picture_path(args.picture, "--picture")
        if not args.runs:
            raise UserError("--picture needs --runs")
    return args


def accuracies_of(runs, contenders, img_size):
    """{contender: [test accuracy at the end of each of its runs]}. Raises UserError for a run of another model."""
    found, tasks = {}, set()
    for run in runs:
        flags, metrics = read_run(run)
        tasks.add(tuple(str(flags.get(name)) for name in SAME))
        if len(tasks) > 1 or flags["img_size"] != img_size or flags.get("norm_type", "LN") != "LN":
            raise UserError(
                f"{run} is not to be compared: the runs need LN, this --img_size, and equal {', '.join(SAME)}"
            )
        model_type, given = flags["model_type"], reduction_of(flags)
        for name, (wanted_type, wanted) in contenders.items():
            default = CONFORMERS[model_type].reduction_layer if model_type in CONFORMERS else None
            layer = given.get("reduction_layer", default)
            same = all(wanted.get(key) == given.get(key) for key in ("token_reduction", "keep_tokens"))
            if wanted_type == model_type and same and layer == wanted.get("reduction_layer"):
                found.setdefault(name, []).append(metrics["test_accuracy"][-1])
                break
        else:
            raise UserError(
                f"{run} is a run of {model_type} with {given or 'no token reduction'}, which is not timed here"
            )
    return {name: found[name] for name in contenders if name in found}


def time_steps(args, contenders, device):
    """Seconds of each round: {(contender, "step"): of a training step, (contender, "choice"): of its choice alone}."""
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    steps = {}
    for name, (model_type, reduction) in contenders.items():
        torch.manual_seed(0)
        model = make_model(model_type, args.img_size, NUM_CLASSES, **reduction)
        _, steps[name, "step"] = ours(args, model, device, images, labels)
        if model.reduction:
            steps[name, "choice"] = choice_of(model, args.batch_size, device)
    return take_turns(steps, args.rounds, device)


def speed_table(args, seconds, contenders, accuracies):
    """Markdown, a row for each model."""
    lines = [
        "| token reduction | patches kept | x none | images/s | slowest to fastest round "
        "| choosing alone (ms) | share of the step |",
        "|---|---|---|---|---|---|---|",
    ]
    if accuracies:
        lines = [f"{lines[0]} test accuracy |", f"{lines[1]}---|"]
    for name in contenders:
        mine, choosing = seconds[name, "step"], seconds.get((name, "choice"))
        pairs = zip(seconds[("none", "all"), "step"], mine, strict=True)
        cells = [
            *map(str, name),
            f"{statistics.median(whole / reduced for whole, reduced in pairs):.2f}",
            f"{args.batch_size / statistics.median(mine):.1f}",
            f"{args.batch_size / max(mine):.1f} to {args.batch_size / min(mine):.1f}",
            f"{1000 * statistics.median(choosing):.2f}" if choosing else "",
            f"{100 * statistics.median(choosing) / statistics.median(mine):.1f} %" if choosing else "",
        ]
        if accuracies:
            cells.append(spread(accuracies[name]) if name in accuracies else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(speeds, accuracies, title):
    """Test accuracy over images/s: a line for each method, from the whole ViT to the fewest tokens."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(method for method, _ in accuracies))
    colours = (OKABE_ITO[-1], *OKABE_ITO)  # the whole ViT is black
    for number, (method, colour) in enumerate(zip(methods, colours, strict=False)):
        names = [name for name in accuracies if name[0] == method]
        x = [speeds[name] for name in names]
        ranges = 100 * np.array(
            [(min(values), statistics.mean(values), max(values)) for values in map(accuracies.get, names)]
        )
        low, y, high = ranges.T
        if method in METHODS and ("none", "all") in accuracies:
            whole = ("none", "all")
            axes.plot([speeds[whole], x[0]], [100 * statistics.mean(accuracies[whole]), y[0]], ":", color=colour, lw=1)
        axes.errorbar(x, y, (y - low, high - y), marker="o", color=colour, capsize=3, label=LABELS.get(method, method))
        for name, *place in zip(names, x, y, strict=True):
            axes.annotate(
                str(name[1]),
                place,
                (5, -13 if number % 2 else 6),
                textcoords="offset points",
                fontsize="small",
                color=colour,
            )
    axes.set(xlabel="training step (images/s)", ylabel="test accuracy (%)")
    axes.margins(0.12)
    axes.legend(frameon=False, title="numbers: patches kept")
    tidy(axes)
    figure.suptitle(wrapped(title, 90), fontsize="small")
    return figure


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
        x, keys = block(x, with_keys=True)
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
        try:
            k = patches_to_keep(share, patches)
        except ValueError as error:
            raise UserError(f"{args.checkpoint}: {error}; --checkpoint '' leaves its table away") from error
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
