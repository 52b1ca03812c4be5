"""The published fine-tuning tables, one row per run: model x data set x resolution x steps, reported and measured.

Two CNNs that match the hybrid, for which nothing is published, have the same recipe and rows of their own.
Each run leaves one small file in --results, from which the table is drawn. The same command resumes an interrupted run
and does not repeat a finished one. Flags of train.py for all rows, such as the precision, follow after --.

    python scripts/fine_tuning_table.py --dataset cifar10 --img_size 224 --download -- --bf16 --compile
"""

import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import OWN_FLAGS, TRAIN, difference_from, own_and_further, refuse_flags
from study import ROOT, Planned, finish

from models import MODEL_TYPES, build_model
from utils.class_names import IMAGENET_21K_CLASSES
from utils.errors import UserError, run_script
from utils.flag_types import Parser, one_of, positive
from utils.pretrained import model_type_of
from utils.profiling import count_parameters, markdown_table
from utils.records.files import replace_file
from utils.study_records import FINAL, file_name, judged_accuracy, portable_flags, read_records
from utils.study_tables import hardware_text
from utils.sweeps import plan_run

NAME = "fine_tuning_table"
CNN_WEIGHTS = "BiT-M-R50x3.npz"  # from which both CNNs are cut
IMAGENET_1K = "imagenet21k+imagenet2012"  # Google's folder of the versions that were then fine-tuned on ImageNet-1k
EVALUATIONS = 5  # intervals of training metrics, each of which ends with a checkpoint
FLOAT_BYTES, HEAD_CLASSES = 4, {"ImageNet-21k": IMAGENET_21K_CLASSES, "ImageNet-1k": 1000}
ARCHIVE_BYTES = {"cifar10": 170_498_071, "cifar100": 169_001_437}
RECIPE = {"train_batch_size": 512, "learning_rate": 0.03, "decay_type": "cosine", "test_at_end": True}
GPU = "NVIDIA H200"
# Images/s of its training steps in bfloat16, benchmarks/results/nvidia-h200.md:
# {(model type, image size, whether compiled): images/s}
SPEEDS = {
    ("ViT-B_16", 224, False): 3110,
    ("ViT-B_16", 224, True): 4075,
    ("R50-ViT-B_16", 224, False): 704,
    ("ResNet50x3_Params", 224, False): 781,
}
TABLE_FLAGS = {
    **OWN_FLAGS,
    "--model_type": "choose rows by it before --",
    "--pretrained_dir": "give the folder by --weights before --",
    "--download": "give it before --",
    "--output_dir": "give it before --",
    "--epochs": "the rows have a number of steps; give --num_steps",
    "--config": "the rows have a recipe of their own",
    "--recipe": "the rows have a recipe of their own",
    "--mode": "the rows are trained",
}


class Row(NamedTuple):
    """A published result, or a run to compare it with."""

    model_type: str
    weights: str  # a file of Google; its folder and name say what it was pretrained on
    dataset: str
    img_size: int  # in pixels
    num_steps: int  # of 512 images
    warmup_steps: int
    reported: float | None  # test accuracy; None if nobody has published one
    hours: float | None = None  # reported for the training, on an unknown machine

    @property
    def pretraining(self):
        return "ImageNet-1k" if "/" in self.weights else "ImageNet-21k"

    @property
    def name(self):
        short = self.pretraining.removeprefix("ImageNet-")
        return f"{self.model_type}-{short}-{self.dataset}-{self.img_size}-{self.num_steps}"

    def flags(self):
        """The flags of train.py, without the path of the weights."""
        names = ("model_type", "dataset", "img_size", "num_steps", "warmup_steps")
        return {name: getattr(self, name) for name in names} | RECIPE


