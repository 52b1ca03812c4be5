"""Features of images: the vectors that a trained model computes its logits from."""

import copy
import os

import numpy as np
import torch
from torch import nn

from utils.errors import UserError
from utils.evaluation import progress_bar
from utils.parallel.precision import make_precision
from utils.parallel.processes import sum_over_processes, union_over_processes


def classifier_of(model):
    """The last linear layer of a model: a ViT's head, or the 1x1 convolution in the head of a CNN or Conformer."""
    return getattr(model.head, "fc", model.head)


def without_classifier(model):
    """A copy of `model` from images (B, 3, H, W) to features (B, d), the input of its last linear layer.

    These are the class token after the final norm, or after the tanh of a head with `pre_logits`; of a CNN or
    Conformer, the features' mean over the image. The copy shares all weights with `model`.
    """
    copied = copy.deepcopy(model, memo={id(weight): weight for weight in model.parameters()})
    owner, name = (copied.head, "fc") if hasattr(copied.head, "fc") else (copied, "head")
    setattr(owner, name, nn.Identity())
    return copied


@torch.no_grad()
def extract_features(saved, data_set, args, processes):
    """(features float32 (n, d), labels int64 (n,)): arrays in the order of the data set, the same in all processes.

    `saved` is a SavedModel, whose model is moved to the device and cast; `data_set` is that of `load_dataset`; `args`
    has the flag `eval_batch_size` and those of the precision. Each process computes its share of the images. Images
    that are skipped because they are unreadable are omitted. Raises UserError if none can be read, and for features
    that are infinite or NaN.
    """
    model = without_classifier(saved.model).to(processes.device)
    precision = make_precision(args, processes.device)
    precision.cast(model)
    size = (saved.img_size, saved.img_size)
    features = torch.zeros(len(data_set), classifier_of(saved.model).weight.shape[1])
    batches = [features[:0]]
    with progress_bar(data_set, processes, "features") as bar:
        for images, labels in data_set.eval_batches(size, args.eval_batch_size, processes):
            with precision.autocast():
                batches.append(model(precision.inputs(images)).float().cpu())
            bar.update(len(labels))
    rows = readable_rows(data_set)
    if not len(rows):
        raise UserError(f"none of the {len(data_set)} images can be read")
    features[rows[rows % processes.size == processes.rank]] = torch.cat(batches)
    features = sum_over_processes(features)
    if not features.isfinite().all():
        raise UserError(f"{saved.title} has features that are infinite or NaN; compute in float32, or by --bf16")
    return features[rows].numpy(), torch.as_tensor(data_set.labels).cpu().numpy()[rows]


def save_features(path, saved, data_set, what, args, processes):
    """Write `extract_features` as an .npz file; returns a report, in which the data set is called `what`.

    Its arrays are features float32 (n, d), labels int64 (n,), files (n,), the paths of the images, "" for an image that
    is not a file, and classes, the names of the labels. None of them is pickled.
    """
    features, labels = extract_features(saved, data_set, args, processes)
    files = [data_set.path_of(row) or "" for row in readable_rows(data_set)]
    if processes.is_first:
        np.savez(path, features=features, labels=labels, files=np.array(files), classes=np.array(data_set.classes))
    return {
        "checkpoint": str(args.checkpoint),
        "features": path,
        "of": what,
        "images": len(features),
        "skipped": len(data_set) - len(features),
        "dimension": features.shape[1],
    }


def features_text(report):
    """The report of `save_features` for a terminal."""
    skipped = f"; {report['skipped']} more could not be read" if report["skipped"] else ""
    return f"{report['features']}: {report['images']} x {report['dimension']} features of {report['of']}{skipped}"


def readable_rows(data_set):
    """Indices of the images that no process has skipped."""
    unreadable = union_over_processes(data_set.unreadable)
    if not unreadable:
        return np.arange(len(data_set))
    return np.flatnonzero([os.fsdecode(path) not in unreadable for path in data_set.paths])
