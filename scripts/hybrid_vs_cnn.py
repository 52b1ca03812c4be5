"""A hybrid ViT against CNNs of as many parameters and as many FLOPs, from scratch, on a slice of CIFAR-10 at 32x32.

The three are R50-ViT-B_16, ResNet50x3_Params and ResNet50x3_Flops at an eighth of the width and half of the depth
(models/configs.py); a run takes five to seven minutes on two CPU cores. Ends in a table and a figure. The same command
goes on where it broke off; finished runs are not run again.

    python scripts/hybrid_vs_cnn.py --seeds 0 1
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from models import build_model
from utils.arguments import Parser, check_picture_path, positive, seed
from utils.errors import run_script
from utils.profiling import count_flops, count_parameters
from utils.records.tracker import device_name, read_metrics
from utils.sweeps import check_plan, data_name, finish, plan_run, raise_failures, spread
from utils.visualize import plot_runs, save

MODELS = {
    "R26-ViT-Mini_4": "hybrid ViT",
    "ResNet-Mini_Params": "CNN of as many parameters",
    "ResNet-Mini_Flops": "CNN of as many FLOPs",
}
GIVEN = ("dataset", "data_dir", "output_dir", "examples_per_class", "img_size", "train_batch_size", "num_steps")
RECIPE = {
    "min_crop_scale": 0.5,
    "horizontal_flip": True,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 60,
    "eval_every": 150,
}
PRECISION = {"bf16": True, "fp16_opt_level": "O1"}


def main():
    args = parse_flags()
    plan = [plan_run(train, flags_of(model_type, number, args)) for number in args.seeds for model_type in MODELS]
    check_plan(train, plan)
    raise_failures(finish(plan), len(plan))
    runs = {model_type: [] for model_type in MODELS}
    for run in plan:
        runs[run.flags.model_type].append(read_metrics(run.folder))
    seeds = f"seeds {', '.join(map(str, args.seeds))}" if len(args.seeds) > 1 else f"seed {args.seeds[0]}"
    print(f"\n{device_name()}, torch {torch.__version__}, {seeds}\n\n{table(runs, args.img_size)}")
    labels = {f"{model_type}: {what}": runs[model_type] for model_type, what in MODELS.items()}
    title = f"from scratch on {args.examples_per_class} images a class of {data_name(args)}, {seeds}"
    save(plot_runs(labels, title), args.figure)
    print(f"\nfigure: {args.figure}")


def parse_flags():
    parser = Parser(__doc__)
    add_experiment_flags(parser.add_argument_group("experiment"), "hybrid_vs_cnn")
    args = parser.parse_args()
    check_picture_path(args.figure, "--figure")
    return args


def add_experiment_flags(group, name):
    """The flags that this experiment shares with others of runs from scratch, GIVEN among them."""
    group.add_argument("--dataset", default="cifar10", metavar="NAME", help="as for train.py")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="as for train.py")
    group.add_argument("--output_dir", default=f"output/{name}", metavar="DIR", help="where the runs are kept")
    group.add_argument("--figure", default=f"img/{name}.png", metavar="PNG", help="the figure to draw")
    group.add_argument("--examples_per_class", type=positive, default=1000, metavar="N", help="size of the slice")
    group.add_argument("--img_size", type=positive, default=32, metavar="PIXELS", help="side of the images in pixels")
    group.add_argument("--train_batch_size", type=positive, default=128, metavar="N", help="images a step")
    group.add_argument("--num_steps", type=positive, default=600, metavar="N", help="optimizer steps of a run")
    group.add_argument("--seeds", type=seed, nargs="+", default=[0], metavar="N", help="a run of each model for each")


def flags_of(model_type, number, args):
    """The flags of train.py for one run."""
    name = {"name": f"{model_type}-seed{number}", "model_type": model_type, "seed": number}
    return {**name, **{flag: getattr(args, flag) for flag in GIVEN}, **RECIPE, **PRECISION}


def table(runs, img_size):
    """Markdown; accuracies are those of the last step, the mean over the seeds and their range."""
    lines = [
        "| model | parameters | FLOPs of an image | test accuracy | training accuracy | images/s | time of a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, metrics in runs.items():
        with torch.device("meta"):
            model = build_model(model_type, img_size)
        test, training = (spread([rows[f"{part}_accuracy"][-1] for rows in metrics]) for part in ("test", "train"))
        speed = statistics.median(value for rows in metrics for value in rows["images_per_second"])
        minutes = statistics.median(rows["seconds"][-1] for rows in metrics) / 60
        lines.append(
            f"| {model_type}, {MODELS[model_type]} | {count_parameters(model) / 1e6:.3f} M "
            f"| {count_flops(model, img_size) / 1e9:.4f} G | {test} | {training} | {speed:.0f} | {minutes:.1f} min |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
