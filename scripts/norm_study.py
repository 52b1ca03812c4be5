"""Does a ViT need LayerNorm? Architectures x norms x {from scratch, pretrained} on one data set, by train.py.

The results are a table (table.md, table.csv), one figure with the curves of all norms, and figures with the attention
maps and the attention matrices of each norm, for some test images or, without any, validation images. The defaults are
the recipe of published results, whose accuracies then stand in the table next to those measured. Several GPUs share
the runs; otherwise they run one after another. The same command resumes an interrupted study and tries failed
runs again; finished runs are not repeated.

    python scripts/norm_study.py --bf16 --download
"""

import csv
import itertools
import statistics
from pathlib import Path

import numpy as np
from experiment import OWN_FLAGS, TRAIN, difference_from, flags_in, print_unfinished, refuse_flags

from inference import SavedModel
from models import NORM_TYPES, canonical_model_type
from models.configs import VITS
from utils.attention_comparison import compare_attention
from utils.checks import make_output_folder
from utils.curves import plot_runs
from utils.data.augmentation import denormalise
from utils.data.datasets import DataOptions, find_splits, load_dataset
from utils.data.splits import NAMES, evaluated_split
from utils.errors import UserError, run_script
from utils.figures import blocks_to_draw, save
from utils.flag_types import Parser, argument, one_of, positive
from utils.parallel.processes import choose_device, one_process
from utils.profiling import markdown_table
from utils.records.run_folder import is_finished, read_config, read_metrics
from utils.records.weights import LAST
from utils.study_records import portable_flags
from utils.sweeps import check_plan, data_name, plan_run, raise_failures, run_unfinished

ARCHITECTURES = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32")
RECIPE = {  # of the reported runs
    "dataset": "cifar10",
    "num_steps": 20000,
    "train_batch_size": 128,
    "img_size": 224,
    "learning_rate": 0.05,
    "dropout_rate": 0.1,
    "eval_every": 500,
}
REPORTED = {  # {(data set, model type, start): best test accuracy in % with each of the norms}
    ("cifar10", "ViT-B_16", "scratch"): {"LN": 69.7, "BN": 66.5, "GN": 65.1, "Rescale": 65.2},
    ("cifar10", "ViT-B_32", "scratch"): {"LN": 67.6, "BN": 67.1, "GN": 65.5, "Rescale": 66.1},
    ("cifar10", "ViT-L_32", "scratch"): {"LN": 67.5, "BN": 67.4, "GN": 65.6, "Rescale": 65.4},
    ("cifar100", "ViT-B_16", "scratch"): {"LN": 43.5, "BN": 38.7, "GN": 38.2, "Rescale": 36.1},
    ("cifar100", "ViT-B_32", "scratch"): {"LN": 42.8, "BN": 39.9, "GN": 40.0, "Rescale": 37.8},
    ("cifar100", "ViT-L_32", "scratch"): {"LN": 42.7, "BN": 40.6, "GN": 39.6, "Rescale": 37.6},
    ("cifar10", "ViT-B_16", "pretrained"): {"LN": 98.4},
    ("cifar10", "ViT-B_32", "pretrained"): {"LN": 98.4},
    ("cifar10", "ViT-L_16", "pretrained"): {"LN": 99.0},
    ("cifar10", "ViT-L_32", "pretrained"): {"LN": 98.9},
    ("cifar100", "ViT-B_16", "pretrained"): {"LN": 91.9},
    ("cifar100", "ViT-B_32", "pretrained"): {"LN": 91.0},
    ("cifar100", "ViT-L_32", "pretrained"): {"LN": 92.2},
}
KEY = ("model_type", "start", "norm_type")
STARTS = {"scratch": "from scratch", "pretrained": "pretrained"}
STUDY_FLAGS = {
    **OWN_FLAGS,
    "--model_type": "give --model_types",
    "--norm_type": "give --norm_types",
    "--config": "give its flags, as the study has a recipe of its own",
}


