"""evaluate.py: accuracy on a data set, the classes of single images, and the errors for wrong flags."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, classification_report, confusion_matrix

import evaluate
from helpers import DIGITS_RUN, ROOT, call_main, fails, load_data, succeed, write_images, write_run
from inference import SavedModel
from models import build_model
from synthetic import make_checkpoint
from utils.metrics import wilson_interval

NANO = ROOT / "checkpoint" / "ViT-Nano_4-digits.npz"


@pytest.fixture
def weights(tmp_path):
    """ViT-Mini_4.npz, random, for 8x8 images of 10 classes."""
    shapes = {key: array.shape for key, array in build_model("ViT-Mini_4", 8).export_npz().items()}
    np.savez(tmp_path / "ViT-Mini_4.npz", **make_checkpoint(shapes))
    return tmp_path / "ViT-Mini_4.npz"


@pytest.fixture
def report(monkeypatch, capsys):
    """`report("--flag", ...)` runs evaluate.py --json and returns what it printed."""

    def run(*flags):
        capsys.readouterr()
        call_main(evaluate, [*flags, "--json"], monkeypatch)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def digits():
    """Images float32 (360, 3, 8, 8) in [-1, 1] and labels of scikit-learn's digits."""
    test_set = load_data("digits", "test")
    return test_set.images / 127.5 - 1, test_set.labels


@torch.no_grad()
def test_the_report_has_the_numbers_of_the_model(weights, report, digits, tmp_path):
    images, labels = digits
    found = report("--checkpoint", weights, "--dataset", "digits", "--eval_batch_size", 50)
    logits = SavedModel.load(weights).model(images)
    best = logits.argmax(dim=1)
    places = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert found["images_per_second"] > 0
    assert {name: found[name] for name in ("checkpoint", "dataset", "images", "skipped", "confusion_matrix")} == {
        "checkpoint": str(weights),
        "dataset": "digits",
        "images": 360,
        "skipped": 0,
        "confusion_matrix": str(tmp_path / "confusion_matrix.png"),
    }
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["top1_accuracy"] == pytest.approx((best == labels).float().mean().item())
    assert found["top5_accuracy"] == pytest.approx((places < 5).float().mean().item())
    per_class = {str(digit): (best == labels)[labels == digit].float().mean().item() for digit in range(10)}
    assert 0 < sum(per_class.values()) < 10
    assert found["per_class_accuracy"] == pytest.approx(per_class)
    for name in ("confusion_matrix", "reliability_diagram"):
        assert found[name] == str(tmp_path / f"{name}.png")
        with Image.open(found[name]) as image:
            assert image.width > 300


@torch.no_grad()
def test_the_report_has_the_metrics_of_scikit_learn(weights, report, digits):
    images, labels = digits
    found = report("--checkpoint", weights, "--dataset", "digits")
    logits = SavedModel.load(weights).model(images)
    best = logits.argmax(dim=1)
    expected = classification_report(labels, best, labels=range(10), output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    assert len(found["per_class"]) == 10
    for digit, row in found["per_class"].items():
        assert {name: row[name] for name in names} == pytest.approx({a: expected[digit][b] for a, b in names.items()})
        assert row["recall_interval"] == pytest.approx(wilson_interval(row["recall"], row["support"]))
    for name in ("precision", "recall", "f1"):
        assert found[f"macro_{name}"] == pytest.approx(expected["macro avg"][names[name]])
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, best))
    for count in (1, 5):
        low, high = wilson_interval(found[f"top{count}_accuracy"], 360)
        assert found[f"top{count}_accuracy_interval"] == pytest.approx([low, high])
    confidence, correct = logits.softmax(dim=1).amax(dim=1), best == labels
    bins = found["calibration_bins"]
    assert [row["count"] for row in bins] == np.histogram(confidence, bins=15, range=(0, 1))[0].tolist()
    assert sum(row["correct"] for row in bins) == correct.sum()
    gaps = [row["correct"] - row["count"] * row["mean_confidence"] for row in bins if row["count"]]
    assert found["expected_calibration_error"] == pytest.approx(sum(map(abs, gaps)) / 360)
    assert sum(gaps) == pytest.approx((correct.float() - confidence).sum().item(), rel=1e-4)
    confusion = confusion_matrix(labels, best) - np.diag(np.diag(confusion_matrix(labels, best)))
    assert [row["images"] for row in found["frequent_confusions"]] == sorted(confusion.ravel())[:-11:-1]
    for row in found["frequent_confusions"]:
        assert confusion[int(row["true_class"]), int(row["predicted_class"])] == row["images"]


