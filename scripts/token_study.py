"""Does choosing the kept patches beat a random choice, and does a submodular choice beat ToMe? Accuracy against speed.

Contenders: a ViT with all patches; with facility location, ToMe and random patches after one block; with ToMe in every
block; and its Conformer. `--question trained` trains each from scratch with its reduction, `untrained` reduces the
tokens of the trained whole ViT without training it. Training steps and forward passes are timed interleaved. Each
question ends in a table with paired differences over the seeds and a figure of accuracy over images/s.

    python scripts/token_study.py --keep_tokens 0.5 0.25
    python scripts/token_study.py --keep_tokens 0.5 0.25 --question untrained
"""

import statistics
from argparse import Namespace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from study import SCRATCH, Study, add_study_flags, plan_final, run_studies, text_of
from study_speed import FORWARD, completed, known_of, measured_times, read_json, were_timed, write_json

from benchmarks.steps import EVERY_BLOCK, choice_of_tokens, machine, reduction_grid
from inference import SavedModel
from models.configs import VITS
from models.token_reduction import REDUCTION_METHODS
from utils.data.datasets import DataOptions, find_splits, load_dataset
from utils.errors import UserError, run_script
from utils.evaluation import evaluate_model
from utils.figures import OKABE_ITO, save, style_axes, wrap_text
from utils.flag_groups import add_token_reduction_grid_flags
from utils.flag_types import Parser, one_of
from utils.parallel.processes import choose_device, one_process
from utils.profiling import markdown_table, token_reduction_cells
from utils.records.files import replace_file
from utils.records.run_folder import commit_of_code
from utils.records.weights import LAST
from utils.study_records import FINAL, read_records
from utils.study_tables import STEP, accuracies_of, difference_text, speed_file
from utils.sweeps import mean_and_range

WHOLE, NO_REDUCTION = "whole", ("none", "all")
PASSES = {"trained": STEP, "untrained": FORWARD}  # {question: what its speed is measured by}
EXPLAINED = {"trained": "each trained with its reduction", "untrained": "trained whole, then reduced without training"}
CHOICE = "choice"
PAIRS = (("facility", "tome"), ("facility", "random"), ("tome", "random"))
LABELS = {
    "none": "ViT, all patches",
    "facility": "facility location",
    "tome": "ToMe",
    "random": "random patches",
    EVERY_BLOCK: "ToMe in every block",
}


def main():
    args = parse_flags()
    grid = reduction_grid(args.model_type, args.keep_tokens, args.reduction_layer, args.tome_r)
    models = {contender(name): {"model_type": model_type, **keywords} for name, (model_type, keywords) in grid.items()}
    study = Study("token_study", models, WHOLE, timed=timed_choice)
    if args.question == "untrained":
        args.contenders = [WHOLE]
        grid = {
            name: value for name, value in grid.items() if value[0] == args.model_type
        }  # no Conformer: it has a CNN
    run_studies([study], args)
    if args.dry_run:
        return
    records = final_records(args)
    if args.question == "trained":
        accuracies = {name: accuracies_of(of_contender(records, contender(name))) for name in grid}
    else:
        accuracies = untrained_accuracies(records, grid, args)
    accuracies = {name: found for name, found in accuracies.items() if found}
    if NO_REDUCTION not in accuracies:
        raise UserError(
            f"{args.results} has no finished run of {WHOLE}, with which the others are compared; run it too"
        )
    record = next(iter(records.values()))
    report(accuracies, times_of(study, list(accuracies), record, args), record["data"], args)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("contenders")
    group.add_argument("--model_type", type=one_of("ViT", VITS), default="ViT-Mini_4", metavar="NAME", help="The ViT.")
    add_token_reduction_grid_flags(group, reduction_layer=2, tome_r=[8, 11])  # about as fast as 50 and 25 % kept
    group.add_argument(
        "--question",
        type=one_of("question", PASSES),
        default="trained",
        metavar="NAME",
        help=f"What is asked: {' or '.join(PASSES)}.",
    )
    add_study_flags(parser, "token_study")
    return parser.parse_args()


