"""Seconds from `python train.py` to the end of its first step, and where they go; and what the imports cost.

The task is fine-tuning on CIFAR-10 at 224 from an .npz. Weights and pictures are random, of the true files' names,
shapes and sizes. Every round is a process of its own; its processor seconds are told too, which other work on the
machine lengthens less. The imports are those of `import train`, by Python's own clock (-X importtime); a package's
seconds are those of its modules alone, not of what they import.

    python benchmarks/startup.py
"""

import hashlib
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from steps import ROOT, add_size_flag, machine, make_model

from models import MODEL_TYPES, canonical_model_type
from utils.arguments import Parser, argument, one_of, positive
from utils.errors import RunStoppedError, run_script

FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
SHOWN = 0.02  # seconds; packages that take less are added up


def main():
    args = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = folder / f"{args.model_type}.npz"
        np.savez(weights, **make_model(args.model_type, args.img_size, num_classes=21843).export_npz())
        lists = make_cifar(folder / "data") if args.dataset == "cifar10" else {}
        (folder / "lists.json").write_text(json.dumps(lists))
        rounds = [first_step(args, folder, weights) for _ in range(args.rounds + 1)][1:]  # the first fills the caches
        imports = [seconds_of_imports() for _ in range(args.rounds)]
    print(
        f"{args.model_type} on {args.dataset} at {args.img_size}x{args.img_size} from an .npz, a step of "
        f"{args.batch_size} images, bf16\n{machine()}, median of {args.rounds} rounds\n"
    )
    print(table("phase", ("seconds", "processor seconds"), rounds) + "\n")
    print(table("imported", ("seconds",), add_up(imports)))


def parse_flags():
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("benchmark")
    names = ", ".join(MODEL_TYPES)
    group.add_argument("--model_type", type=argument(canonical_model_type), default="ViT-B_16", help=names)
    add_size_flag(group)
    group.add_argument("--batch_size", type=positive, default=4, metavar="N", help="images of the first step")
    group.add_argument("--dataset", type=one_of("data set", ("cifar10", "digits")), default="cifar10", help="the data")
    group.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed starts, after one that is not")
    return parser.parse_args()


def make_cifar(data_dir):
    """Files of CIFAR-10's size with random pictures; what torchvision's CIFAR10 is to be told about them."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    sums = {}
    for name in FILES:
        pixels = random.integers(0, 256, (10000, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": random.integers(0, 10, 10000).tolist()}
        sums[name] = write_pickle(folder / name, batch)
    sums["batches.meta"] = write_pickle(folder / "batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    return {
        "train_list": [[name, sums[name]] for name in FILES[:-1]],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    }


def write_pickle(path, content):
    """The md5 sum of what is written."""
    data = pickle.dumps(content)
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def first_step(args, folder, weights):
    """{phase: [seconds, processor seconds]} of one start."""
    flags = ["--name", "run", "--overwrite", "--output_dir", folder / "output", "--dataset", args.dataset, "--bf16"]
    flags += ["--data_dir", folder / "data", "--model_type", args.model_type, "--img_size", args.img_size]
    flags += ["--pretrained_dir", weights, "--train_batch_size", args.batch_size]
    script = [sys.executable, ROOT / "benchmarks" / "first_step.py"]
    return json.loads(call([*script, repr(time.time()), folder / "lists.json", *flags])[0].splitlines()[-1])


def seconds_of_imports():
    """{package: seconds of its own modules} of `import train`."""
    _, told = call([sys.executable, "-X", "importtime", "-c", "import train"])
    seconds = {}
    for line in told.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and parts[0].strip().isdigit():
            package = package_of(parts[2].strip())
            seconds[package] = seconds.get(package, 0.0) + int(parts[0]) / 1e6
    return {**seconds, "total": sum(seconds.values())}


def package_of(module):
    """The module's topmost package; this project's own, and torch's compiler with what it needs, are one each."""
    first, *rest = module.split(".")
    if first in ("train", "models", "utils"):
        return "this project"
    if first in ("sympy", "mpmath") or (
        first == "torch" and rest and rest[0] in ("_dynamo", "_inductor", "_functorch")
    ):
        return "torch's compiler, with sympy"
    return "Python's own" if first in sys.stdlib_module_names else first


def add_up(imports):
    """The rounds with only those packages that take time, the largest first."""
    names = sorted(imports[0], key=lambda name: -statistics.median(one.get(name, 0.0) for one in imports))
    large = [name for name in names if name != "total" and statistics.median(o.get(name, 0.0) for o in imports) > SHOWN]
    return [
        {
            **{name: [one.get(name, 0.0)] for name in large},
            "all others": [sum(value for name, value in one.items() if name not in (*large, "total"))],
            "total": [one["total"]],
        }
        for one in imports
    ]


def table(title, clocks, rounds):
    """Markdown: medians with the fastest and slowest round; a round is {name: [a number of each of the clocks]}."""
    titles = [title, *(text for clock in clocks for text in (clock, "fastest to slowest round"))]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in rounds[0]:
        cells = [name]
        for values in zip(*(one[name] for one in rounds), strict=True):
            cells += [f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def call(command):
    """(stdout, stderr) of the command. Raises RunStoppedError with the last line of its complaint."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RunStoppedError(f"{Path(command[1]).name} failed: {complaint}", status=1)
    return done.stdout, done.stderr


if __name__ == "__main__":
    run_script(main)
