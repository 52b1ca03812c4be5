"""Accuracy of a run's checkpoint or of Google's .npz on a data set, or its five best classes for single images."""

import hashlib
import json
import time
from pathlib import Path

import torch

from models import MODEL_TYPES, TOKEN_REDUCTIONS, build_model, canonical_model_type, num_classes_of
from utils.checks import check_figure_path
from utils.data.augmentation import normalise
from utils.data.datasets import DATASETS, DataOptions, load_dataset
from utils.data.images import read_image, stretch
from utils.errors import UserError, run_script
from utils.evaluation import check_classes, evaluate
from utils.flag_groups import (
    add_checkpoint_flags,
    add_data_flags,
    add_precision_flags,
    add_token_reduction_flags,
    token_reduction_of,
)
from utils.flag_types import Parser, positive
from utils.parallel.precision import make_precision
from utils.parallel.processes import join_processes
from utils.pretrained import download as fetch_published
from utils.pretrained import load_pretrained, model_type_of, open_npz
from utils.records.checkpoint import load_into, load_weights
from utils.records.run_folder import read_config

# Of ImageNet-1k's sorted class ids (wnids), joined by blanks: in this order torchvision names them.
IMAGENET_WNIDS_SHA256 = "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"


def main():
    args = parse_flags()
    with join_processes() as processes, torch.no_grad():
        model, classes, img_size, flags = load_model(
            args.checkpoint, args.model_type, args.img_size, args.download, token_reduction_of({}, vars(args))
        )
        if args.dataset is None and flags:
            args.dataset, args.data_dir = flags["dataset"], args.data_dir or flags["data_dir"]
        model.to(processes.device).eval()
        precision = make_precision(args, processes.device)
        precision.cast(model)
        if args.images:
            report = classify(model, args.images, classes, img_size, precision, processes.device, flags)
            text = classification_text(report)
        else:
            report = measure(model, classes, img_size, precision, processes, args, flags)
            text = accuracy_text(report)
        if processes.rank == 0:
            print(json.dumps(report, indent=2) if args.json else text)