def test_the_confusion_matrix_is_drawn_from_the_predictions(weights, report, digits, tmp_path, monkeypatch):
    images, labels = digits
    drawn = []
    monkeypatch.setattr(evaluate, "draw_confusion_matrix", lambda *given: drawn.append(given))
    report("--checkpoint", weights, "--dataset", "digits", "--confusion_matrix", tmp_path / "other.png")
    [(confusion, names, title, path)] = drawn
    with torch.no_grad():
        best = SavedModel.load(weights).model(images).argmax(dim=1)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for label, prediction in zip(labels.tolist(), best.tolist(), strict=True):
        expected[label, prediction] += 1
    assert torch.equal(confusion, expected)
    assert names == [str(digit) for digit in range(10)]
    assert title == f"{tmp_path.name}/ViT-Mini_4.npz on the test images of digits"
    assert path == tmp_path / "other.png"


def test_the_report_as_text(tmp_path, monkeypatch, capsys):
    path = tmp_path / "matrix.png"
    diagram = tmp_path / "diagram.png"
    flags = ["--dataset", "digits", "--confusion_matrix", path, "--reliability_diagram", diagram]
    call_main(evaluate, ["--checkpoint", NANO, *flags], monkeypatch)
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{NANO} on digits: 360 test images"
    top = r"top-1 99\.44 % \[98\.00, 99\.85\]   top-5 100\.00 % \[98\.94, 100\.00\]"
    assert re.fullmatch(top + r"   loss 0\.0448   [\d.]+ images/s", second)
    assert lines[:5] == [
        "balanced accuracy 99.44 %   macro precision 99.49 %   macro recall 99.44 %   macro F1 99.45 %",
        "expected calibration error 3.02 %",
        "accuracy (recall) of each class, lowest first:",
        "  8  97.14 % [85.47, 99.49]    precision 100.00 %  F1  98.55 %",
        "  9  97.22 % [85.83, 99.51]    precision 100.00 %  F1  98.59 %",
    ]
    assert lines[13:] == [
        "most frequent confusions, true class -> prediction:",
        "  8 -> 3  1 of 35 images",
        "  9 -> 3  1 of 36 images",
        "[low, high]: the 95 % interval of an accuracy (Wilson)",
        f"confusion matrix: {path}",
        f"reliability diagram: {diagram}",
    ]
    assert diagram.exists()


def test_of_many_classes_the_text_has_the_ten_lowest_accuracies():
    rows = {f"class {i}": dict.fromkeys(("recall", "precision", "f1"), 1 - i / 100) for i in range(22)}
    rows = {name: {**row, "support": 100 * (name != "class 21")} for name, row in rows.items()}
    lines = evaluate.class_lines(rows, "validation")
    assert lines[0] == "accuracy (recall) of the ten hardest classes, lowest first:"
    for line, number in zip(lines[1:11], range(20, 10, -1), strict=True):
        accuracy = f"{100 - number}.00 %"
        assert line.startswith(f"  class {number}  {accuracy} [")
        assert line.endswith(f"  precision  {accuracy}  F1  {accuracy}")
    assert lines[11:] == [
        "no validation images of 1 of the 22 classes: their precision, recall and F1 count as 0 in the macro means, "
        "as in scikit-learn, and not in the balanced accuracy"
    ]
    del rows["class 20"], rows["class 21"]
    assert len(evaluate.class_lines(rows, "validation")) == 21


def test_the_image_size_and_token_reduction_of_the_flags_are_used(weights, report):
    command = ("--checkpoint", weights, "--dataset", "digits")
    losses = [report(*command, *flags)["loss"] for flags in ((), ("--img_size", 16))]
    reduction = ("--token_reduction", "tome", "--keep_tokens", 1, "--reduction_layer", 1)
    losses.append(report(*command, *reduction)["loss"])
    assert len(set(losses)) == 3


def test_16_bit_weights_give_nearly_the_same_numbers(weights, report, tmp_path):
    command = ("--checkpoint", weights, "--dataset", "digits")
    loss, rounded = (report(*command, *flags)["loss"] for flags in ((), ("--bf16",)))
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    [image] = write_images(tmp_path / "images", [(8, 8)])
    [exact], [approximate] = (report("--checkpoint", weights, image, *flags) for flags in ((), ("--bf16",)))
    best, other = exact["classes"][0], approximate["classes"][0]
    assert other["class"] == best["class"]
    assert other["probability"] != best["probability"]
    assert other["probability"] == pytest.approx(best["probability"], rel=0.05)


