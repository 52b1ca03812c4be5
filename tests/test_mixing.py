"""Mixup and CutMix: closed forms of images and targets, and the same pairs for any division of the batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import train
from helpers import call_main, differences, fails, metrics, plain_loop, succeed, train_run
from utils.data.mixing import make_mixing, mix_pairs

CLASSES = 20
PARTNER = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]


def a_batch():
    """Images (12, 3, 10, 14) and labels (12,), no two alike."""
    images = torch.rand(12, 3, 10, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))[:12]


def mix(kinds, images, labels, step, seed=7):
    return mix_pairs(make_mixing(**{"mixup": 0, "cutmix": 0, **kinds}), images, labels, CLASSES, seed, step)


def shares_of(targets, labels):
    """(share of the image's own label, of its partner's) in each target; no other label may have one."""
    rows = torch.arange(len(labels))
    own, others = targets[rows, labels], targets[rows, labels[PARTNER]]
    torch.testing.assert_close(own + others, torch.ones(len(labels)))
    assert (targets > 0).sum() <= 2 * len(labels)
    return own, others


@pytest.mark.parametrize("step", range(5))
def test_mixup_is_the_weighted_mean_of_two_neighbours(step):
    images, labels = a_batch()
    mixed, targets = mix({"mixup": 0.8}, images, labels, step)
    own, _ = shares_of(targets, labels)
    assert own.unique().numel() == 1
    share = own[0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[PARTNER])
    assert (mixed.dtype, targets.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("step", range(5))
def test_cutmix_pastes_one_box_of_the_neighbour(step):
    images, labels = a_batch()
    mixed, targets = mix({"cutmix": 1.0}, images, labels, step)
    pasted = mixed != images
    assert (pasted == pasted[:1, :1]).all()  # the same box in all images and channels
    box = pasted[0, 0]
    rows, columns = box.any(dim=1), box.any(dim=0)
    assert torch.equal(box, rows[:, None] & columns)
    for line in (rows, columns):
        assert (line.int().diff() == 1).sum() <= 1  # no gap
    assert torch.equal(mixed, torch.where(box, images[PARTNER], images))
    own, others = shares_of(targets, labels)
    torch.testing.assert_close(others, torch.full_like(own, box.sum().item() / box.numel()))


def test_shares_have_the_beta_distribution_and_both_kinds_are_equally_frequent():
    images, labels = a_batch()
    images, labels = images[:2], labels[:2]
    shares, pasted = [], []
    for step in range(2000):
        mixed, targets = mix({"mixup": 0.4}, images, labels, step)
        shares.append(targets[0, labels[0]].item())
        mixed, _ = mix({"mixup": 0.4, "cutmix": 1.0}, images, labels, step)
        pasted.append(((mixed == images) | (mixed == images[[1, 0]])).all().item())
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert np.mean(pasted) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("kinds", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_micro_batches_are_mixed_as_the_whole_batch(kinds):
    """Exactly. The random numbers depend on seed and step alone, and the global generator is not changed."""
    images, labels = a_batch()
    whole, targets = mix(kinds, images, labels, 3)
    for size in (2, 4, 6):
        torch.manual_seed(size)
        before = torch.get_rng_state()
        pairs = zip(images.split(size), labels.split(size), strict=True)
        parts, part_targets = zip(*(mix(kinds, *pair, 3) for pair in pairs), strict=True)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.cat(part_targets), targets)
    for other in (mix(kinds, images, labels, 4), mix(kinds, images, labels, 3, seed=8)):
        assert not torch.equal(other[0], whole)


def test_images_in_channels_last_are_mixed_in_the_same_way():
    images, labels = a_batch()
    for count in (2, 12):
        plain, _ = mix({"cutmix": 1.0}, images[:count], labels[:count], 0)
        other, _ = mix({"cutmix": 1.0}, images[:count].to(memory_format=torch.channels_last), labels[:count], 0)
        assert torch.equal(plain, other)


def test_the_loss_is_the_cross_entropy_with_smoothed_shares():
    """PyTorch's loss, as the training uses it: sum of -q log p with q = (1 - s) target + s / classes."""
    images, labels = a_batch()
    _, targets = mix({"mixup": 0.8}, images, labels, 0)
    logits = torch.randn(12, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    smoothed = 0.9 * targets.double() + 0.1 / CLASSES
    expected = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, targets.double(), label_smoothing=0.1), expected)


BOTH = ["--mixup", 0.8, "--cutmix", 1.0, "--label_smoothing", 0.1]


def test_training_uses_mixed_images_and_counts_predictions_of_the_larger_share(tiny_flags, monkeypatch):
    weights, rows = train_run(tiny_flags(*BOTH, "--learning_rate", 0.1), monkeypatch)
    mixing = make_mixing(0.8, 1.0)
    expected, losses, correct, _ = plain_loop(
        12, 16, lambda images, labels, step: mix_pairs(mixing, images, labels, 10, 42, step)
    )
    assert max(differences(weights, expected).values()) < 1e-6
    assert [row["train_loss"] for row in rows] == pytest.approx([np.mean(losses[:6]), np.mean(losses[6:])], rel=1e-5)
    assert [96 * row["train_accuracy"] for row in rows] == pytest.approx([sum(correct[:6]), sum(correct[6:])])


@pytest.mark.slow
def test_two_processes_with_accumulation_mix_as_one(tiny_flags, monkeypatch):
    flags = [*BOTH, "--learning_rate", 0.1]
    one = tiny_flags(*flags, "--name", "one")
    two = tiny_flags(*flags, "--name", "two", "--gradient_accumulation_steps", 2)
    plain = tiny_flags("--learning_rate", 0.1, "--label_smoothing", 0.1, "--name", "plain")
    call_main(train, one, monkeypatch)
    succeed("train.py", *two, processes=2)
    call_main(train, plain, monkeypatch)
    losses, others, unmixed = ([float(row["train_loss"]) for row in metrics(flags)] for flags in (one, two, plain))
    assert others == pytest.approx(losses, rel=1e-5)
    assert unmixed != pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("flag", ["--mixup", "--cutmix"])
def test_an_odd_number_of_images_per_process_is_an_error(flag, tiny_flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = tiny_flags(flag, 0.5, "--train_batch_size", 20, "--gradient_accumulation_steps", 2)
    message = fails(train, flags, monkeypatch, capsys)
    assert f"{flag} mixes pairs, so --train_batch_size 20 must give an even number to each of 2 processes" in message
    assert message.endswith("; 24 would\n")
