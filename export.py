"""Write a checkpoint of a run, of Google or of another library for timm, Hugging Face, ONNX or as Google's .npz."""

import json
from pathlib import Path

from inference import CHECK_IMAGES, SavedModel
from models import TOKEN_REDUCTIONS, canonical_model_type
from models.formats.exports import TARGETS
from utils.errors import run_script
from utils.exports import check_output
from utils.flag_groups import add_checkpoint_flags, add_token_reduction_flags, token_reduction_of
from utils.flag_types import Parser, one_of


def main():
    args = parse_flags()
    check_output(TARGETS[args.to], Path(args.output), args.overwrite)  # before anything is downloaded
    reduction = token_reduction_of({}, vars(args))
    saved = SavedModel.load(
        args.checkpoint, args.model_type, args.img_size, args.download, reduction, vars(args), needs_head=True
    )
    report = saved.export(args.to, args.output, args.images, args.overwrite)
    print(json.dumps(report, indent=2) if args.json else export_text(report))


def parse_flags():
    parser = Parser(__doc__)
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group, canonical_model_type, required=True)
    add_token_reduction_flags(group, TOKEN_REDUCTIONS, default="that of the run")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--to",
        required=True,
        type=one_of("target", TARGETS),
        metavar="NAME",
        help="npz: Google's names and layout; npz-float16: the same in half the size; timm and hf: a folder that timm "
        "and Hugging Face's transformers load; onnx: a graph for ONNX Runtime. A .json file describes an .npz or .onnx "
        "file.",
    )
    output.add_argument(
        "--output", required=True, metavar="PATH", help="The folder for timm and hf, the .npz or .onnx file otherwise."
    )
    output.add_argument("--overwrite", action="store_true", help="Replace an earlier export.")
    output.add_argument(
        "--images",
        nargs="+",
        default=[str(CHECK_IMAGES)],
        metavar="IMAGE",
        help="Image files, folders or glob patterns in quotes on which the result is compared with the checkpoint; "
        "default: the ten digits of this project.",
    )
    output.add_argument("--json", action="store_true", help="Print the report as JSON, for scripts.")
    return parser.parse_args()


def export_text(report):
    """The report of SavedModel.export for a terminal."""
    if not report["checked"]:
        lines = [f"{report['output']} is written but not checked: {report['install']}"]
    else:
        images = report["images"]
        lines = [
            f"{report['output']} is written, and checked with {report['checked']} on {images} images:",
            f"  largest relative difference of the logits {report['largest_relative_difference']:.1e} "
            f"(bound {report['bound']:g})",
            f"  same class for {report['same_class']} of {images}",
        ]
        if report["same_class_prepared_by_library"] is not None:
            lines.append(f"  same class for {report['same_class_prepared_by_library']} if the library prepares them")
        if report["other_tokens_chosen"]:
            lines.append(f"  other tokens chosen on {report['other_tokens_chosen']}, whose logits are not compared")
    return "\n".join([*lines, f"load it by {report['usage']}"])


if __name__ == "__main__":
    run_script(main)
