"""A hybrid ViT against CNNs with as many parameters and as many FLOPs, from scratch, on a part of CIFAR-10 at 32x32.

The three are R50-ViT-B_16, ResNet50x3_Params and ResNet50x3_Flops with an eighth of the width and half of the depth
(models/configs.py); a run takes five to seven minutes on two CPU cores. The results are a table and a figure. The same
command resumes an interrupted experiment; finished runs are not repeated.

    python scripts/hybrid_vs_cnn.py --seeds 0 1
"""

import statistics

import torch
from experiment import add_experiment_flags, finish_runs, plan_from_scratch, seeds_text

from models import build_model
from utils.checks import check_figure_path
from utils.curves import plot_runs
from utils.data.splits import NAMES, evaluated_split
from utils.errors import run_script
from utils.figures import save
from utils.flag_types import Parser
from utils.parallel.processes import device_name
from utils.profiling import count_flops, count_parameters, markdown_table
from utils.records.run_folder import read_metrics
from utils.sweeps import data_name, mean_and_range

MODELS = {
    "R26-ViT-Mini_4": "hybrid ViT",
    "ResNet-Mini_Params": "CNN with as many parameters",
    "ResNet-Mini_Flops": "CNN with as many FLOPs",
}


def main():
    args = parse_flags()
    plan = {
        (model_type, number): plan_from_scratch(args, model_type, number, model_type=model_type)
        for number in args.seeds
        for model_type in MODELS
    }
    finish_runs(list(plan.values()))
    metrics = {
        model_type: [read_metrics(plan[model_type, number].folder) for number in args.seeds] for model_type in MODELS
    }
    seeds = seeds_text(args.seeds)
    print(f"\n{device_name()}, torch {torch.__version__}, {seeds}\n\n{table(metrics, args.img_size)}")
    labels = {f"{model_type}: {what}": metrics[model_type] for model_type, what in MODELS.items()}
    title = f"from scratch on {args.examples_per_class} images per class of {data_name(args)}, {seeds}"
    save(plot_runs(labels, title), args.figure)
    print(f"\nfigure: {args.figure}")


def parse_flags():
    parser = Parser(__doc__)
    add_experiment_flags(parser.add_argument_group("experiment"), "hybrid_vs_cnn")
    args = parser.parse_args()
    check_figure_path(args.figure, "--figure")
    return args


def table(metrics, img_size):
    """Markdown; accuracies are those of the last step, the mean over the seeds and their range."""
    rows, split = [], evaluated_split(next(iter(metrics.values()))[0])
    for model_type, seeds in metrics.items():
        with torch.device("meta"):
            model = build_model(model_type, img_size)
        speed = statistics.median(value for one in seeds for value in one["images_per_second"])
        minutes = statistics.median(one["seconds"][-1] for one in seeds) / 60
        rows.append(
            [
                f"{model_type}, {MODELS[model_type]}",
                f"{count_parameters(model) / 1e6:.3f} M",
                f"{count_flops(model, img_size) / 1e9:.4f} G",
                *(mean_and_range([one[f"{part}_accuracy"][-1] for one in seeds]) for part in (split, "train")),
                f"{speed:.0f}",
                f"{minutes:.1f} min",
            ]
        )
    titles = ["model", "parameters", "FLOPs per image", f"{NAMES[split]} accuracy", "training accuracy", "images/s"]
    return markdown_table([*titles, "time per run"], rows)


if __name__ == "__main__":
    run_script(main)
