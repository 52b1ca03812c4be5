"""Accuracy against speed: a ViT whole, reduced by facility location and by ToMe, and its Conformer, from scratch.

All are trained the same way on a slice of CIFAR-10 at 32x32, some five minutes a run on a CPU core; then
benchmarks/token_reduction.py times their training steps in turns, for one table and one figure of accuracy over
images/s. The same command goes on where it broke off; finished runs are not run again.

    python scripts/token_reduction.py --seeds 0 1
"""

import subprocess
import sys
from pathlib import Path

from hybrid_vs_cnn import GIVEN, PRECISION, RECIPE, add_experiment_flags  # puts the repository on the path

import train
from models.configs import CONFORMERS, VITS
from models.token_reduction import METHODS
from utils.arguments import Parser, add_reductions_flags, check_picture_path, one_of
from utils.errors import run_script
from utils.sweeps import check_plan, finish, plan_run, raise_failures


def main():
    args = parse_flags()
    plan = [plan_run(train, flags) for number in args.seeds for flags in flags_of(number, args)]
    check_plan(train, plan)
    raise_failures(finish(plan), len(plan))
    command = [sys.executable, str(Path(__file__).parent.parent / "benchmarks/token_reduction.py")]
    command += ["--runs", *(str(run.folder) for run in plan)]
    command += ["--picture", args.figure, "--keep_tokens", *map(str, args.keep_tokens), "--checkpoint", ""]
    command += ["--precision", "bf16", "--fp16_opt_level", PRECISION["fp16_opt_level"]]
    for flag in ("model_type", "reduction_layer", "img_size"):
        command += [f"--{flag}", str(getattr(args, flag))]
    print(flush=True)
    sys.exit(subprocess.run([*command, "--batch_size", str(args.train_batch_size)]).returncode)


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("experiment")
    group.add_argument("--model_type", type=one_of("ViT", VITS), default="ViT-Mini_4", metavar="NAME", help="the ViT")
    add_reductions_flags(group, reduction_layer=2)
    add_experiment_flags(group, "token_reduction")
    args = parser.parse_args()
    check_picture_path(args.figure, "--figure")
    return args


def flags_of(number, args):
    """The flags of train.py for each model's run with one seed."""
    layer = {"reduction_layer": args.reduction_layer}
    models = [(args.model_type, {})]
    for keep in args.keep_tokens:
        models += [(args.model_type, {"token_reduction": method, "keep_tokens": keep, **layer}) for method in METHODS]
    conformer = args.model_type.replace("ViT", "Conformer")
    if conformer in CONFORMERS:
        models.append((conformer, layer))
    shared = {**{flag: getattr(args, flag) for flag in GIVEN}, **RECIPE, **PRECISION, "seed": number}
    plan = []
    for model_type, reduction in models:
        parts = [model_type, *(str(reduction[key]) for key in ("token_reduction", "keep_tokens") if key in reduction)]
        plan.append({"name": "-".join([*parts, f"seed{number}"]), "model_type": model_type, **reduction, **shared})
    return plan


if __name__ == "__main__":
    run_script(main)