def test_a_run_is_evaluated_on_its_own_data_without_unreadable_images(
    image_folder, tmp_path, report, monkeypatch, capsys
):
    flags = {**DIGITS_RUN, "img_size": 8, "dataset": "imagefolder", "data_dir": str(image_folder)}
    _, checkpoint = write_run(tmp_path / "run", flags, ("cat", "dog"))
    (image_folder / "val" / "dog" / "001.png").write_bytes(b"not an image")
    command = ("--checkpoint", checkpoint, "--num_workers", 0)
    found = report(*command, "--skip_broken")
    assert (found["dataset"], found["images"], found["skipped"]) == ("imagefolder", 7, 1)
    assert list(found["per_class_accuracy"]) == ["cat", "dog"]
    with pytest.raises(SystemExit):
        call_main(evaluate, command, monkeypatch)
    assert "001.png is not a readable image" in capsys.readouterr().err


def test_a_class_without_test_images_has_no_accuracy(image_folder, tmp_path, report):
    flags = {**DIGITS_RUN, "img_size": 8, "dataset": "imagefolder", "data_dir": str(image_folder)}
    _, checkpoint = write_run(tmp_path / "run", flags, ("cat", "dog"))
    shutil.rmtree(image_folder / "val" / "dog")
    found = report("--checkpoint", checkpoint, "--num_workers", 0)
    assert list(found["per_class_accuracy"]) == ["cat"]
    assert found["balanced_accuracy"] == found["top1_accuracy"] == 2 * found["macro_recall"]
    assert (found["per_class"]["dog"]["support"], found["per_class"]["dog"]["recall_interval"]) == (0, None)


def test_the_five_most_probable_classes_of_an_image(weights, report, tmp_path, monkeypatch, capsys):
    paths = write_images(tmp_path / "images", [(20, 30), (8, 8)])
    found = report("--checkpoint", weights, *paths)
    assert [item["image"] for item in found] == [str(path) for path in paths]
    images = torch.from_numpy(np.array(Image.open(paths[1]))).permute(2, 0, 1)[None]
    with torch.no_grad():
        probabilities = SavedModel.load(weights).model(images / 127.5 - 1).softmax(dim=1)[0]
    best = probabilities.topk(5)
    assert [item["class"] for item in found[1]["classes"]] == [f"class {number}" for number in best.indices]
    assert [item["probability"] for item in found[1]["classes"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    call_main(evaluate, ["--checkpoint", weights, *paths], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[6], len(lines)) == (str(paths[0]), str(paths[1]), 12)
    first = found[0]["classes"][0]
    assert lines[1] == f"  {100 * first['probability']:6.2f} %  {first['class']}"


def test_of_fewer_than_five_classes_all_are_reported(tmp_path, report):
    _, checkpoint = write_run(tmp_path / "run")
    [found] = report("--checkpoint", checkpoint, write_images(tmp_path, [(9, 9)])[0])
    assert {item["class"] for item in found["classes"]} == {"cat", "dog"}
    assert sum(item["probability"] for item in found["classes"]) == pytest.approx(1)


def test_wrong_flags_and_data_are_errors(weights, tmp_path, monkeypatch, capsys):
    _, cats = write_run(tmp_path / "cats")
    _, numbers = write_run(tmp_path / "numbers", classes=[*map(str, range(3)), "drei", *map(str, range(4, 10))])
    for flags, message in (
        (["--checkpoint", cats, "--dataset", "digits"], "best.safetensors has 2 classes (cat, dog), digits has 10"),
        (["--checkpoint", numbers, "--dataset", "digits"], "it has 'drei' where digits has '3'"),
        (
            ["--checkpoint", weights, "--dataset", "digits", "--confusion_matrix", "no/x.png"],
            "no/x.png can't be written",
        ),
        (
            ["--checkpoint", weights, "--dataset", "digits", "--reliability_diagram", "x.pdf"],
            "--reliability_diagram x.pdf can't be written; give a .png file",
        ),
        (["--checkpoint", weights, "nothing.png"], "nothing.png does not exist"),
        (["--checkpoint", weights, "--dataset", "digit"], "unknown dataset 'digit'; did you mean digits?"),
    ):
        assert message in fails(evaluate, flags, monkeypatch, capsys)


@pytest.mark.slow
def test_evaluate_from_the_shell_by_two_processes(tmp_path, monkeypatch, report):
    shutil.copy(NANO, tmp_path)
    command = ("--checkpoint", tmp_path / NANO.name, "--dataset", "digits")
    printed = succeed("evaluate.py", *command, "--json", processes=2)
    alone = report(*command)
    found = json.loads(printed)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["expected_calibration_error"] == pytest.approx(alone["expected_calibration_error"], rel=1e-4)
    for name in ("per_class_accuracy", "per_class", "frequent_confusions", "macro_f1", "top1_accuracy_interval"):
        assert found[name] == alone[name]
