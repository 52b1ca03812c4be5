"""The training loss with weights per class, compared with PyTorch and scikit-learn, for any division of a batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from utils.errors import UserError
from utils.losses import class_weights, cross_entropy

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 0.1])


@pytest.fixture
def batch():
    """Logits (12, 4), labels (12,) and mixed targets (12, 4)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 4, generator=generator)
    labels = torch.randint(4, (12,), generator=generator)
    targets = 0.7 * F.one_hot(labels, 4) + 0.3 * F.one_hot(labels.roll(1), 4)
    return logits, labels, targets


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [1, 0, 2], [2] * 50 + [1] * 49 + [0]])
def test_balanced_weights_are_those_of_scikit_learn(labels):
    weights = class_weights("balanced", np.array(labels), ["a", "b", "c"], CPU)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert weights[labels].mean().item() == pytest.approx(1)
    assert torch.equal(class_weights("balanced", torch.tensor(labels), ["a", "b", "c"], CPU), weights)
    assert class_weights("none", labels, ["a", "b", "c"], CPU) is None


def test_a_class_without_images_has_no_balanced_weight():
    with pytest.raises(UserError, match="^--class_weights balanced: class 'b' has no training images; remove it, or "):
        class_weights("balanced", [0, 2, 2], ["a", "b", "c"], CPU)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_is_the_sum_of_pytorch_divided_by_the_number_of_images(batch, smoothing):
    logits, labels, targets = batch
    for given in (labels, targets):
        expected = F.cross_entropy(logits, given, weight=WEIGHTS, label_smoothing=smoothing, reduction="sum") / 12
        assert cross_entropy(logits, given, smoothing, WEIGHTS).item() == pytest.approx(expected.item(), rel=1e-6)
    mean = F.cross_entropy(logits, labels, weight=WEIGHTS, label_smoothing=smoothing)
    assert cross_entropy(logits, labels, smoothing, WEIGHTS).item() != pytest.approx(mean.item(), rel=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weight_multiplies_the_term_of_its_class(batch, smoothing):
    """-sum_c weight_c * target_c * log p_c in plain arithmetic; labels are targets of one class."""
    logits, labels, targets = batch
    for given, soft in ((targets, targets), (labels, F.one_hot(labels, 4))):
        soft = (1 - smoothing) * soft.double() + smoothing / 4
        terms = -WEIGHTS * soft * logits.double().log_softmax(dim=1)
        expected = terms.sum().item() / 12
        assert cross_entropy(logits, given, smoothing, WEIGHTS).item() == pytest.approx(expected, rel=1e-6)


def test_the_division_of_a_batch_does_not_change_the_weighted_loss(batch):
    logits, labels, _ = batch
    whole = cross_entropy(logits, labels, 0.1, WEIGHTS).item()
    for size in (1, 3, 6):
        pairs = zip(logits.split(size), labels.split(size), strict=True)
        parts = [cross_entropy(*pair, 0.1, WEIGHTS).item() for pair in pairs]
        assert np.mean(parts) == pytest.approx(whole, rel=1e-5)


def test_without_weights_the_loss_has_the_bits_of_pytorch(batch):
    logits, labels, targets = batch
    for given in (labels, targets):
        assert torch.equal(cross_entropy(logits, given, 0.1), F.cross_entropy(logits, given, label_smoothing=0.1))
