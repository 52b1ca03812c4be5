"""The training step with and without token reduction, and how well the kept tokens cover all of them.

A ViT without reduction, with each method at each number of tokens, with ToMe in every block, and the ViT's Conformer
are timed interleaved in one process. The second table is f(S) relative to an upper bound: for the tokens of facility
location, for those that ToMe merges the others into, and for random ones. scripts/token_study.py compares the accuracy
of such models.

    python benchmarks/token_reduction_speed.py --model_type ViT-B_16 --batch_size 8 --reduction_layer 4
    python benchmarks/token_reduction_speed.py --batch_size 128 --compile       # on a GPU
"""

import torch
import torch.nn.functional as F
from steps import NUM_CLASSES, add_step_flags, choice_of_tokens, machine, random_batch, reduction_grid, setting, step_of

from inference import SavedModel, make_model
from models.configs import VITS
from models.token_reduction import (
    Reduction,
    cluster_tokens,
    coverage,
    patches_to_keep,
    similarity,
    upper_bound,
)
from utils.data.images import images_below, read_image
from utils.errors import UserError, run_script
from utils.flag_groups import add_token_reduction_grid_flags
from utils.flag_types import Parser, one_of
from utils.parallel.processes import choose_device
from utils.profiling import markdown_table, time_interleaved, token_reduction_cells

RANDOM_DRAWS = 20


def main():
    args = parse_flags()
    device = choose_device()
    grid = reduction_grid(args.model_type, args.keep_tokens, args.reduction_layer, args.tome_r)
    with torch.device("meta"):  # reports wrong flags before the work
        for model_type, keywords in grid.values():
            make_model(model_type, args.img_size, NUM_CLASSES, **keywords)
    coverages = coverage_table(args, device) if args.checkpoint else ""
    print(
        f"{args.model_type} at {args.img_size}x{args.img_size}, tokens reduced after block {args.reduction_layer} of "
        f"{VITS[args.model_type].num_layers}, training step, {setting(args)}\n"
        f"{machine()}, median of {args.rounds} rounds\n\n{speed_table(args, grid, device)}{coverages}"
    )


def parse_flags():
    parser = Parser(__doc__.split("\n\n")[0])
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--model_type", type=one_of("ViT", VITS), default="ViT-B_16", metavar="NAME", help=", ".join(VITS)
    )
    add_token_reduction_grid_flags(group, reduction_layer=4, tome_r=[11, 16])  # about as fast as 50 and 25 % kept
    add_step_flags(group, batch_size=8, rounds=5)
    tokens = parser.add_argument_group("coverage")
    tokens.add_argument(
        "--checkpoint",
        default="checkpoint/ViT-Nano_4-digits.npz",
        metavar="FILE",
        help="An .npz named after its model, whose tokens are chosen from; '' omits this table.",
    )
    tokens.add_argument("--images", default="img/digits", metavar="DIR", help="Images for it, which form one batch.")
    return parser.parse_args()


def speed_table(args, grid, device):
    """Markdown: one row per model."""
    images, labels = random_batch(args.batch_size, args.img_size, device)
    functions = {}
    for name, (model_type, keywords) in grid.items():
        torch.manual_seed(0)
        model = make_model(model_type, args.img_size, NUM_CLASSES, **keywords)
        step = step_of(args, model, device)
        functions[name, "step"] = lambda step=step: step.train(images, labels)
        if model.reduction:
            functions[name, "choice"] = choice_of_tokens(model, args.batch_size)
    seconds = time_interleaved(functions, args.rounds, device)
    titles, cells = token_reduction_cells(grid, seconds, args.batch_size)
    return markdown_table(titles, cells.values())


@torch.no_grad()
def coverage_table(args, device):
    """Markdown: f(S) / upper bound at each number of tokens, the mean over the images."""
    saved = SavedModel.load(args.checkpoint).to(device)
    model = saved.model
    paths = images_below(args.images)
    images = torch.cat([saved.prepare(read_image(path)) for path in paths])
    if args.reduction_layer >= len(model.blocks):
        raise UserError(f"{args.checkpoint} has {len(model.blocks)} blocks, too few for this --reduction_layer")
    x = model.embed(images)
    for block in model.blocks[: args.reduction_layer]:
        x, keys = block(x, with_keys=True)
    s = similarity(keys[:, :, 1:].mean(dim=1, dtype=torch.float32))
    patches = s.shape[1]
    torch.manual_seed(0)
    rows = []
    for keep in args.keep_tokens:
        try:
            k = patches_to_keep(keep, patches)
        except ValueError as error:
            raise UserError(f"{args.checkpoint}: {error}; --checkpoint '' omits its table") from error
        rows.append([f"{k} of {patches}", *coverage_cells(s, keys, k)])
    titles = ["patches kept", "facility location", "ToMe", "ToMe, the best token of each cluster", "random"]
    return (
        f"\n\n{args.checkpoint} on the {len(paths)} images of {args.images}: f(S) / upper bound, mean and lowest; "
        f"{patches} patches, keys of block {args.reduction_layer}; for random patches the mean of {RANDOM_DRAWS} draws"
        f"\n\n{markdown_table(titles, rows)}"
    )


def coverage_cells(s, keys, k):
    """Mean and lowest f(S) / upper bound of k tokens by each choice, of similarities (B, N, N) and keys."""
    bound = upper_bound(s, k)
    clusters = {method: cluster_tokens(keys, Reduction(method, k, 0)) for method in ("facility", "tome")}
    chosen = [found.kept[:, 1:] - 1 for found in clusters.values()]
    chosen.append(medoids(s, clusters["tome"].assignment[:, 1:] - 1))
    ratios = [coverage(s, kept) / bound for kept in chosen]
    draws = [torch.rand(s.shape[:2], device=s.device).topk(k).indices for _ in range(RANDOM_DRAWS)]
    ratios.append(torch.stack([coverage(s, draw) for draw in draws]).mean(dim=0) / bound)
    return [f"{ratio.mean():.4f} ({ratio.min():.4f})" for ratio in ratios]


def medoids(s, assignment):
    """The member of each cluster that covers the others best: (B, k)."""
    members = F.one_hot(assignment).float()  # (B, N, k)
    return (s @ members).masked_fill(members == 0, -1).argmax(dim=1)


if __name__ == "__main__":
    run_script(main)
