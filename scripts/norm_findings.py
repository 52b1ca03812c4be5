"""Does a small ViT need LayerNorm? ViT-Mini_4 from scratch with each norm, at the learning rate that suits it best.

Short runs choose the learning rate of each norm; final runs with several seeds are tested once. Side questions:
--question batch_size repeats the final runs with other batch sizes, at equal epochs; depth asks the same of a ViT with
four times the depth and half the width; pretrained starts each norm from weights that were trained with LN. Each run
leaves one file in results/norm_study/, from which the tables and figures are drawn. The same command resumes; what has
a file is not run again. scripts/norm_study.py trains larger models with one recipe for all norms, to repeat published
tables.

A learning rate still trains a norm if the validation accuracy of its short run is above chance by at least half as much
as that of the norm's best short run. The largest such rate is a result too.

    python scripts/norm_findings.py
"""

import itertools
import math
from argparse import Namespace

from study import SCRATCH, Study, add_study_flags, chosen_contenders, draw, finish, plan_final, run_study, time_steps
from study_pretraining import Pretraining, add_pretraining_flags, check_classes

from models import NORM_TYPES
from utils.errors import run_script
from utils.flag_types import Parser, one_of, positive
from utils.profiling import markdown_table
from utils.records.files import replace_file
from utils.study_records import FINAL, GRID, grid_of, grouped, read_records
from utils.study_tables import by_contender, summary_table

NORMS, BATCH_SIZE, DEPTH, PRETRAINED = ("norms", "batch_size", "depth", "pretrained")
BATCH_SIZES = (8, 32, 128)
MODEL = "ViT-Mini_4"
STUDY = Study(
    "norm_study",
    {norm: {"norm_type": norm} for norm in NORM_TYPES},
    reference="LN",
    recipe={**SCRATCH, "model_type": MODEL},
)
DEEP = STUDY._replace(
    recipe={**SCRATCH, "model_type": "ViT-Nano_4", "model_fields": ["num_layers=24"]},
    labels={"model": "ViT-Nano_4 with 24 blocks"},
)


def main():
    args = parse_flags()
    if not args.draw:
        QUESTIONS[args.question](args)
    if not args.dry_run:
        draw(args.results, NORM_TYPES)
        summarise(args.results)


def parse_flags():
    parser = Parser(__doc__)
    add_study_flags(parser, STUDY.name)
    parser.set_defaults(output_dir="output/norm_findings")  # scripts/norm_study.py has output/norm_study
    group = parser.add_argument_group("question")
    group.add_argument(
        "--question",
        type=one_of("question", QUESTIONS),
        default=NORMS,
        metavar="NAME",
        help=f"{NORMS}: {MODEL} from scratch; {BATCH_SIZE}: then also with other batch sizes; {DEPTH}: a deeper and "
        f"narrower ViT; {PRETRAINED}: from weights trained with LN on other classes.",
    )
    group.add_argument(
        "--batch_sizes",
        type=positive,
        nargs="+",
        default=list(BATCH_SIZES),
        metavar="N",
        help="The batch sizes compared.",
    )
    add_pretraining_flags(group)
    args = parser.parse_args()
    check_classes(args)
    return args


def run_norms(args):
    run_study(chosen_contenders(STUDY, args.contenders), args)


def run_depth(args):
    run_study(chosen_contenders(DEEP, args.contenders), args)


def run_pretrained(args):
    """Pretrain with LN on the source classes, then train with each norm on the target classes."""
    pretraining = Pretraining(STUDY.name, MODEL, args, args.pretraining_epochs)
    weights = {"pretrained_dir": str(pretraining.weights)}
    study = STUDY._replace(
        contenders={norm: {**flags, **weights} for norm, flags in STUDY.contenders.items()},
        recipe={**STUDY.recipe, "classes": args.target},
        labels={"weights": "pretrained with LN"},
    )
    study = chosen_contenders(study, args.contenders)
    with pretraining.trained():
        run_study(study._replace(recorded=pretraining.recorded()), args)


