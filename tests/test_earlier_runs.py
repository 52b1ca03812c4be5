"""A run that an earlier version of the code has made is still loaded, evaluated and drawn.

`fixtures/earlier_run/run` is a run of ViT-Nano_4, with its fields as in SMALL, on 8x8 digits: 8 steps planned, stopped
after step 5, evaluated at step 4. best.safetensors has the weights of step 4.
"""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import models
import train
import visualize
from helpers import call_main, write_images
from inference import SavedModel
from models.configs import VITS
from utils.records.run_folder import read_metrics

EARLIER_RUN = Path(__file__).parent / "fixtures" / "earlier_run" / "run"
FINISHED = EARLIER_RUN.parent / "finished.safetensors"  # the last weights after the earlier code resumed the run
SMALL = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}


@pytest.fixture
def earlier_run(tmp_path, monkeypatch):
    """A copy of the run's folder, with ViT-Nano_4 as small as when the run was made."""
    config = VITS["ViT-Nano_4"].copy_and_resolve_references()
    config.update(SMALL)
    monkeypatch.setitem(models.VITS, "ViT-Nano_4", config)
    return shutil.copytree(EARLIER_RUN, tmp_path / "run")


def test_an_earlier_run_is_loaded(earlier_run):
    saved = SavedModel.load(earlier_run / "best.safetensors")
    assert (saved.img_size, saved.mean_std) == (8, "half")
    assert saved.classes == [str(digit) for digit in range(10)]
    assert saved.flags["model_type"] == "ViT-Nano_4"
    stored, loaded = load_file(earlier_run / "best.safetensors"), saved.model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_an_earlier_run_is_evaluated_with_the_numbers_of_its_metrics(earlier_run, monkeypatch, capsys):
    call_main(evaluate, ["--checkpoint", earlier_run / "best.safetensors", "--json"], monkeypatch)
    report = json.loads(capsys.readouterr().out)
    assert (report["dataset"], report["images"]) == ("digits", 360)
    assert report["top1_accuracy"] == pytest.approx(0.16666667)
    assert report["top5_accuracy"] == pytest.approx(0.50833333)
    assert report["loss"] == pytest.approx(2.2974769, rel=1e-5)


def test_the_curves_and_the_attention_of_an_earlier_run_are_drawn(earlier_run, tmp_path, monkeypatch):
    [image] = write_images(tmp_path / "images", [(8, 8)])
    flags = ["--checkpoint", earlier_run / "best.safetensors", "--image", image, "--curves", earlier_run]
    call_main(visualize, flags, monkeypatch)
    kinds = ("blocks", "class", "heads", "matrix", "rollout")
    together = {"curves.png", "distance.png", "filters.png", "positions.png"}
    drawn = {path.name for path in (earlier_run / "pictures").iterdir()}
    assert drawn == together | {f"images-000-{kind}.png" for kind in kinds}


def test_an_earlier_run_is_resumed_and_ends_as_its_own_code_ended_it(earlier_run, monkeypatch, capsys):
    """It was stopped between two evaluations, so sums of metrics, momenta and the weights' average are continued."""
    flags = json.loads((earlier_run / "config.json").read_text())["flags"]
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value]
    given = [text for text in given if not text.startswith(("--output_dir", "--wandb_project"))]
    call_main(train, [*given, "--output_dir", earlier_run.parent, "--resume"], monkeypatch)
    assert "resuming at step 5 of 8" in capsys.readouterr().out
    weights, expected = (without_key_biases(load_file(path)) for path in (earlier_run / "last.safetensors", FINISHED))
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    metrics, expected = read_metrics(earlier_run), read_csv(FINISHED.with_suffix(".csv"))
    for name in ("step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_top5_accuracy", "lr"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert math.isnan(metrics["grad_norm"][0])  # which the earlier version did not measure
    assert metrics["grad_norm"][1] > 0


def without_key_biases(weights):
    """The weights without the biases of the keys, which no logit depends on.

    Their gradients are rounding errors, which differ between processors and which AdamW scales to its step size.
    """
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        query, _, value = weights.pop(name).chunk(3)
        weights |= {f"{name}/query": query, f"{name}/value": value}
    return weights


def test_an_earlier_run_can_not_be_resumed_with_a_part_of_its_weights(earlier_run, monkeypatch, capsys):
    """Earlier versions trained all weights, and recorded no --train."""
    model = ["--model_type", "ViT-Nano_4", "--dataset", "digits", "--img_size", 8, "--train_batch_size", 16]
    place = ["--name", "run", "--output_dir", earlier_run.parent, "--resume", "--optimizer", "adamw"]
    with pytest.raises(SystemExit) as stopped:
        call_main(train, [*model, *place, "--train", "head"], monkeypatch)
    assert stopped.value.code == 2
    assert "was started with --train all, so it can't be resumed with head\n" in capsys.readouterr().err


def test_an_earlier_run_compared_accuracies_and_is_not_resumed_with_another_metric(earlier_run, monkeypatch, capsys):
    flags = json.loads((earlier_run / "config.json").read_text())["flags"]
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value]
    given += ["--output_dir", earlier_run.parent, "--resume", "--best_metric", "macro_f1"]
    with pytest.raises(SystemExit) as stopped:
        call_main(train, given, monkeypatch)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "warning: resuming with --best_metric macro_f1; the run was started with accuracy" in printed.out
    assert "was started with --best_metric accuracy, so it can't be resumed with macro_f1" in printed.err


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
