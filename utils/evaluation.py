"""Loss and accuracy on a test set, each image counted exactly once over all processes."""

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.distributed import sum_over_processes
from utils.errors import UserError


@torch.no_grad()
def evaluate(model, test_set, img_size, batch_size, precision, world, per_class=False):
    """{"loss", "accuracy", "top5_accuracy"} as fractions, and with `per_class` the "confusion" counts.

    `confusion` is an int64 tensor (classes, classes): rows are the true class, columns the prediction. Raises UserError
    where all pictures are broken.
    """
    was_training = model.training
    model.eval()
    num_classes = len(test_set.classes)
    count = 0
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, top-1 hits, top-5 hits
    confusion = torch.zeros(num_classes**2 if per_class else 0, dtype=torch.int64, device=world.device)
    share = len(range(world.rank, len(test_set), world.size))
    bar = tqdm(total=share, desc="test", unit="img", leave=False, disable=world.rank > 0 or not sys.stderr.isatty())
    with bar:
        for images, labels in test_set.eval_batches(img_size, batch_size, world):
            with precision.autocast():
                logits = model(precision.inputs(images)).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            count += len(labels)
            if per_class:
                cells = labels * num_classes + logits.argmax(1)
                confusion += torch.bincount(cells, minlength=num_classes**2)
            bar.update(len(labels))
    model.train(was_training)
    totals = torch.cat([totals, totals.new_tensor([count])])
    loss, top1, top5, count = sum_over_processes(totals).tolist()
    if not count:
        raise UserError(f"none of the {len(test_set)} test pictures can be read")
    result = {"loss": loss / count, "accuracy": top1 / count, "top5_accuracy": top5 / count}
    if per_class:
        result["confusion"] = sum_over_processes(confusion).view(num_classes, num_classes).cpu()
    return result
