"""How large are the gradients of a new ViT by depth, with each norm? ViT-Mini_4 with different numbers of blocks.

The gradient is that of the cross-entropy for one batch of training images, in float32, before the first step. The head,
whose weights are zeros at the start of a training, is random here: with zeros no gradient would reach the blocks. This
takes a minute and trains nothing. gradients.json in results/norm_gradients/ has the numbers, from which --draw draws
the table and the figure.

    python scripts/norm_gradients.py
"""

import json
import statistics
from pathlib import Path

import torch
from experiment import seeds_text
from matplotlib.figure import Figure

from models import NORM_TYPES, build_model
from utils.checks import make_output_folder
from utils.data.datasets import DATASETS, DataOptions, load_dataset
from utils.errors import UserError, run_script
from utils.figures import OKABE_ITO, save, style_axes, wrap_text
from utils.flag_types import Parser, one_of, positive, seed
from utils.gradients import block_gradient_norms
from utils.parallel.processes import choose_device, one_process
from utils.profiling import markdown_table
from utils.records.files import replace_file
from utils.records.run_folder import commit_of_code
from utils.sweeps import data_name

MODEL = "ViT-Mini_4"
FILE = "gradients.json"


def main():
    args = parse_flags()
    path = args.results / FILE
    if not args.draw:
        found = measure(args)
        make_output_folder(args.results, "--results")
        replace_file(path, lambda temporary: temporary.write_text(json.dumps(found) + "\n"))
    if not path.exists():
        raise UserError(f"{path} does not exist; omit --draw to measure")
    found = json.loads(path.read_text())
    text = f"{table(found)}\n\n{conditions(found)}\n"
    replace_file(args.results / "table.md", lambda temporary: temporary.write_text(text))
    save(draw(found), args.results / "gradients.png")
    print(f"{text}\nin {args.results}: {FILE}, table.md, gradients.png")


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--dataset", type=one_of("dataset", DATASETS), default="cifar10", metavar="NAME", help="The data set."
    )
    group.add_argument("--data_dir", default="data", metavar="DIR", help="Its folder, as for train.py.")
    group.add_argument("--data_note", metavar="TEXT", help="What the data is, for the results; default: its name.")
    group.add_argument("--img_size", type=positive, default=32, metavar="PIXELS", help="Side of the images in pixels.")
    group.add_argument("--batch_size", type=positive, default=128, metavar="N", help="Images in the batch.")
    group.add_argument(
        "--depths", type=positive, nargs="+", default=[6, 12, 24], metavar="N", help="The numbers of blocks."
    )
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="Seeds of the initial weights."
    )
    group.add_argument(
        "--results", type=Path, default="results/norm_gradients", metavar="DIR", help="The folder of the results."
    )
    group.add_argument("--draw", action="store_true", help="Measure nothing; draw table and figure from the results.")
    return parser.parse_args()


def measure(args):
    """What gradients.json contains: the conditions, and [{"norm", "depth", "seed", "gradients": of each block}]."""
    try:
        with torch.device("meta"):
            build_model(MODEL, args.img_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = choose_device()
    data_set = load_dataset(args.dataset, "train", DataOptions(args.data_dir), one_process(device))
    images, labels = data_set.examples(args.batch_size, (args.img_size, args.img_size))
    runs = []
    for depth in args.depths:
        for norm in NORM_TYPES:
            for number in args.seeds:
                model = new_model(args.img_size, len(data_set.classes), norm, depth, number).to(device)
                gradients = [float(f"{value:.6g}") for value in block_gradient_norms(model, images, labels)]
                runs.append({"norm": norm, "depth": depth, "seed": number, "gradients": gradients})
    what = {"model_type": MODEL, "img_size": args.img_size, "images": len(labels)}
    what |= {"data": args.data_note or data_name(args), "torch": torch.__version__, "commit": commit_of_code()}
    return {**what, "runs": runs}


def new_model(img_size, classes, norm, depth, number):
    """The model in training mode with the initial weights of a seed, but random weights of the head."""
    torch.manual_seed(number)
    model = build_model(MODEL, img_size, num_classes=classes, norm_type=norm, num_layers=depth)
    torch.nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
    return model.train()


def by_depth(found):
    """{depth: {norm: [gradients of each block, of each seed]}}"""
    depths = dict.fromkeys(run["depth"] for run in found["runs"])
    return {
        depth: {
            norm: [run["gradients"] for run in found["runs"] if (run["depth"], run["norm"]) == (depth, norm)]
            for norm in NORM_TYPES
        }
        for depth in depths
    }


def table(found):
    """Markdown: the gradient norm of the first and the last block and their ratio, mean and range over the seeds."""
    rows = []
    for depth, norms in by_depth(found).items():
        for norm, seeds in norms.items():
            columns = zip(*((each[0], each[-1], each[0] / each[-1]) for each in seeds), strict=True)
            rows.append([str(depth), norm, *map(mean_and_span, columns)])
    return markdown_table(["blocks", "norm", "first block", "last block", "first / last"], rows)


def mean_and_span(values):
    """`1.23 (1.2 to 1.25)`"""
    text = f"{statistics.mean(values):.3g}"
    return text if len(values) == 1 else f"{text} ({min(values):.3g} to {max(values):.3g})"


def conditions(found):
    """A sentence on the model, the data and the seeds."""
    size, seeds = found["img_size"], list(dict.fromkeys(run["seed"] for run in found["runs"]))
    return (
        f"Norm of the gradient of each block's weights: {found['model_type']}, new weights, random head, "
        f"{found['images']} training images of {found['data']} at {size}x{size}, float32, {seeds_text(seeds)}; torch "
        f"{found['torch']}."
    )


def draw(found):
    """The gradient norm over the block, one panel per depth, one line per norm: mean and range over the seeds."""
    depths = by_depth(found)
    figure = Figure(figsize=(3.8 * len(depths) + 0.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axes, (depth, norms) in zip(panels, depths.items(), strict=True):
        for colour, (norm, seeds) in zip(OKABE_ITO, norms.items(), strict=False):
            blocks, columns = range(1, depth + 1), list(zip(*seeds, strict=True))
            style = {"color": colour, "marker": "o", "markersize": 3, "label": norm}
            axes.plot(blocks, [statistics.mean(column) for column in columns], **style)
            axes.fill_between(blocks, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="block", yscale="log", title=f"{depth} blocks")
        axes.xaxis.get_major_locator().set_params(integer=True)
        style_axes(axes)
    panels[0].set_ylabel("norm of the gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(wrap_text(conditions(found), 40 * len(depths)), fontsize="small")
    return figure


if __name__ == "__main__":
    run_script(main)