def main():
    args, further = parse_flags()
    runs = plan(args, further)
    check_plan(TRAIN, runs.values(), files=not args.dry_run)
    if args.dry_run:
        print_unfinished(runs.values())
        return
    for folder, flag in ((args.output_dir, "--output_dir"), (args.figures, "--figures")):
        make_output_folder(folder, flag)
    failed = run_unfinished(runs.values())
    finished = {key: run for key, run in runs.items() if is_finished(run.folder, run.flags)}
    if finished:
        write_table(runs, finished, args.output_dir)
        draw_figures(finished, args)
    raise_failures(failed, len(runs))


def parse_flags():
    """The parsed flags of the study, and the remaining ones, which are for train.py."""
    parser = Parser(__doc__)
    default = " ".join(f"--{flag} {value}" for flag, value in RECIPE.items())
    parser.epilog = f"All other flags are passed to train.py unchanged. Defaults:\n{default}."
    group = parser.add_argument_group("study")
    group.add_argument(
        "--model_types",
        type=argument(canonical_model_type),
        nargs="+",
        default=ARCHITECTURES,
        metavar="NAME",
        help=f"The architectures: {', '.join(VITS)}; default: {' '.join(ARCHITECTURES)}.",
    )
    group.add_argument(
        "--norm_types",
        type=one_of("norm type", NORM_TYPES),
        nargs="+",
        default=NORM_TYPES,
        metavar="NORM",
        help=f"The norms: {', '.join(NORM_TYPES)}; default: all.",
    )
    group.add_argument(
        "--starts",
        type=one_of("start", STARTS),
        nargs="+",
        default=tuple(STARTS),
        metavar="START",
        help=f"How the runs start: {', '.join(STARTS)}; default: both.",
    )
    group.add_argument(
        "--pretrained_dir",
        default="checkpoint/{model_type}.npz",
        metavar="FILE",
        help="Weights of the pretrained runs; {model_type} is replaced by the architecture.",
    )
    group.add_argument("--download", action="store_true", help="Download Google's weights if they do not exist.")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", type=Path, default="output/norm_study", metavar="DIR", help="The folder that contains all runs."
    )
    output.add_argument(
        "--figures", type=Path, metavar="DIR", help="Folder of the figures; default: figures/ in --output_dir."
    )
    output.add_argument(
        "--num_pictures", type=positive, default=2, metavar="N", help="Number of images whose attention is drawn."
    )
    output.add_argument(
        "--dry_run", action="store_true", help="Print the commands of the unfinished runs and start nothing."
    )
    args, further = parser.parse_known_args()
    refuse_flags(further, STUDY_FLAGS)
    for model_type in args.model_types:
        if model_type not in VITS:
            names = ", ".join(VITS)
            raise UserError(f"{model_type} is not in this study of ViTs and hybrids; --model_types can be {names}")
    args.figures = args.figures or args.output_dir / "figures"
    return args, further


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
        runs[model_type, start, norm_type] = plan_run(TRAIN, flags | recipe, further)
    return runs


