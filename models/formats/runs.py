"""A run of this project: our names, and the flags in the run's config.json."""

from models.configs import config_of, fields_of_flags
from models.npz import CheckpointError

FORMAT = "vision-transformers"  # in the metadata, which utils/records/weights.py writes
NORM, REDUCTION = "norm_type", ("token_reduction", "keep_tokens", "reduction_layer", "tome_r")


def is_run(checkpoint):
    """Whether the file says so; earlier versions wrote the step only."""
    written = checkpoint.metadata.get("format") == FORMAT
    return written or ("step" in checkpoint.metadata and "flags" in (checkpoint.config or {}))


def facts(checkpoint):
    """{field of formats.Found: value}. Raises CheckpointError without the run's flags."""
    config = checkpoint.config or {}
    if not {"flags", "classes"} <= config.keys():
        raise CheckpointError("it is of a run, whose config.json is not in the same folder")
    flags = config["flags"]
    model_type, fields = flags["model_type"], fields_of_flags(flags)
    known = config_of(model_type).copy_and_resolve_references()
    known.update(fields)
    keywords = {}
    if "hidden_size" in known:
        reduction = {name: flags[name] for name in REDUCTION if flags.get(name) is not None}
        keywords = {NORM: flags.get(NORM, "LN"), **reduction}
    return {
        "format": "a run",
        "state": checkpoint.tensors,
        "config": known,
        "img_size": flags["img_size"],
        "mean_std": flags.get("mean_std", "half"),
        "classes": config["classes"],
        "assumed": set(),
        "keywords": keywords,
        "model_type": model_type,
        "fields": fields,
    }
