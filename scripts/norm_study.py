"""Does a ViT need LayerNorm? Architectures x norms x {from scratch, pretrained} on one data set, by train.py.

Ends in a table (table.md, table.csv), the curves of all norms over each other and the attention maps of each. With
several GPUs as many runs are at work, without one a run follows the other. The same command goes on where it was broken
off and tries again what failed; finished runs are not run again.

    python scripts/norm_study.py --bf16 --download
"""

import csv
import itertools
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from evaluate import load_model
from models import NORM_TYPES, canonical_model_type
from models.configs import VITS
from utils.arguments import Parser, argument, one_of, positive
from utils.data.augmentation import denormalise
from utils.data.datasets import DATASETS
from utils.errors import UserError, run_script
from utils.parallel.processes import Processes, choose_device
from utils.records.checkpoint import LAST
from utils.records.tracker import read_config, read_metrics
from utils.sweeps import check_plan, data_name, finish, is_finished, plan_run, raise_failures
from utils.visualize import attention_of, class_token_mask, plot_attention_rows, plot_runs, save
from visualize import blocks_to_draw, caption, check_output

REPORTED = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32")
RECIPE = {  # that of the reported tables
    "dataset": "cifar10",
    "num_steps": 20000,
    "train_batch_size": 128,
    "img_size": 224,
    "learning_rate": 0.05,
    "eval_every": 500,
}
COLUMNS = (
    "model_type",
    "start",
    "norm_type",
    "test_accuracy",
    "best_test_accuracy",
    "seconds",
    "images_per_second",
)
STARTS = {"scratch": "from scratch", "pretrained": "pretrained"}
OURS = {  # flags of train.py that the study gives each run itself: what to give instead
    "--name": "the runs are named by the study",
    "--model_type": "give --model_types",
    "--norm_type": "give --norm_types",
    "--resume": "the study always resumes",
    "--overwrite": "give another --output_dir",
    "--local_rank": "give each run one GPU by CUDA_VISIBLE_DEVICES",
    "--local-rank": "give each run one GPU by CUDA_VISIBLE_DEVICES",
}


def main():
    args, further = parse_flags()
    runs = plan(args, further)
    check_plan(train, runs.values(), files=not args.dry_run)
    if args.dry_run:
        for run in runs.values():
            if not is_finished(run):
                print(shlex.join(run.command))
        return
    for folder, flag in ((args.output_dir, "--output_dir"), (args.figures, "--figures")):
        check_output(folder, flag)
    failed = finish(runs.values())
    finished = {key: run for key, run in runs.items() if is_finished(run)}
    if finished:
        write_table(runs, finished, args.output_dir)
        draw_figures(finished, args)
    raise_failures(failed, len(runs))


def parse_flags():
    """The study's own flags, and the others, which are train.py's."""
    parser = Parser(__doc__.split("\n\n    ")[0])
    default = " ".join(f"--{flag} {value}" for flag, value in RECIPE.items())
    parser.epilog = f"Every other flag is train.py's and goes there unchanged (default: {default})."
    group = parser.add_argument_group("study")
    group.add_argument(
        "--model_types",
        type=argument(canonical_model_type),
        nargs="+",
        default=REPORTED,
        metavar="NAME",
        help=f"{', '.join(VITS)}; default: {' '.join(REPORTED)}",
    )
    group.add_argument(
        "--norm_types",
        type=one_of("norm type", NORM_TYPES),
        nargs="+",
        default=NORM_TYPES,
        metavar="NORM",
        help=f"{', '.join(NORM_TYPES)}; default: all",
    )
    group.add_argument(
        "--starts",
        type=one_of("start", STARTS),
        nargs="+",
        default=tuple(STARTS),
        metavar="START",
        help=f"{', '.join(STARTS)}; default: both",
    )
    group.add_argument(
        "--pretrained_dir",
        default="checkpoint/{model_type}.npz",
        metavar="FILE",
        help="weights that pretrained runs start with; {model_type} stands for the architecture",
    )
    group.add_argument("--download", action="store_true", help="fetch Google's weights where they do not exist yet")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", type=Path, default="output/norm_study", metavar="DIR", help="where runs are kept"
    )
    output.add_argument("--figures", type=Path, metavar="DIR", help="where to draw; default: figures/ in --output_dir")
    output.add_argument(
        "--num_pictures", type=positive, default=2, metavar="N", help="test pictures whose attention is drawn"
    )
    output.add_argument("--dry_run", action="store_true", help="print the commands of the runs to come, start nothing")
    args, further = parser.parse_known_args()
    for flag in flags_in(further):
        if flag in OURS:
            raise UserError(f"{flag} is not for all runs: {OURS[flag]}")
    for model_type in args.model_types:
        if model_type not in VITS:
            names = ", ".join(VITS)
            raise UserError(
                f"{model_type} is not in this study, which is of ViTs and hybrids; --model_types can be {names}"
            )
    args.figures = args.figures or args.output_dir / "figures"
    return args, further


