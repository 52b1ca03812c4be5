"""Evaluation by --mode eval of the training scripts: the right weights, the right numbers, and nothing written."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import command_line
import train
import train_flops
import train_resnet
from helpers import call_main, fails, load_data, metrics, random_model, read_config, run_dir, succeed
from models import build_model
from synthetic import make_checkpoint
from utils.data.augmentation import normalise, resized_crops
from utils.evaluation import evaluate
from utils.metrics import mean_metrics, percent
from utils.parallel.precision import Precision
from utils.parallel.processes import Processes, one_process

CPU = torch.device("cpu")


def numbers_of(printed):
    """The lines of the printed block: {"weights": text, "top-1": number, ...}."""
    found = dict(re.findall(r"^  ([a-z\d-]+) +(.*)$", printed, flags=re.MULTILINE))
    assert list(found) == ["weights", "top-1", "top-5", "loss", "speed"]
    return {name: text if name == "weights" else float(text.split()[0]) for name, text in found.items()}


@torch.no_grad()
def measured(model):
    """Top-1 and top-5 in percent and the loss on the digits at 8x8, in one batch."""
    data = load_data("digits", "test")
    boxes = torch.tensor([[0, 0, 8, 8]]).expand(len(data), -1)
    logits = model.eval()(normalise(resized_crops(data.images, boxes, (8, 8))))
    places = (logits > logits.gather(1, data.labels[:, None])).sum(dim=1)  # classes with a higher logit than the true
    top1, top5 = (100 * (places < count).float().mean().item() for count in (1, 5))
    return {"top-1": top1, "top-5": top5, "loss": F.cross_entropy(logits, data.labels).item()}


def file_contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_prints(printed, expected):
    found = numbers_of(printed)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=6e-3)


def test_mode_eval_tests_the_best_weights_of_the_run(tiny_flags, monkeypatch, capsys):
    """With the flags of training; those that concern training only change nothing."""
    flags = tiny_flags("--learning_rate", 0.1, "--num_steps", 30, "--dropout_rate", 0.1)
    call_main(train, flags, monkeypatch)
    folder = run_dir(flags)
    before = file_contents(folder)
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_state_dict(load_file(folder / "best.safetensors"))
    expected = measured(model)
    best = max(metrics(flags), key=lambda row: float(row["test_accuracy"]))
    assert expected["top-1"] == pytest.approx(100 * float(best["test_accuracy"]), abs=1e-3)
    assert expected["top-5"] == pytest.approx(100 * float(best["test_top5_accuracy"]), abs=1e-3)
    capsys.readouterr()
    others = (["--overwrite"], ["--resume"], ["--train_batch_size", 15, "--gradient_accumulation_steps", 2])
    for further in ([], *others, ["--pretrained_dir", "nowhere.npz"], ["--bf16", "--fp16_opt_level", "O0"]):
        call_main(train, [*flags, *further, "--mode", "eval"], monkeypatch)
        printed = capsys.readouterr().out
        assert printed.startswith("ViT-Mini_4 on digits: 360 test images, 10 classes, at 8x8, cpu\n")
        assert numbers_of(printed)["weights"] == f"{folder / 'best.safetensors'}, of step {best['step']}"
        assert_prints(printed, expected)
    assert file_contents(folder) == before


@torch.no_grad()
def test_processes_share_the_test_images_and_count_each_once():
    """360 images in batches of 7: the numbers of 3 processes, one after the other, add up to those of one."""
    model = random_model("ViT-Mini_4", 8)
    test_set = load_data("digits", "test")

    def evaluated(processes):
        precision = Precision("O0", torch.float32, CPU)
        return evaluate(model, test_set, (8, 8), 7, precision, processes, per_class=True)

    parts = [evaluated(Processes(rank, 3, rank, CPU)) for rank in range(3)]
    whole = evaluated(one_process())
    assert [part["images"] for part in parts] == [120, 120, 120]
    assert whole["images"] == 360
    for name in ("loss", "accuracy", "top5_accuracy"):
        assert sum(part[name] for part in parts) / 3 == pytest.approx(whole[name], rel=1e-5)
    assert torch.equal(sum(part["confusion"] for part in parts), whole["confusion"])
    torch.testing.assert_close(sum(part["calibration"] for part in parts), whole["calibration"])
    assert whole["confusion"].diagonal().sum() == whole["calibration"][:, 1].sum() == round(360 * whole["accuracy"])
    assert mean_metrics(whole["confusion"]).items() <= whole.items()
    expected = measured(model)
    found = {"top-1": 100 * whole["accuracy"], "top-5": 100 * whole["top5_accuracy"], "loss": whole["loss"]}
    assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_prediction_is_the_same_in_the_accuracy_and_in_the_confusion_matrix():
    """Also where two classes have the same logit, as happens in 16 bits."""
    test_set = load_data("digits", "test")
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(10, 3 * 64, generator=generator)

    class Ties(torch.nn.Module):
        def forward(self, images):
            return (images.flatten(1) @ columns.T / 20).round()

    result = evaluate(Ties(), test_set, (8, 8), 50, Precision("O0", torch.float32, CPU), one_process(), per_class=True)
    assert result["confusion"].sum() == 360
    assert result["confusion"].diagonal().sum() == round(360 * result["accuracy"])


@pytest.mark.slow
def test_mode_eval_of_three_processes_prints_the_numbers_of_one(tiny_flags, monkeypatch):
    flags = tiny_flags("--num_steps", 6)
    call_main(train, flags, monkeypatch)
    before = file_contents(run_dir(flags))
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_state_dict(load_file(run_dir(flags) / "best.safetensors"))
    printed = succeed("train.py", *flags, "--eval_batch_size", 7, "--mode", "eval", processes=3)
    assert printed.startswith("ViT-Mini_4 on digits: 360 test images, 10 classes, at 8x8, 3 processes on cpu\n")
    assert_prints(printed, measured(model))
    assert file_contents(run_dir(flags)) == before


def test_mode_eval_tests_pretrained_weights_with_their_head(tiny_flags, monkeypatch, capsys, tmp_path):
    weights = {}
    for classes in (10, 21):
        shapes = build_model("ViT-Mini_4", 8, classes).export_npz().items()
        weights[classes] = tmp_path / f"{classes}.npz"
        np.savez(weights[classes], **make_checkpoint({key: array.shape for key, array in shapes}))
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_from(np.load(weights[10]), head="keep")
    expected = measured(model)
    assert 0 < expected["top-1"] < expected["top-5"] < 100
    call_main(train, tiny_flags("--mode", "eval", "--pretrained_dir", weights[10]), monkeypatch)
    printed = capsys.readouterr().out
    assert numbers_of(printed)["weights"] == str(weights[10])
    assert_prints(printed, expected)
    interval = percent(round(3.6 * expected["top-1"]) / 360, 360)
    assert f"  top-1    {interval} (95 % interval)\n" in printed
    message = fails(train, tiny_flags("--mode", "eval", "--pretrained_dir", weights[21]), monkeypatch, capsys)
    assert "21.npz does not fit ViT-Mini_4: head/" in message
    assert "the checkpoint has 21 classes, the model 10" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("module", [train_resnet, train_flops])
def test_mode_eval_of_the_scripts_of_the_cnns_prints_the_metrics_of_the_run(module, tiny_flags, monkeypatch, capsys):
    """With a small CNN instead of theirs."""
    monkeypatch.setattr(
        command_line,
        "build_model",
        lambda model_type, img_size, num_classes: build_model("ResNet-Mini_Flops", img_size, num_classes),
    )
    flags = tiny_flags("--num_steps", 2, "--eval_every", 2)
    at = flags.index("--model_type")
    flags = flags[:at] + flags[at + 2 :]
    assert "run/best.safetensors does not exist" in fails(module, [*flags, "--mode", "eval"], monkeypatch, capsys)
    call_main(module, flags, monkeypatch)
    capsys.readouterr()
    call_main(module, [*flags, "--mode", "eval"], monkeypatch)
    row = metrics(flags)[-1]
    expected = {"top-1": 100 * float(row["test_accuracy"]), "loss": float(row["test_loss"])}
    assert_prints(capsys.readouterr().out, expected)


def test_mode_eval_names_what_is_missing_or_does_not_fit(tiny_flags, monkeypatch, capsys, tmp_path):
    flags = tiny_flags("--mode", "eval")
    message = fails(train, flags, monkeypatch, capsys)
    assert f"--mode eval: {run_dir(flags) / 'best.safetensors'} does not exist and no --pretrained_dir" in message
    assert "nowhere.npz does not exist" in fails(
        train, [*flags, "--pretrained_dir", "nowhere.npz"], monkeypatch, capsys
    )
    assert not (tmp_path / "output").exists()
    assert "unknown mode 'test'; did you mean train, eval" in fails(
        train, [*flags, "--mode", "test"], monkeypatch, capsys
    )
    call_main(train, tiny_flags("--num_steps", 2), monkeypatch)
    capsys.readouterr()
    message = fails(train, [*flags, "--model_type", "ViT-Ti_16", "--img_size", 16], monkeypatch, capsys)
    assert "best.safetensors does not fit the model: " in message
    path = run_dir(flags) / "config.json"
    assert read_config(run_dir(flags))["classes"][3] == "3"
    path.write_text(path.read_text().replace('"3",', '"drei",'))
    message = fails(train, flags, monkeypatch, capsys)
    assert "best.safetensors was trained on other classes: it has 'drei' where digits has '3'" in message


def test_mode_eval_takes_the_model_and_the_normalisation_that_the_run_has_recorded(tiny_flags, run_main):
    flags = tiny_flags("--num_steps", 2)
    own = ("--mean_std", "imagenet", "--model_fields", "num_layers=2", "--token_reduction", "tome", "--tome_r", 1)
    run_main(train, *flags, *own)

    def measured(*further):
        return re.search(r"loss .*", run_main(train, *flags, "--mode", "eval", *further))[0]

    assert measured() == measured(*own)
    assert measured("--mean_std", "half") != measured()
    assert measured("--token_reduction", "none") != ""  # the recorded --tome_r does not count then