def parse_flags():
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files to classify, instead of a data set")
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type, required=True)
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="the run's own")
    data = parser.add_argument_group("data")
    add_data_flags(data, default=None)
    data.add_argument("--eval_batch_size", type=positive, default=64, metavar="N", help="images at once")
    add_precision_flags(parser.add_argument_group("precision"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the results as JSON, for scripts")
    output.add_argument(
        "--confusion_matrix", metavar="PNG", help="default: confusion_matrix.png in the folder of the checkpoint"
    )
    return parser.parse_args()


def load_model(checkpoint, model_type=None, img_size=None, download=False, reduction=None):
    """(model, names of its classes, image size, flags of its run) from a run's .safetensors or an .npz without a run.

    `model_type` and `img_size` are found out where they are None. `reduction` is {keyword of `build_model`: value} for
    another token reduction than the run's own. Raises UserError.
    """
    path = Path(checkpoint)
    if path.suffix == ".npz":
        return load_published(path, model_type, img_size, download, reduction)
    weights, _ = load_weights(path)
    config = read_config(path.parent) or {}
    if not {"flags", "classes"} <= config.keys():
        raise UserError(f"{path.parent} has no config.json of a run, so the model of {path.name} is unknown")
    flags, classes = config["flags"], config["classes"]
    model_type = model_type or flags["model_type"]
    keywords = {"norm_type": flags.get("norm_type", "LN"), **token_reduction_of(flags, reduction)}
    model = make_model(model_type, flags["img_size"], len(classes), **keywords)
    load_into(model, weights, path)
    img_size = img_size or flags["img_size"]
    if img_size != flags["img_size"]:
        resized = make_model(model_type, img_size, len(classes), **keywords)
        resized.load_from(model.export_npz(), head="keep")
        model = resized
    return model, classes, img_size, flags


def load_published(path, model_type, img_size, download, reduction):
    if download and not path.exists():
        fetch_published(path)
    arrays = open_npz(path)
    model_type = model_type or model_type_of(path, MODEL_TYPES)
    if model_type is None:
        raise UserError(f"{path} is not named after a model; name it with --model_type")
    num_classes = num_classes_of(arrays)
    if num_classes is None:
        raise UserError(f"{path} has no head, so it can't classify; fine-tune it with train.py")
    img_size = img_size or pretrained_img_size(arrays, model_type)
    model = make_model(model_type, img_size, num_classes, **(reduction or {}))
    load_pretrained(model, path, model_type, head="keep")
    return model, class_names(num_classes), img_size, {}


def pretrained_img_size(arrays, model_type):
    """The side in pixels of the square images that the checkpoint's position embeddings are for; 224 without any."""
    key = "Transformer/posembed_input/pos_embedding"
    if key not in arrays:
        return 224
    with torch.device("meta"):
        rows, _ = make_model(model_type, img_size=224).patch_embed.grid_size
    return 224 // rows * round((arrays[key].shape[1] - 1) ** 0.5)


def make_model(*arguments, **keywords):
    try:
        return build_model(*arguments, **keywords)
    except ValueError as error:
        raise UserError(str(error)) from error


def class_names(num_classes):
    """ImageNet's names for 1000 classes (from torchvision), numbers otherwise."""
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [f"class {number}" for number in range(num_classes)]


def readable(classes):
    """The names to show: where folders are ImageNet's 1000 classes, what they mean stands before their ids."""
    if hashlib.sha256(" ".join(classes).encode()).hexdigest() != IMAGENET_WNIDS_SHA256:
        return classes
    return [f"{name} ({wnid})" for name, wnid in zip(class_names(1000), classes, strict=True)]


def measure(model, classes, img_size, precision, processes, args, flags):
    """Evaluate on the test set, its images normalised as in the run of these flags, and draw the confusion matrix."""
    picture = Path(args.confusion_matrix or Path(args.checkpoint).parent / "confusion_matrix.png")
    check_figure_path(picture, "--confusion_matrix")
    dataset = args.dataset or "cifar10"
    source = DATASETS[dataset]
    data_dir = args.data_dir or "data"
    found = source.count_classes(data_dir)
    if found != len(classes):
        raise UserError(f"{args.checkpoint} tells {len(classes)} classes apart, {dataset} has {found}")
    options = DataOptions(data_dir, args.num_workers, mean_std_of(flags), args.skip_broken)
    test_set = load_dataset(dataset, "test", options, processes)
    if not args.checkpoint.endswith(".npz"):
        check_classes(args.checkpoint, classes, dataset, test_set.classes)
    start = time.perf_counter()
    size = (img_size, img_size)
    result = evaluate(model, test_set, size, args.eval_batch_size, precision, processes, per_class=True)
    seconds = time.perf_counter() - start
    confusion = result["confusion"]
    names = readable(test_set.classes)
    if processes.rank == 0:
        from utils.visualize import plot_confusion_matrix, save

        title = f"{checkpoint_title(args.checkpoint)} on {dataset}"
        save(plot_confusion_matrix(confusion, names, title), picture)
    images = confusion.sum(dim=1)
    per_class = zip(names, (confusion.diagonal() / images).tolist(), images.tolist(), strict=True)
    count = int(images.sum())
    return {
        "checkpoint": str(args.checkpoint),
        "dataset": dataset,
        "images": count,
        "skipped": len(test_set) - count,
        "loss": result["loss"],
        "top1_accuracy": result["accuracy"],
        "top5_accuracy": result["top5_accuracy"],
        "per_class_accuracy": {name: accuracy for name, accuracy, count in per_class if count},
        "images_per_second": count / seconds,
        "confusion_matrix": str(picture),
    }


def accuracy_text(report):
    per_class = sorted(report["per_class_accuracy"].items(), key=lambda item: item[1])
    shown = per_class if len(per_class) <= 20 else per_class[:10]
    width = max(len(name) for name, _ in shown)
    skipped = f", {report['skipped']} more could not be read" if report["skipped"] else ""
    lines = [
        f"{report['checkpoint']} on {report['dataset']}: {report['images']} test images{skipped}",
        f"top-1 {100 * report['top1_accuracy']:.2f} %   top-5 {100 * report['top5_accuracy']:.2f} %   "
        f"loss {report['loss']:.4f}   {report['images_per_second']:.1f} images/s",
        f"accuracy of {'each class' if shown is per_class else 'the ten hardest classes'}, lowest first:",
        *(f"  {name:<{width}}  {100 * accuracy:6.2f} %" for name, accuracy in shown),
        f"confusion matrix: {report['confusion_matrix']}",
    ]
    return "\n".join(lines)


def classify(model, paths, classes, img_size, precision, device, flags):
    """[{"image": path, "classes": [{"class": name, "probability": p}, ...]}, ...], the five best first."""
    report, classes = [], readable(classes)
    for path in paths:
        images = prepare_image(read_image(path), img_size, flags)[None].to(device)
        with precision.autocast():
            logits = model(precision.inputs(normalise(images, mean_std_of(flags))))
        best = logits.float().softmax(dim=1)[0].topk(min(5, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        report.append({"image": path, "classes": [{"class": classes[i], "probability": p} for i, p in pairs]})
    return report


def checkpoint_title(checkpoint):
    """A file's name for a picture, with its folder, which is the run's name."""
    return "/".join(Path(checkpoint).resolve().parts[-2:])


def prepare_image(image, img_size, flags=None):
    """A picture of any size, uint8 (3, H, W), as a square, uint8 (3, img_size, img_size).

    `flags` are those of the model's run, {} or None without one: its evaluation says what becomes of the edges.
    """
    prepare = DATASETS[flags["dataset"]].prepare if flags else stretch
    return prepare(image, (img_size, img_size))


def mean_std_of(flags):
    """The run's --mean_std; Google's models, and runs from before there was the flag, have "half"."""
    return flags.get("mean_std", "half")


def classification_text(report):
    lines = []
    for item in report:
        lines.append(item["image"])
        lines += [f"  {100 * best['probability']:6.2f} %  {best['class']}" for best in item["classes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