def flags_in(arguments):
    return {text.partition("=")[0] for text in arguments if text.startswith("--")}


def plan(args, further):
    """{(model type, start, norm type): Run}, in the order of the table."""
    recipe = {flag: value for flag, value in RECIPE.items() if f"--{flag}" not in flags_in(further)}
    if "--epochs" in flags_in(further):
        recipe.pop("num_steps", None)
    runs = {}
    for model_type, start, norm_type in itertools.product(args.model_types, args.starts, args.norm_types):
        flags = {"name": f"{model_type}-{norm_type}-{start}", "output_dir": args.output_dir}
        flags |= {"model_type": model_type, "norm_type": norm_type}
        if start == "pretrained":
            flags["pretrained_dir"] = args.pretrained_dir.replace("{model_type}", model_type)
            if args.download:
                flags["download"] = True
        runs[model_type, start, norm_type] = plan_run(train, flags | recipe, further)
    return runs


def write_table(runs, finished, folder):
    """table.csv and table.md in `folder`, the latter on the terminal too; a run that failed has no numbers."""
    rows = []
    for key, run in runs.items():
        rows.append(dict(zip(COLUMNS, key, strict=False)))
        if key in finished:
            metrics = read_metrics(run.folder)
            speed = statistics.median(metrics["images_per_second"])
            accuracies = metrics["test_accuracy"]
            results = (accuracies[-1], max(accuracies), metrics["seconds"][-1], speed)
            rows[-1] |= dict(zip(COLUMNS[len(key) :], results, strict=True))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "| architecture | start | norm | test accuracy | best | time | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, start, norm_type, *results in map(dict.values, rows):
        cells = [model_type, STARTS[start], norm_type, *(formatted(*results) if results else ["failed", "", "", ""])]
        lines.append(f"| {' | '.join(cells)} |")
    flags = next(iter(finished.values())).flags
    configs = [read_config(run.folder) for run in finished.values()]
    devices = sorted({config["versions"]["device"] for config in configs})
    size = f"{configs[0]['num_steps']} steps of {flags.train_batch_size} images at {flags.img_size}x{flags.img_size}"
    text = "\n".join([f"{data_name(flags)}, {size}; {', '.join(devices)}", "", *lines, ""])
    (folder / "table.md").write_text(text)
    print(f"\n{text}\ntable: {folder / 'table.md'} and table.csv", flush=True)


def formatted(accuracy, best, seconds, images_per_second):
    return [f"{100 * accuracy:.2f} %", f"{100 * best:.2f} %", f"{seconds / 60:.1f} min", f"{images_per_second:.4g}"]


def draw_figures(finished, args):
    """For each architecture and start: the curves of all norms, and their attention on the same test pictures."""
    device = choose_device()
    flags = next(iter(finished.values())).flags
    places = (flags.data_dir, Processes(0, 1, 0, device), flags.num_workers)
    test_set = DATASETS[flags.dataset].load(False, *places, mean_std=flags.mean_std, skip_broken=flags.skip_broken)
    images, labels = test_set.examples(args.num_pictures, (flags.img_size, flags.img_size))
    for model_type, start in dict.fromkeys(key[:2] for key in finished):
        runs = {norm: run for (*others, norm), run in finished.items() if others == [model_type, start]}
        name = args.figures / f"{model_type}-{start}"
        title = f"{model_type}, {STARTS[start]}, on {data_name(flags)}"
        write(plot_runs({norm: [read_metrics(run.folder)] for norm, run in runs.items()}, title), f"{name}-curves.png")
        originals = denormalise(images, flags.mean_std).cpu()
        rows = [{} for _ in images]  # of each picture, {norm and prediction: its masks}
        for norm, run in runs.items():
            for of_picture, (best, masks) in zip(rows, looked_at(run, images, test_set.classes, device), strict=True):
                of_picture[f"{norm}\npredicted:\n{best}"] = masks
        for number, (image, label, of_picture) in enumerate(zip(originals, labels, rows, strict=True)):
            title_of_picture = f"{title}: attention of the class token, a test picture of {test_set.classes[label]}"
            write(plot_attention_rows(image, of_picture, title_of_picture), f"{name}-attention-{number + 1}.png")


@torch.no_grad()
def looked_at(run, images, classes, device):
    """For each image what the run's last weights take it for, and their attention {block: mask}, mean of the heads."""
    model = load_model(run.folder / LAST)[0].to(device).eval()
    logits, attention, _ = attention_of(model, images)
    masks = {
        f"block {block}": class_token_mask(attention[block].mean(dim=1), model.patch_embed.grid_size).cpu()
        for block in blocks_to_draw(len(model.blocks))
    }
    return [
        (caption(logits[i : i + 1], classes), {block: mask[i] for block, mask in masks.items()})
        for i in range(len(images))
    ]


def write(figure, path):
    save(figure, path)
    print(path, flush=True)


if __name__ == "__main__":
    run_script(main)