ROWS = {
    row.name: row
    for row in (
        Row("ViT-B_16", "ViT-B_16.npz", "cifar10", 224, 10_000, 500, 0.9908, hours=3 + 13 / 60),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar10", 384, 10_000, 500, 0.9906),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar100", 224, 10_000, 500, 0.9230),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar100", 384, 10_000, 500, 0.9228),
        Row("R50-ViT-B_16", "R50+ViT-B_16.npz", "cifar10", 224, 10_000, 500, 0.9892, hours=4 + 23 / 60),
        Row("R50-ViT-B_16", "R50+ViT-B_16.npz", "cifar10", 384, 10_000, 500, 0.9904),
        Row("R50-ViT-B_16", "R50+ViT-B_16.npz", "cifar100", 224, 10_000, 500, 0.9231),
        Row("R50-ViT-B_16", "R50+ViT-B_16.npz", "cifar100", 384, 10_000, 500, 0.9197),
        Row("ResNet50x3_Params", CNN_WEIGHTS, "cifar10", 224, 10_000, 500, None),
        Row("ResNet50x3_Params", CNN_WEIGHTS, "cifar100", 224, 10_000, 500, None),
        Row("ResNet50x3_Flops", CNN_WEIGHTS, "cifar10", 224, 10_000, 500, None),
        Row("ResNet50x3_Flops", CNN_WEIGHTS, "cifar100", 224, 10_000, 500, None),
        Row("ViT-L_32", "ViT-L_32.npz", "cifar10", 224, 10_000, 500, 0.9903, hours=2 + 11 / 60),
        Row("ViT-L_32", "ViT-L_32.npz", "cifar100", 224, 10_000, 500, 0.9276),
        Row("ViT-B_16", f"{IMAGENET_1K}/ViT-B_16-224.npz", "cifar10", 224, 10_000, 500, 0.9900),
        Row("ViT-B_16", f"{IMAGENET_1K}/ViT-B_16-224.npz", "cifar100", 224, 10_000, 500, 0.9245),
        Row("ViT-L_32", f"{IMAGENET_1K}/ViT-L_32.npz", "cifar10", 224, 10_000, 500, 0.9903),
        Row("ViT-L_32", f"{IMAGENET_1K}/ViT-L_32.npz", "cifar100", 224, 10_000, 500, 0.9285),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar10", 224, 500, 100, 0.9859),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar100", 224, 500, 100, 0.9072),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar10", 224, 1_000, 100, 0.9878),
        Row("ViT-B_16", "ViT-B_16.npz", "cifar100", 224, 1_000, 100, 0.9216),
    )
}
FILTERS = ("model_type", "dataset", "img_size", "num_steps")


def main():
    args, further = parse_flags()
    if not args.draw:
        planned = {row: plan(row, args, further) for row in chosen_rows(args)}
        if args.dry_run:
            print_plan(planned, args)
            return
        finish(list(planned.values()), args)
    text = table(read_records(args.results).values())
    replace_file(args.results / "table.md", lambda path: path.write_text(text))
    print(f"\n{text}\ntable: {args.results / 'table.md'}")


def parse_flags():
    """The parsed flags of the table, and those after `--`, which are for train.py."""
    parser = Parser(__doc__)
    parser.epilog = "\n  ".join(["rows:", *ROWS])
    group = parser.add_argument_group("rows, by default all")
    group.add_argument("--rows", type=one_of("row", ROWS), nargs="+", metavar="ROW", help="These rows, listed below.")
    for name in FILTERS:
        values = list(dict.fromkeys(str(getattr(row, name)) for row in ROWS.values()))
        text = f"Only the rows with one of these: {', '.join(values)}."
        group.add_argument(
            f"--{name}", type=one_of(name.replace("_", " "), values), nargs="+", metavar="VALUE", help=text
        )
    group = parser.add_argument_group("files")
    group.add_argument("--weights", type=Path, default="checkpoint", metavar="DIR", help="Folder of Google's files.")
    group.add_argument("--download", action="store_true", help="Download Google's files that do not exist.")
    group.add_argument("--output_dir", default=f"output/{NAME}", metavar="DIR", help="The folder of the runs.")
    group.add_argument(
        "--results", type=Path, default=f"results/{NAME}", metavar="DIR", help="The folder of their results."
    )
    group = parser.add_argument_group("start")
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="Runs at a time, on each GPU.")
    group.add_argument("--draw", action="store_true", help="Start no run; draw the table from the results.")
    group.add_argument(
        "--dry_run", action="store_true", help="Print commands, estimated hours and download sizes; start nothing."
    )
    own, further = own_and_further()
    args = parser.parse_args(own)
    refuse_flags(further, TABLE_FLAGS)
    return args, further


def chosen_rows(args):
    """The rows that all of the flags select. Raises UserError if there are none."""
    rows = [ROWS[name] for name in args.rows or ROWS]
    for name in FILTERS:
        wanted = getattr(args, name)
        rows = [row for row in rows if not wanted or str(getattr(row, name)) in wanted]
    if not rows:
        raise UserError("no row has all of these values; --help lists the rows")
    return rows