def run_batch_sizes(args):
    """The runs of the main question, then the final runs with the other batch sizes."""
    study = chosen_contenders(STUDY, args.contenders)
    rates = run_study(study, args)
    sizes = [size for size in args.batch_sizes if size != args.train_batch_size]
    if len(rates) < len(study.contenders):
        print(f"# the final runs with batch size {', '.join(map(str, sizes))} follow then")
    planned = []
    for size in sizes:
        decay = scaled(study.recipe["weight_decay"], size / args.train_batch_size)
        of_size = study._replace(labels={"batch size": size}, recipe={**study.recipe, "weight_decay": decay})
        own = Namespace(**{**vars(args), "train_batch_size": size})
        for number, (name, rate) in itertools.product(args.seeds, rates.items()):
            planned.append(plan_final(of_size, own, name, scaled(rate, size / args.train_batch_size), number))
    finish(planned, args)
    of_first_seed = [each for each in planned if each.run.flags.seed == args.seeds[0]]
    for size in sizes:
        time_steps([each for each in of_first_seed if each.run.flags.train_batch_size == size], args)


def scaled(value, ratio):
    """A learning rate or weight decay for a batch size `ratio` times as large: by the square root.

    That is usual for the rate with AdamW and Muon. With the same for the decay, it is as large per pass.
    """
    return float(f"{value * math.sqrt(ratio):.6g}")


def summarise(folder):
    """Write summary.md from the results: the largest learning rates, and the accuracies at each batch size."""
    parts = []
    records = read_records(folder)
    for (kind, text), group in grouped(records).items():
        if kind == GRID:
            parts.append(f"## Largest learning rate that still trains: {text}\n\n{rates_table(group.values())}\n")
    finals = [record for record in records.values() if record["kind"] == FINAL]
    finals = [record for record in finals if record["group"].keys() <= {"epochs", "batch size"}]
    for epochs in dict.fromkeys(record["group"]["epochs"] for record in finals):
        of_epochs = [record for record in finals if record["group"]["epochs"] == epochs]
        columns = by_batch_size(of_epochs)
        if len(columns) > 1:
            table = summary_table(columns, STUDY.reference, NORM_TYPES)
            parts.append(f"## Batch sizes: epochs {epochs}, test accuracy\n\n{table}\n")
    text = "\n".join(parts)
    replace_file(folder / "summary.md", lambda path: path.write_text(text))
    print(f"\n{text}\nsummary: {folder / 'summary.md'}")


def by_batch_size(records):
    """{title: {norm: records}} in ascending order of the batch size."""
    sizes = sorted({record["flags"]["train_batch_size"] for record in records})
    of_size = {size: [each for each in records if each["flags"]["train_batch_size"] == size] for size in sizes}
    return {f"batch size {size}": by_contender(found) for size, found in of_size.items()}


def rates_table(records):
    """Markdown of the short runs of one group: the largest learning rate of each norm that still trains."""
    rows = []
    for name, of_name in by_contender(records, NORM_TYPES).items():
        grid = grid_of(of_name, name, of_name[0]["group"])
        largest = largest_rate(grid, 1 / of_name[0]["classes"])
        if largest is None:
            rows.append([name, "none", ""])
        else:
            edge = ", the largest tried" if largest == max(grid) else ""
            rows.append([name, f"{largest:g}{edge}", f"{100 * grid[largest]:.2f} %"])
    return markdown_table(["contender", "learning rate", "validation accuracy"], rows)


def largest_rate(grid, chance):
    """The largest rate of {learning rate: accuracy} that still trains; None if all are at `chance` or NaN."""
    gains = {rate: accuracy - chance for rate, accuracy in grid.items() if accuracy > chance}
    best = max(gains.values(), default=None)
    return max((rate for rate, gain in gains.items() if gain >= best / 2), default=None)


QUESTIONS = {NORMS: run_norms, BATCH_SIZE: run_batch_sizes, DEPTH: run_depth, PRETRAINED: run_pretrained}

if __name__ == "__main__":
    run_script(main)
