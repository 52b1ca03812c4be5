"""evaluate.py: accuracy on a data set, the classes of single images, and the errors for wrong flags."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from helpers import DIGITS_RUN, ROOT, call_main, fails, load_data, succeed, write_images, write_run
from inference import SavedModel
from models import build_model
from synthetic import make_checkpoint

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
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        assert image.width > 300


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
    assert title == f"{tmp_path.name}/ViT-Mini_4.npz on digits"
    assert path == tmp_path / "other.png"


def test_the_report_as_text(tmp_path, monkeypatch, capsys):
    path = tmp_path / "matrix.png"
    call_main(evaluate, ["--checkpoint", NANO, "--dataset", "digits", "--confusion_matrix", path], monkeypatch)
    first, second, third, *classes, last = capsys.readouterr().out.splitlines()
    assert first == f"{NANO} on digits: 360 test images"
    assert re.fullmatch(r"top-1 99\.44 %   top-5 100\.00 %   loss 0\.0448   [\d.]+ images/s", second)
    assert third == "accuracy of each class, lowest first:"
    assert classes[:2] == ["  8   97.14 %", "  9   97.22 %"]
    assert len(classes) == 10
    assert last == f"confusion matrix: {path}"


def test_of_many_classes_the_text_has_the_ten_lowest_accuracies():
    accuracies = {f"class {number}": 1 - number / 100 for number in range(21)}
    numbers = {"loss": 1.0, "top1_accuracy": 0.9, "top5_accuracy": 1.0, "images_per_second": 5.0}
    names = {"checkpoint": "a.npz", "dataset": "birds", "confusion_matrix": "c.png", "per_class_accuracy": accuracies}
    lines = evaluate.evaluation_text({**names, **numbers, "images": 21, "skipped": 3}).splitlines()
    assert lines[0] == "a.npz on birds: 21 test images, 3 more could not be read"
    assert lines[2] == "accuracy of the ten hardest classes, lowest first:"
    assert lines[3:-1] == [f"  class {number}   {100 - number}.00 %" for number in range(20, 10, -1)]


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
        (["--checkpoint", cats, "--dataset", "digits"], "best.safetensors has 2 classes, digits has 10"),
        (["--checkpoint", numbers, "--dataset", "digits"], "it has 'drei' where digits has '3'"),
        (
            ["--checkpoint", weights, "--dataset", "digits", "--confusion_matrix", "no/x.png"],
            "no/x.png can't be written",
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
    assert found["per_class_accuracy"] == alone["per_class_accuracy"]