def plan(row, args, further):
    """The Planned run of a row."""
    flags = {"output_dir": args.output_dir, "pretrained_dir": args.weights / row.weights, **row.flags()}
    flags["eval_every"] = row.num_steps // EVALUATIONS
    if args.download:
        flags["download"] = True
    seed = TRAIN.parser.parse_args(["--name=any", *further]).seed
    entry = {"study": NAME, "kind": FINAL, "contender": "measured", "contender_flags": {}}
    entry |= {"reference": "reported", "group": {"row": row.name}, "seed": seed, "data": row.dataset}
    file = file_name(entry)
    run = plan_run(TRAIN, {"name": file.removesuffix(".json"), **flags}, further)
    return Planned(args.results / file, {**entry, "flags": portable_flags(run.flags, ROOT)}, run)


def print_plan(planned, args):
    """Print the commands of the missing runs with estimates, and what would be downloaded."""
    hours = []
    for row, each in planned.items():
        hours.append(estimated_hours(each.run.flags))
        print(f"# {row.name}: {f'estimate {hours[-1]:.2f} h' if hours[-1] else 'no estimate: speed not measured'}")
        finish([each], args)
    known = list(filter(None, hours))
    print(f"# estimate: {sum(known):.2f} h of training steps on one {GPU} for {len(known)} of {len(hours)} rows")
    sizes = {f"{args.weights / row.weights}": weights_bytes(row) for row in planned}
    sizes |= {row.dataset: ARCHIVE_BYTES[row.dataset] for row in planned}
    for name, size in sizes.items():
        print(f"# download, if it is missing: {name}, about {size / 1e9:.2f} GB")
    print(f"# all downloads: about {sum(sizes.values()) / 1e9:.2f} GB")


def estimated_hours(flags):
    """Hours of the training steps on the GPU of SPEEDS, or None if the speed with these flags was not measured."""
    speed = SPEEDS.get((flags.model_type, flags.img_size, flags.compile)) if flags.bf16 else None
    return speed and flags.num_steps * flags.train_batch_size / speed / 3600


def weights_bytes(row):
    """The size of the row's file of weights, from its number of parameters, the head of its pretraining included."""
    model_type = model_type_of(row.weights, MODEL_TYPES) or row.model_type
    with torch.device("meta"):
        return FLOAT_BYTES * count_parameters(build_model(model_type, 224, HEAD_CLASSES[row.pretraining]))


def table(records):
    """Markdown of all rows; measured accuracies are those after the last step."""
    rows = []
    for row in ROWS.values():
        of_row = [record for record in records if record["group"] == {"row": row.name}]
        cells = [row.model_type, row.pretraining, row.dataset, str(row.img_size), f"{row.num_steps:,}"]
        finished = [record for record in of_row if not record["diverged"]]
        results = ["diverged", ""] if of_row and not finished else measured(row, finished)
        cells += [f"{100 * row.reported:.2f} %" if row.reported else "", *results]
        rows.append([*cells, time_text(row.hours), times(finished), machines(of_row)])
    titles = ["model", "pretrained on", "data set", "size", "steps", "reported", "measured", "difference in points"]
    titles += ["reported time", "measured time", "machine"]
    note = "Test accuracy after the last step, on all test images; the reported accuracies are of others."
    return f"{markdown_table(titles, rows)}\n\n{note}\n"


def measured(row, records):
    """The cells of the measured accuracy and of its difference from the reported one, if the flags are the row's."""
    if not records:
        return "not measured", ""
    accuracies = [judged_accuracy(record) for record in records]
    mean = statistics.mean(accuracies)
    span = f" ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f})" if len(accuracies) > 1 else ""
    return f"{100 * mean:.2f} %{span}", difference_from(row.reported, mean, records[0]["flags"], row.flags())


def times(records):
    """The median time of the runs."""
    return time_text(statistics.median(record["metrics"]["seconds"][-1] for record in records) / 3600 if records else 0)


def time_text(hours):
    """`3 h 13 min`"""
    minutes = round(60 * (hours or 0), 1)
    return "" if not hours else f"{minutes // 60:.0f} h {minutes % 60:.0f} min" if minutes >= 60 else f"{minutes} min"


def machines(records):
    return "; ".join(dict.fromkeys(map(hardware_text, records)))


if __name__ == "__main__":
    run_script(main)
