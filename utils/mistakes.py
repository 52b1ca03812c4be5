"""The most confident wrong predictions of an evaluation: found over all processes, counted and drawn."""

from pathlib import Path
from typing import NamedTuple

import torch

from utils.features import readable_rows
from utils.parallel.processes import sum_over_processes

DECIMALS = 4  # of a confidence: rounding errors, which depend on the batch size, must not change the order


class Mistake(NamedTuple):
    """A wrong prediction."""

    index: int  # of the image in its data set
    path: str | None  # of the image file; None for an image that is not a file
    true_class: str
    predicted_class: str
    confidence: float  # the probability of the prediction, rounded to DECIMALS


def find_mistakes(result, data_set, names, processes, count):
    """The `count` Mistakes with the highest confidence, the highest first, the same in all processes.

    Of equal confidences the earlier image is first. `result` is that of `evaluate` with `per_class` on the data set,
    `names` are those of the classes.
    """
    rows = torch.as_tensor(readable_rows(data_set))
    own = rows[rows % processes.size == processes.rank]
    predictions, confidences = torch.zeros(len(data_set), dtype=torch.int64), torch.zeros(len(data_set))
    predictions[own], confidences[own] = result["predictions"], result["confidences"]
    predictions = sum_over_processes(predictions)
    confidences = sum_over_processes(confidences).double().round(decimals=DECIMALS)
    labels = torch.as_tensor(data_set.labels).cpu()
    wrong = rows[predictions[rows] != labels[rows]]
    order = wrong[confidences[wrong].argsort(descending=True, stable=True)[:count]]
    return [
        Mistake(
            index,
            data_set.path_of(index),
            names[labels[index]],
            names[predictions[index]],
            confidences[index].item(),
        )
        for index in order.tolist()
    ]


def count_mistakes(shown, accuracy, images):
    """How many of the wrong predictions are `shown`, as text; the accuracy of `images` images is a fraction."""
    wrong = round((1 - accuracy) * images)
    if not wrong:
        return f"no wrong prediction for {images} images"
    predictions = f"wrong prediction{'s' if wrong > 1 else ''} for {images} images"
    return f"all {wrong} {predictions}" if shown == wrong else f"the {shown} most confident of {wrong} {predictions}"


def draw_mistakes(mistakes, data_set, title, path):
    """Draw the images of the Mistakes, which are read one by one. Raises UserError."""
    from utils.curves import plot_mistakes  # matplotlib is a slow import, which single images do not need
    from utils.figures import downscale, save

    images = [downscale(data_set.whole_image(mistake.index)) for mistake in mistakes]
    captions = [
        (true, predicted, confidence, Path(file).name if file else f"image {index}")
        for index, file, true, predicted, confidence in mistakes
    ]
    save(plot_mistakes(images, captions, title), path)