def contender(name):
    """The contender's name of (method, patches kept)."""
    return WHOLE if name == NO_REDUCTION else " ".join(map(str, name))


def final_records(args):
    """{path: record} of the final runs with this budget. Raises UserError without any."""
    records, epochs = read_records(args.results), text_of(args.epochs)
    found = {
        path: each for path, each in records.items() if (each["kind"], each["group"]) == (FINAL, {"epochs": epochs})
    }
    if not found:
        raise UserError(f"{args.results} has no final runs of {epochs} epochs; run the study without --draw")
    return found


def of_contender(records, name):
    return [record for record in records.values() if record["contender"] == name]


def untrained_accuracies(records, grid, args):
    """{name: {seed: test accuracy}} of the trained whole models with each reduction; what is missing is measured.

    Raises UserError without the weights of a run.
    """
    accuracies = {name: {} for name in grid}
    for path, record in records.items():
        if record["contender"] != WHOLE or record["diverged"]:
            continue
        file = args.results / "untrained" / path.name
        wanted = {contender(name): grid[name][1] for name in grid}
        content = read_json(file)
        if content.get("weights") != record["weights"]:
            content = {}
        known = known_of(content, "accuracy", wanted)
        missing = {name: keywords for name, keywords in wanted.items() if name not in known}
        if missing and not args.draw:
            known |= evaluate_reductions(path.stem, missing, args)
            what = {"run": path.stem, "weights": record["weights"], "machine": machine(), "commit": commit_of_code()}
            write_json(file, {**what, **completed(content, "accuracy", known, wanted)})
        for name in grid:
            if contender(name) in known:
                accuracies[name][record["seed"]] = known[contender(name)]
    return accuracies


def evaluate_reductions(run, reductions, args):
    """{contender: test accuracy} of a run's weights with the reductions {contender: keywords}. Raises UserError."""
    path = Path(args.output_dir) / run / LAST
    if not path.exists():
        raise UserError(f"{path} does not exist, so its tokens can't be reduced; give the --output_dir of the runs")
    print(f"{path} with {len(reductions)} token reductions", flush=True)
    options = DataOptions(data_dir=args.data_dir)
    split = find_splits(args.dataset, options)[-1]
    processes = one_process(choose_device())
    images = load_dataset(args.dataset, split, options, processes)
    found = {}
    for name, keywords in reductions.items():
        saved = SavedModel.load(path, token_reduction=keywords)
        result = evaluate_model(saved.model, images, saved.img_size, Namespace(**saved.flags), processes)
        found[name] = result["accuracy"]
    return found


def times_of(study, names, record, args):
    """The times of the contenders, as of `measured_times`; None with --draw if they were not measured."""
    names = list(map(contender, names))
    if not args.draw:
        planned = [plan_final(study, args, name, args.learning_rates[0], args.seeds[0]) for name in names]
        return measured_times(planned, args.jobs, study.timed)
    file = speed_file(args.results, record)
    content = read_json(file)
    if not were_timed(content, record, {name: study.contenders[name] for name in names}):
        print(f"no figure: {file} does not have the times of all contenders; run the study without --draw")
        return None
    return content


def timed_choice(model, batch_size):
    """The choice of tokens alone, to be timed."""
    return {CHOICE: choice_of_tokens(model, batch_size)} if model.reduction else {}