def write_table(runs, finished, folder):
    """Write table.csv and table.md to `folder` and print the latter; a run that failed has no numbers."""
    metrics = {key: read_metrics(run.folder) for key, run in finished.items()}
    split = evaluated_split(next(iter(metrics.values())))
    columns = (f"{split}_accuracy", f"best_{split}_accuracy", "seconds", "images_per_second")
    rows = []
    for key in runs:
        rows.append(dict(zip(KEY, key, strict=True)))
        if key in finished:
            accuracies, speed = metrics[key][columns[0]], statistics.median(metrics[key]["images_per_second"])
            best = np.nanmax(accuracies)  # with --test_at_end all but the last are NaN
            rows[-1] |= dict(zip(columns, (accuracies[-1], best, metrics[key]["seconds"][-1], speed), strict=True))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, KEY + columns)
        writer.writeheader()
        writer.writerows(rows)
    cells = []
    for (model_type, start, norm_type), row in zip(runs, rows, strict=True):
        results = [row[name] for name in columns if name in row]
        shown = formatted(*results) if results else ["failed", "", "", ""]
        shown += compared(runs[model_type, start, norm_type].flags, start, row.get(columns[1]))
        cells.append([model_type, STARTS[start], norm_type, *shown])
    titles = ["architecture", "start", "norm", f"{NAMES[split]} accuracy", "best", "time", "images/s"]
    titles += ["reported best", "difference in points"]
    flags = next(iter(finished.values())).flags
    configs = [read_config(run.folder) for run in finished.values()]
    devices = sorted({config["versions"]["device"] for config in configs})
    size = f"{configs[0]['num_steps']} steps of {flags.train_batch_size} images at {flags.img_size}x{flags.img_size}"
    text = f"{data_name(flags)}, {size}; {', '.join(devices)}\n\n{markdown_table(titles, cells)}\n"
    (folder / "table.md").write_text(text)
    print(f"\n{text}\ntable: {folder / 'table.md'} and table.csv", flush=True)


def formatted(accuracy, best, seconds, images_per_second):
    return [f"{100 * accuracy:.2f} %", f"{100 * best:.2f} %", f"{seconds / 60:.1f} min", f"{images_per_second:.4g}"]


def compared(flags, start, best):
    """The cells of the reported accuracy, if there is one, and of the difference of `best`, if it is not None."""
    reported = REPORTED.get((flags.dataset, flags.model_type, start), {}).get(flags.norm_type)
    if reported is None:
        return ["", ""]
    recipe = {**RECIPE, **{name: getattr(flags, name) for name in ("dataset", "model_type", "norm_type")}}
    found = portable_flags(flags, TRAIN.path.parent)
    return [f"{reported} %", "" if best is None else difference_from(reported / 100, best, found, recipe)]


def draw_figures(finished, args):
    """For each architecture and start: the curves of all norms, and their attention on the same images.

    The attention of a run whose last weights were deleted to save space is omitted.
    """
    device = choose_device()
    flags = next(iter(finished.values())).flags
    options = DataOptions.from_flags(flags)
    split = find_splits(flags.dataset, options)[-1]
    data_set = load_dataset(flags.dataset, split, options, one_process(device))
    images, labels = data_set.examples(args.num_pictures, (flags.img_size, flags.img_size))
    originals = denormalise(images, flags.mean_std).cpu()
    captions = [f"a {NAMES[split]} image of {data_set.classes[label]}" for label in labels]
    shown = list(zip(originals, captions, strict=True))
    for model_type, start in dict.fromkeys(key[:2] for key in finished):
        runs = {norm: run for (*others, norm), run in finished.items() if others == [model_type, start]}
        name = args.figures / f"{model_type}-{start}"
        title = f"{model_type}, {STARTS[start]}, on {data_name(flags)}"
        write(plot_runs({norm: [read_metrics(run.folder)] for norm, run in runs.items()}, title), f"{name}-curves.png")
        models = {}
        for norm, run in runs.items():
            if (run.folder / LAST).exists():
                models[norm] = SavedModel.load(run.folder / LAST).to(device).model
            else:
                print(f"{run.folder / LAST} does not exist any more, so its attention is not drawn")
        if models:
            draw_attention(models, images, shown, data_set.classes, title, name)


def draw_attention(models, images, shown, classes, title, name):
    """For each image the attention maps and matrices of {norm: model}; `shown` are pairs (image, caption)."""
    blocks = blocks_to_draw(len(next(iter(models.values())).blocks))
    for i, (image, caption) in enumerate(shown):
        rows = {norm: (model, images[i : i + 1], classes) for norm, model in models.items()}
        for kind, figure in compare_attention(rows, blocks, image, f"{title}, {caption}").items():
            write(figure, f"{name}-{kind}-{i + 1}.png")


def write(figure, path):
    save(figure, path)
    print(path, flush=True)


if __name__ == "__main__":
    run_script(main)
