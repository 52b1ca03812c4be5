"""Which splits a data set has, and dividing its training images by a seed into those that it lacks."""

import itertools
import math
import os
import re
import warnings

import numpy as np

from utils.errors import UserError

SPLITS = ("train", "val", "test")
# The flags, and fields of DataOptions, by which images belong to a split.
DIVISION = ("classes", "val_split", "test_split", "split_seed", "group_by")
MAX_FOLDS = 20  # of --group_by, for shares in steps of 5 %
NAMES = {"train": "training", "val": "validation", "test": "test"}


def check_shares(own, options, where):
    """Raise UserError if the shares in the DataOptions do not suit a data set with the `own` splits.

    `where` names the data set in the error.
    """
    for split in ("val", "test"):
        if split in own and getattr(options, f"{split}_split"):
            raise UserError(f"{where} has {NAMES[split]} images of its own; omit --{split}_split")
    if options.group_by:
        if not (options.val_split or options.test_split):
            raise UserError("--group_by needs --val_split or --test_split, which it divides by")
        check_regex(options.group_by)


def shares_that_apply(own, options):
    """The DataOptions of a run for another data set with the `own` splits, of which no shares are taken."""
    options = options._replace(**{f"{split}_split": None for split in ("val", "test") if split in own})
    return options if options.val_split or options.test_split else options._replace(group_by=None)


def check_regex(regex):
    """Raise UserError for what is not a regular expression with one group."""
    try:
        groups = re.compile(regex).groups
    except re.error as error:
        raise UserError(f"--group_by {regex!r} is not a regular expression: {error}") from error
    if groups != 1:
        raise UserError(f"--group_by {regex!r} must have one group in parentheses, which names the subject")


def available_splits(own, options):
    """The splits of a data set with the `own` ones, after it is divided by the shares in the DataOptions."""
    return [split for split in SPLITS if split in own or split == "train" or getattr(options, f"{split}_split")]


def divided_rows(own, labels, images, classes, options):
    """{split: sorted indices of the training images that belong to it}, for "train" and the splits that are missing.

    `own` are the splits that the data set has. The test images are taken first, then the validation images from the
    rest, each by `split_seed` alone. Raises UserError if the images can't be divided.
    """
    rows, divided = np.arange(len(labels)), {}
    groups = subjects(images, options.group_by) if options.group_by else None
    for taken in ("test", "val"):
        share, flag = getattr(options, f"{taken}_split"), f"--{taken}_split"
        if taken in own or not share:
            continue
        if groups is None:
            parts = divide(labels[rows], share, options.split_seed, flag, classes)
        else:
            parts = divide_subjects(labels[rows], groups[rows], share, options.split_seed, flag)
        kept, found = (rows[part] for part in parts)
        for part, name in ((kept, "training"), (found, NAMES[taken])):
            empty = np.setdiff1d(labels, labels[part])
            if len(empty):
                advice = "a smaller" if name == NAMES["train"] else "a larger"
                raise UserError(
                    f"{flag} {share:g} leaves no {name} image of class {classes[empty[0]]!r}; give {advice} share, or "
                    "add images of this class"
                )
        rows, divided[taken] = kept, np.sort(found)
    return {"train": np.sort(rows), **divided}


def divide(labels, share, seed, flag, classes):
    """(indices of the images that stay, of the `share` that is taken), with the same share of each class.

    Raises UserError, which names the `flag`.
    """
    from sklearn.model_selection import train_test_split  # a slow import

    counts = np.bincount(labels, minlength=len(classes))
    if 1 in counts:
        name = classes[counts.tolist().index(1)]
        raise UserError(f"{flag} can't divide class {name!r}, which has one image only; add images or remove the class")
    taken = math.ceil(share * len(labels))
    if min(taken, len(labels) - taken) < np.count_nonzero(counts):
        raise UserError(
            f"{flag} {share:g} divides {len(labels)} images into {len(labels) - taken} and {taken}, fewer than the "
            f"{np.count_nonzero(counts)} classes; give a share nearer to 0.5"
        )
    return train_test_split(np.arange(len(labels)), test_size=taken, stratify=labels, random_state=seed)


def divide_subjects(labels, groups, share, seed, flag):
    """The same with about the share of each class, where all images of a group stay or are taken together."""
    from sklearn.model_selection import StratifiedGroupKFold  # a slow import

    count = len(np.unique(groups))
    if count == 1:
        raise UserError(f"{flag} can't divide the images of a single subject; check the group of --group_by")
    options = fold_numbers(share, count)
    if not options:
        raise UserError(f"{flag} {share:g} can't divide {count} subjects; give a share nearer to one half")
    divisions, problem = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds, which may be divided all the same
        for folds, taken in options:
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            try:
                parts = list(splitter.split(labels, labels, groups))[:taken]
            except ValueError as error:  # every class has fewer images than folds
                problem = error
            else:
                divisions.append(np.concatenate([part for _, part in parts]))
    if not divisions:
        raise UserError(f"{flag} {share:g} can't divide the images of {count} subjects: {problem}")
    found = min(divisions, key=lambda rows: abs(len(rows) - share * len(labels)))
    return np.setdiff1d(np.arange(len(labels)), found), found


def fold_numbers(share, count):
    """The first pairs (folds of `count` subjects, how many of them to take) that are near to the share, at most four.

    Folds of few subjects differ in size, so one pair alone may be far from it.
    """
    pairs = [(folds, round(share * folds)) for folds in range(2, min(MAX_FOLDS, count) + 1)]
    pairs = [(folds, taken) for folds, taken in pairs if 0 < taken < folds]
    near = [(folds, taken) for folds, taken in pairs if abs(taken / folds - share) <= 0.1 * share]
    return near[:4] or sorted(pairs, key=lambda pair: abs(pair[1] / pair[0] - share))[:1]


def draw_per_class(labels, count, seed):
    """Indices of `count` images drawn at random from each class, or of all where a class has fewer, class by class.

    Those of a class depend on the seed, the class and its number of images alone. The first of them are the same for
    any count.
    """
    drawn = []
    for label in np.unique(labels):
        order = np.random.default_rng([seed, label]).permutation(np.count_nonzero(labels == label))
        drawn.append(np.flatnonzero(labels == label)[order[:count]])
    return np.concatenate(drawn)


def subjects(images, regex):
    """The subject of each image file, which the regex's group in its name gives. Raises UserError."""
    if not isinstance(images, list):
        raise UserError("--group_by needs image files, whose names it reads")
    matches = [re.search(regex, os.path.basename(path)) for path in images]
    if None in matches:
        raise UserError(f"--group_by {regex!r} does not match the name of {images[matches.index(None)]}")
    return np.unique([match[1] for match in matches], return_inverse=True)[1]


def shared_subjects(splits, regex):
    """{(split, other): number of subjects that have images in both} for each two of {split: image files}.

    The splits may be the data set's own, so names without a subject are skipped.
    """
    names = {split: [re.search(regex, os.path.basename(path)) for path in images] for split, images in splits.items()}
    found = {split: {match[1] for match in matches if match} for split, matches in names.items()}
    return {(split, other): len(found[split] & found[other]) for split, other in itertools.combinations(splits, 2)}


def evaluated_split(columns):
    """The split that a run with these columns of metrics.csv has evaluated: "val" or "test"."""
    return "val" if "val_loss" in columns else "test"