def report(accuracies, times, data, args):
    """Write and print the tables of a question, and draw its figure; `accuracies` are {name: {seed: accuracy}}."""
    what = PASSES[args.question]
    title = (
        f"{args.model_type} on {data} at {args.img_size}x{args.img_size}, {text_of(args.epochs)} epochs, tokens "
        f"reduced after block {args.reduction_layer} of {VITS[args.model_type].num_layers} or in every block, "
        f"{EXPLAINED[args.question]}"
    )
    parts, files = [title, pairs_table(accuracies)], ["md"]
    stem = args.results / f"{args.question}-epochs={text_of(args.epochs)}"
    if times:
        timed = (
            f"{what}, batch {args.train_batch_size}, bf16 at level {SCRATCH['fp16_opt_level']}, {times['machine']}, "
            f"median of {times['rounds']} rounds"
        )
        parts[1:1] = [speed_table(accuracies, times["seconds"], what, args.train_batch_size), timed]
        speeds = {name: args.train_batch_size / median_of(times, name, what) for name in accuracies}
        save(draw(speeds, accuracies, f"{title}\n{timed}", f"{what} (images/s)"), f"{stem}.png")
        files.append("png")
    text = "\n\n".join(parts) + "\n"
    replace_file(Path(f"{stem}.md"), lambda temporary: temporary.write_text(text))
    print(f"\n{text}")
    for suffix in files:
        print(f"{stem}.{suffix}")


def median_of(times, name, what):
    return statistics.median(times["seconds"][contender(name)][what])


def speed_table(accuracies, seconds, what, batch_size):
    """Markdown: one row per contender with its speed and accuracy."""
    named = {(name, "step"): seconds[contender(name)][what] for name in accuracies}
    named |= {(name, CHOICE): seconds[contender(name)].get(CHOICE) for name in accuracies}
    titles, cells = token_reduction_cells(accuracies, named, batch_size)
    rows = [[*cells[name], mean_and_range(list(found.values())), str(len(found))] for name, found in accuracies.items()]
    return markdown_table([*titles, "test accuracy: mean (range)", "seeds"], rows)


def pairs_table(accuracies):
    """Markdown: differences of the methods at the same number of patches, paired over the seeds."""
    kept = list(dict.fromkeys(kept for method, kept in accuracies if method in REDUCTION_METHODS))
    rows = []
    for one, other in PAIRS:
        pairs = [(accuracies.get((one, k), {}), accuracies.get((other, k), {})) for k in kept]
        rows.append([f"{one} - {other}", *(difference_text(*pair) for pair in pairs)])
    return markdown_table(["points (95 % interval)", *(f"{k} kept" for k in kept)], rows)


def draw(speeds, accuracies, title, label):
    """Test accuracy over images/s, called `label`: one line per method, from all patches to the fewest."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    colours = (OKABE_ITO[-1], *OKABE_ITO)  # the ViT without reduction is black
    for number, method in enumerate(dict.fromkeys(method for method, _ in accuracies)):
        names = [name for name in accuracies if name[0] == method]
        colour = colours[number % len(colours)]
        x = [speeds[name] for name in names]
        values = [[100 * value for value in accuracies[name].values()] for name in names]
        low, y, high = (np.array(list(map(summary, values))) for summary in (min, statistics.mean, max))
        if method in (*REDUCTION_METHODS, EVERY_BLOCK) and NO_REDUCTION in accuracies:
            start = 100 * statistics.mean(accuracies[NO_REDUCTION].values())
            axes.plot([speeds[NO_REDUCTION], x[0]], [start, y[0]], ":", color=colour, lw=1)
        axes.errorbar(x, y, (y - low, high - y), marker="o", color=colour, capsize=3, label=LABELS.get(method, method))
        offset = {"xytext": (5, (6, -13, 15)[number % 3]), "textcoords": "offset points"}
        for (_, kept), *place in zip(names, x, y, strict=True):
            axes.annotate(str(kept), place, fontsize="small", color=colour, **offset)
    axes.set(xlabel=label, ylabel="test accuracy (%)")
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, title="numbers: patches kept, or r")
    style_axes(axes)
    figure.suptitle(wrap_text(title, 90), fontsize="small")
    return figure


if __name__ == "__main__":
    run_script(main)
