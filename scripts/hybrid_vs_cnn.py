"""A hybrid ViT against CNNs of as many parameters and as many FLOPs, from scratch, on a slice of CIFAR-10 at 32x32.

The three are R50-ViT-B_16, ResNet50x3_Params and ResNet50x3_Flops at an eighth of the width and half of the depth
(models/configs.py); a run takes five to seven minutes on two CPU cores. Ends in a table and a figure. The same command
goes on where it broke off; finished runs are not run again. Flags that are not listed here go to train.py.

    python scripts/hybrid_vs_cnn.py --seeds 0 1 2
"""

import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import build_model
from utils.arguments import Parser, positive, seed
from utils.errors import UserError, run_script
from utils.profiling import count_flops, count_parameters
from utils.tracking import device_name, read_metrics
from utils.visualize import plot_runs, save

MODELS = {
    "R26-ViT-Mini_4": "hybrid ViT",
    "ResNet-Mini_Params": "CNN of as many parameters",
    "ResNet-Mini_Flops": "CNN of as many FLOPs",
}
RECIPE = (
    *("--img_size", "32", "--min_crop_scale", "0.5", "--horizontal_flip", "--train_batch_size", "128"),
    *("--optimizer", "adamw", "--learning_rate", "1e-3", "--weight_decay", "0.05", "--warmup_steps", "60"),
    *("--eval_every", "150", "--bf16", "--fp16_opt_level", "O1"),
)


def main():
    args, train_flags = parse_flags()
    runs = {model_type: [] for model_type in MODELS}
    for number in args.seeds:
        for model_type in MODELS:
            folder = train(model_type, number, args, train_flags)
            runs[model_type].append(read_metrics(folder))
    seeds = f"seeds {', '.join(map(str, args.seeds))}" if len(args.seeds) > 1 else f"seed {args.seeds[0]}"
    print(f"\n{device_name()}, torch {torch.__version__}, {seeds}\n\n{table(runs)}\n\nfigure: {args.figure}")
    labels = {f"{model_type}: {what}": runs[model_type] for model_type, what in MODELS.items()}
    source = Path(args.data_dir).name if args.dataset == "imagefolder" else args.dataset
    title = f"from scratch on {args.examples_per_class} images a class of {source}"
    save(plot_runs(labels, title), args.figure)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("experiment")
    group.add_argument("--dataset", default="cifar10", metavar="NAME", help="as for train.py")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="as for train.py")
    group.add_argument("--output_dir", default="output/hybrid_vs_cnn", metavar="DIR", help="where the runs are kept")
    group.add_argument("--figure", default="img/hybrid_vs_cnn.png", metavar="PNG", help="the figure to draw")
    group.add_argument("--examples_per_class", type=positive, default=1000, metavar="N", help="size of the slice")
    group.add_argument("--num_steps", type=positive, default=600, metavar="N", help="optimizer steps of a run")
    group.add_argument("--seeds", type=seed, nargs="+", default=[0], metavar="N", help="a run of each model for each")
    args, train_flags = parser.parse_known_args()
    if not args.figure.endswith(".png") or not Path(args.figure).parent.is_dir():
        raise UserError(f"--figure {args.figure} can't be written; give a .png file in a folder that exists")
    return args, train_flags


def train(model_type, number, args, train_flags):
    """The folder of the model's run with this seed, finished by train.py where it is not yet."""
    name = f"{model_type}-seed{number}"
    folder = Path(args.output_dir) / name
    if max(read_metrics(folder).get("step", [0])) == args.num_steps:
        return folder
    flags = {
        "name": name,
        "model_type": model_type,
        "seed": number,
        "dataset": args.dataset,
        "data_dir": args.data_dir,
        "output_dir": args.output_dir,
        "examples_per_class": args.examples_per_class,
        "num_steps": args.num_steps,
    }
    command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), *RECIPE]
    command += [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    status = subprocess.run([*command, *train_flags, "--resume"]).returncode
    if status:
        sys.exit(status)  # train.py has said why
    return folder


def table(runs):
    """Markdown; accuracies are those of the last step, the mean over the seeds and their range."""
    lines = [
        "| model | parameters | FLOPs of an image | test accuracy | training accuracy | images/s | time of a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, metrics in runs.items():
        with torch.device("meta"):
            model = build_model(model_type, 32)
        test, training = (
            spread([100 * rows[f"{part}_accuracy"][-1] for rows in metrics]) for part in ("test", "train")
        )
        speed = statistics.median(value for rows in metrics for value in rows["images_per_second"])
        minutes = statistics.median(rows["seconds"][-1] for rows in metrics) / 60
        lines.append(
            f"| {model_type}, {MODELS[model_type]} | {count_parameters(model) / 1e6:.3f} M "
            f"| {count_flops(model, 32) / 1e9:.4f} G | {test} | {training} | {speed:.0f} | {minutes:.1f} min |"
        )
    return "\n".join(lines)


def spread(values):
    """`61.5 % (60.9 to 62.0)`"""
    mean = f"{statistics.mean(values):.1f} %"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    run_script(main)
