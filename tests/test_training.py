"""The training loop: against a plain loop, divided batches, resumption to the bit, precision, faults."""

import csv
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import models
import train
from helpers import call_main, fails, load_data, read_config, write_pictures
from models import build_model
from utils.data.augmentation import normalise, random_crops, resized_crops
from utils.data.datasets import DATASETS, DataSource, Split
from utils.data.stream import samples_at
from utils.errors import UserError
from utils.parallel.memory import recompute_activations
from utils.parallel.precision import Precision
from utils.parallel.processes import one_process
from utils.profiling import activation_bytes
from utils.records.meter import Meter
from utils.records.run_folder import read_metrics
from utils.train_state import compile_in_place
from utils.training import train_step


def run(flags, monkeypatch, name="run"):
    """Train in this process; returns (weights of the last checkpoint, rows of metrics.csv)."""
    call_main(train, flags, monkeypatch)
    folder = Path(flags[flags.index("--output_dir") + 1]) / name
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return load_file(folder / "last.safetensors"), rows


def differences(weights, others):
    assert weights.keys() == others.keys()
    return {name: (weights[name] - others[name]).abs().max().item() for name in weights}


def plain_loop(
    steps, batch, mix=lambda images, labels, step: (images, F.one_hot(labels, 10).float()), max_grad_norm=1.0
):
    """The same run in ordinary PyTorch: momentum SGD, clipping at 1, warm-up of 3 steps, then cosine.

    Returns (weights, losses, correct predictions and gradient norms of the steps).
    """
    torch.manual_seed(42)
    model = build_model("ViT-Mini_4", img_size=8).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = load_data("digits", "train")
    losses, correct, norms = [], [], []
    for step in range(steps):
        progress = (step - 3) / (steps - 3)
        optimizer.param_groups[0]["lr"] = 0.1 * (step / 3 if step < 3 else (1 + math.cos(math.pi * progress)) / 2)
        epochs, indices = samples_at(42, np.arange(step * batch, (step + 1) * batch), len(data))
        boxes, _ = random_crops(42, epochs, indices, len(data), 8, 8, 0.05)
        images = normalise(resized_crops(data.images[indices], boxes, (8, 8)))
        images, targets = mix(images, data.labels[indices], step)
        logits = model(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item())
        optimizer.step()
        losses.append(loss.item())
        correct.append((logits.argmax(dim=1) == targets.argmax(dim=1)).sum().item())
    return model.state_dict(), losses, correct, norms


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.5, 0.0])
def test_the_loop_does_what_a_plain_loop_does(max_grad_norm, tiny_flags, monkeypatch):
    flags = tiny_flags("--learning_rate", 0.1, "--label_smoothing", 0.1, "--max_grad_norm", max_grad_norm)
    weights, rows = run(flags, monkeypatch)
    expected, losses, correct, norms = plain_loop(12, 16, max_grad_norm=max_grad_norm)
    assert max(differences(weights, expected).values()) < 1e-6
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[0]["train_loss"] == pytest.approx(np.mean(losses[:6]), rel=1e-5)
    assert rows[1]["train_loss"] == pytest.approx(np.mean(losses[6:]), rel=1e-5)
    assert [96 * row["train_accuracy"] for row in rows] == pytest.approx([sum(correct[:6]), sum(correct[6:])])
    assert [row["grad_norm"] for row in rows] == pytest.approx([np.mean(norms[:6]), np.mean(norms[6:])], rel=1e-4)
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * (1 + math.cos(math.pi / 3)) / 2, 0.0])
    assert max(differences(weights, initial()).values()) > 0.01


def initial():
    torch.manual_seed(42)
    return build_model("ViT-Mini_4", img_size=8).state_dict()


def test_accumulation_equals_the_undivided_batch_with_dropout(tiny_flags, monkeypatch):
    flags = ["--dropout_rate", 0.2, "--learning_rate", 0.1]
    whole, rows = run(tiny_flags(*flags), monkeypatch)
    parts, part_rows = run(tiny_flags(*flags, "--gradient_accumulation_steps", 4, "--overwrite"), monkeypatch)
    assert max(differences(whole, parts).values()) < 2e-6
    assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in part_rows], rel=1e-5)


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--bf16", "--fp16_opt_level", "O3"]], ids=["O0", "O2", "O3"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer, precision, tiny_flags, monkeypatch):
    flags = ["--optimizer", optimizer, "--dropout_rate", 0.1, *precision]
    whole, rows = run(tiny_flags(*flags), monkeypatch)
    stop_after(4, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(tiny_flags(*flags, "--name", "broken"), monkeypatch)
    assert stopped.value.code == 128 + 15
    resumed, resumed_rows = run(tiny_flags(*flags, "--name", "broken", "--resume"), monkeypatch, "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timing = ("images_per_second", "seconds")
    for row, other in zip(rows, resumed_rows, strict=True):
        assert [row[key] for key in row if key not in timing] == [other[key] for key in row if key not in timing]


@pytest.mark.parametrize("norm_type", ["LN", "BN"])
@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "Conformer-Mini_4", "ResNet-Mini_Flops"])
def test_recomputed_activations_give_the_same_bits(model_type, norm_type, tiny_flags, monkeypatch):
    """And the running statistics of BN count each batch once."""
    flags = ["--model_type", model_type, "--img_size", 16, "--num_steps", 4, "--eval_every", 4]
    if not model_type.startswith("ResNet"):
        flags += ["--norm_type", norm_type, "--dropout_rate", 0.1, "--drop_path_rate", 0.2]
    elif norm_type == "BN":
        pytest.skip("a ResNet has one norm")
    plain, _ = run(tiny_flags(*flags), monkeypatch)
    recomputed, _ = run(tiny_flags(*flags, "--grad_checkpointing", "--overwrite"), monkeypatch)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "R26-ViT-Mini_4", "ResNet-Mini_Flops"])
def test_recomputed_activations_are_not_kept(model_type):
    model, images = build_model(model_type, 32), torch.randn(2, 3, 32, 32)
    kept = []
    for _ in range(2):
        kept.append(activation_bytes(model, lambda: model(images).sum().backward()))
        recompute_activations(model)
    assert kept[1] < kept[0] / 2


def test_recomputed_blocks_are_compiled():
    """One graph for the patch embedding, one for all blocks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, images = build_model("ViT-Mini_4", 8, num_layers=3), torch.randn(2, 3, 8, 8)
    torch.nn.init.normal_(model.head.weight)
    gradients = []
    for compiled in (False, True):
        if compiled:
            recompute_activations(model, compiled)
            compile_in_place(model)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def stop_after(step, monkeypatch):
    """As if SIGTERM came while that step ran."""
    from utils.parallel.processes import StopSignal

    calls = []

    def agreed(self):
        calls.append(None)
        return 15 if len(calls) == step else 0

    monkeypatch.setattr(StopSignal, "agreed", agreed)


def test_resuming_without_a_checkpoint_starts_the_run(tiny_flags, monkeypatch):
    run(tiny_flags("--resume"), monkeypatch)


def test_resuming_with_other_flags_is_said(tiny_flags, monkeypatch, capsys):
    run(tiny_flags(), monkeypatch)
    run(tiny_flags("--resume", "--num_steps", 18), monkeypatch)
    assert "warning: resuming with --num_steps 18; the run was started with 12" in capsys.readouterr().out


def test_records_of_a_run(tiny_flags, monkeypatch, tmp_path, capsys):
    _, rows = run(tiny_flags("--num_steps", 13), monkeypatch)
    folder = tmp_path / "output" / "run"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert names == {"last", "best", "state-13", "metrics", "config", "curves", "events"}
    assert list(rows[0]) == [
        *("step", "train_loss", "train_accuracy", "grad_norm", "test_loss", "test_accuracy", "test_top5_accuracy"),
        *("lr", "images_per_second", "seconds"),
    ]
    assert [row["step"] for row in rows] == [6, 12, 13]
    config = read_config(folder)
    assert config["flags"]["num_steps"] == 13
    assert config["versions"]["torch"] == torch.__version__
    assert config["classes"] == [str(digit) for digit in range(10)]
    assert ", best " in capsys.readouterr().out
    model = build_model("ViT-Mini_4", img_size=8)
    model.load_state_dict(load_file(folder / "best.safetensors"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    tests = {"test/loss", "test/accuracy", "test/top5_accuracy"}
    assert all(steps[tag] == [6, 12, 13] for tag in tests)
    metrics = {"train/loss", "train/accuracy", "train/grad_norm"}
    assert all(steps[tag] == list(range(1, 14)) for tag in metrics)
    assert set(steps) == {*metrics, "train/lr", "train/images_per_second", *tests}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_type", "ViT-Ti_16", "--img_size", 16], "does not fit the model"),
        (["--optimizer", "adamw"], "the run was started with --optimizer sgd, so it can't be resumed with adamw"),
        (["--num_steps", 3], "is at step 12 already, beyond the 3 of the flags"),
    ],
)
def test_a_resumption_that_cannot_be_leaves_the_record_as_it_is(
    flags, message, tiny_flags, monkeypatch, capsys, tmp_path
):
    run(tiny_flags(), monkeypatch)
    before = read_config(tmp_path / "output" / "run")
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--resume", *flags), monkeypatch)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert read_config(tmp_path / "output" / "run") == before


@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_state_is_named(name, tiny_flags, monkeypatch, capsys, tmp_path):
    run(tiny_flags(), monkeypatch)
    (tmp_path / "output" / "run" / "state-12" / name).write_bytes(b"abc")
    with pytest.raises(SystemExit):
        call_main(train, tiny_flags("--resume"), monkeypatch)
    assert "state-12 can't be read, so" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_not_resumed_but_overwritten(tiny_flags, monkeypatch, capsys, tmp_path):
    """Its state was one file."""
    run(tiny_flags(), monkeypatch)
    folder = tmp_path / "output" / "run"
    shutil.rmtree(folder / "state-12")
    (folder / "state-12.pt").write_bytes(b"abc")
    with pytest.raises(SystemExit):
        call_main(train, tiny_flags("--resume"), monkeypatch)
    assert "state-12 is missing, so" in capsys.readouterr().err
    run(tiny_flags("--overwrite", "--num_steps", 6), monkeypatch)
    assert [path.name for path in folder.glob("state-*")] == ["state-6"]


def test_a_resumed_run_takes_the_weight_decay_of_the_flags(tiny_flags, monkeypatch):
    run(tiny_flags("--num_steps", 6), monkeypatch)
    weights, _ = run(tiny_flags("--resume", "--weight_decay", 10, "--learning_rate", 0.01), monkeypatch)
    plain, _ = run(tiny_flags("--overwrite", "--learning_rate", 0.01), monkeypatch)
    assert weights["blocks.0.mlp.fc1.weight"].norm() < 0.9 * plain["blocks.0.mlp.fc1.weight"].norm()


def test_names_with_a_dollar_sign(tiny_flags, monkeypatch):
    run(tiny_flags("--name", "$a_{$"), monkeypatch, "$a_{$")


def test_resuming_a_finished_run_says_where_it_lies(tiny_flags, monkeypatch, capsys):
    run(tiny_flags(), monkeypatch)
    before = capsys.readouterr().out.splitlines()[-6:]
    run(tiny_flags("--resume"), monkeypatch)
    assert capsys.readouterr().out.splitlines()[-6:] == before


def test_top5_accuracy_of_many_classes(tiny_flags, monkeypatch, tmp_path, capsys):
    """12 classes of pictures; then the run as an earlier version has left it, without that column."""
    for number in range(12):
        for split in ("train", "val"):
            write_pictures(tmp_path / "pictures" / split / f"class{number:02d}", [(8, 8)] * 3, seed=number)
    flags = tiny_flags("--dataset", "imagefolder", "--data_dir", tmp_path / "pictures", "--learning_rate", 0.1)
    weights, rows = run(flags, monkeypatch)
    model = build_model("ViT-Mini_4", img_size=8, num_classes=12).eval()
    model.load_state_dict(weights)
    test_set = load_data("imagefolder", "test", tmp_path / "pictures")
    ranks = model(normalise(test_set.images)).argsort(dim=1, descending=True)
    hits = [label in best for label, best in zip(test_set.labels.tolist(), ranks[:, :5].tolist(), strict=True)]
    assert rows[-1]["test_top5_accuracy"] == pytest.approx(np.mean(hits))
    assert rows[-1]["test_accuracy"] < np.mean(hits) < 1
    printed = capsys.readouterr().out
    assert re.search(rf"test loss [\d.]+ accuracy +[\d.]+ % top-5 +{100 * np.mean(hits):.2f} %  lr", printed)
    ending = rf"\ntest accuracy [\d.]+ %, top-5 {100 * np.mean(hits):.2f} %, best "
    assert re.search(ending, printed)

    path = tmp_path / "output" / "run" / "metrics.csv"
    with open(path, newline="") as file:
        older = [{name: row[name] for name in row if name != "test_top5_accuracy"} for row in csv.DictReader(file)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(older[0]))
        writer.writeheader()
        writer.writerows(older)
    assert read_metrics(path.parent)["test_accuracy"] == [row["test_accuracy"] for row in rows]
    assert "test_top5_accuracy" not in read_metrics(path.parent)
    run([*flags, "--resume"], monkeypatch)  # which has nothing left to do
    printed = capsys.readouterr().out
    assert re.search(r"\ntest accuracy [\d.]+ %, best ", printed)
    _, resumed = run([*flags, "--resume", "--num_steps", 18], monkeypatch)
    assert np.isnan([row["test_top5_accuracy"] for row in resumed]).tolist() == [True, True, False]
    assert re.search(ending.partition("top-5")[0] + "top-5", capsys.readouterr().out)
    path.write_text(path.read_text().replace("train_loss", "loss"))
    with pytest.raises(UserError, match="needs numbers in the columns step, train_loss, "):
        read_metrics(path.parent)


def test_few_classes_are_shown_without_top5(tiny_flags, monkeypatch, capsys):
    run(tiny_flags(), monkeypatch)
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "top-5" not in printed


def test_epochs_instead_of_steps(tiny_flags, monkeypatch, tmp_path):
    flags = tiny_flags("--epochs", 0.1, "--eval_every", 100)
    _, rows = run(flags, monkeypatch)
    assert [row["step"] for row in rows] == [math.ceil(0.1 * 1437 / 16)]


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("flag", ["--fp16", "--bf16"])
def test_16_bit_levels_learn_like_float32(level, flag, tiny_flags, monkeypatch):
    flags = ["--num_steps", 40, "--eval_every", 40, "--learning_rate", 0.1, "--min_crop_scale", 1]
    _, rows = run(tiny_flags(*flags), monkeypatch)
    weights, half_rows = run(tiny_flags(*flags, flag, "--fp16_opt_level", level, "--overwrite"), monkeypatch)
    assert half_rows[-1]["train_loss"] == pytest.approx(rows[-1]["train_loss"], rel=0.06)
    kinds = {weight.dtype for weight in weights.values()}
    assert kinds == ({torch.bfloat16} if level == "O3" else {torch.float32})


def test_master_weights_take_updates_that_16_bits_would_lose(tiny_flags, monkeypatch):
    flags = ["--bf16", "--learning_rate", 0.01, "--num_steps", 4, "--warmup_steps", 0, "--min_crop_scale", 1]
    masters, _ = run(tiny_flags(*flags), monkeypatch)
    changed = differences(masters, initial())
    assert 0 < changed["blocks.0.norm1.weight"] < 1e-3  # bfloat16 has no number between 1 and 1.008
    assert 0 < changed["blocks.0.attn.qkv.weight"] < 1e-3


def test_a_static_loss_scale_changes_nothing_in_float32_and_little_in_bfloat16():
    for level, tolerance in (("O1", 1e-2), ("O2", 1e-2), ("O3", 1e-2)):
        results = []
        for scale in (0.0, 1024.0):
            torch.manual_seed(0)
            model = build_model("ViT-Mini_4", 8, num_layers=1).train()
            torch.nn.init.normal_(model.head.weight)
            precision = Precision(level, torch.bfloat16, torch.device("cpu"), scale)
            optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
            images = torch.randn(4, 3, 8, 8)
            with precision.autocast():
                loss = model(precision.inputs(images)).float().square().mean()
            precision.backward(loss)
            precision.step(optimizer, max_grad_norm=1.0)
            results.append(precision.weights()["head.weight"].float())
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def test_norms_stay_in_float32_at_o2():
    model = build_model("R26-ViT-S_32", 64, num_layers=1)
    Precision("O2", torch.bfloat16, torch.device("cpu")).cast(model)
    for module in model.modules():
        if hasattr(module, "weight"):
            is_norm = isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
            assert module.weight.dtype == (torch.float32 if is_norm else torch.bfloat16), module
    assert model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("eval_every", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(eval_every, tiny_flags, monkeypatch, capsys, tmp_path):
    flags = tiny_flags("--learning_rate", 1e30, "--max_grad_norm", 0, "--eval_every", eval_every, "--warmup_steps", 2)
    with pytest.raises(SystemExit) as stopped:
        run(flags, monkeypatch)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    kept = tmp_path / "output" / "run" / "last.safetensors"
    assert re.search(
        r"(the loss is nan at|the weights are not finite after) step \d \(learning rate \d.*e\+\d+\)", message
    )
    assert f"last good checkpoint: {kept}" in message
    assert all(torch.isfinite(weight).all() for weight in load_file(kept).values())


def test_apex_is_used_where_an_old_build_is_installed(tiny_flags, monkeypatch):
    calls = []

    class ScaledLoss:
        def __init__(self, loss, optimizer):
            self.loss = loss

        def __enter__(self):
            calls.append("scale")
            return self.loss

        def __exit__(self, *error):
            return False

    amp = types.ModuleType("apex.amp")
    amp.initialize = lambda model, optimizer, opt_level, loss_scale: calls.append((opt_level, loss_scale))
    amp.scale_loss = ScaledLoss
    amp.master_params = lambda optimizer: [p for group in optimizer.param_groups for p in group["params"]]
    amp.state_dict = dict
    apex = types.ModuleType("apex")
    apex.amp = amp
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", amp)
    by_apex, _ = run(tiny_flags("--fp16", "--amp_backend", "apex"), monkeypatch)
    assert calls[0] == ("O2", "dynamic")
    assert calls.count("scale") == 12
    plain, _ = run(tiny_flags("--overwrite"), monkeypatch)
    assert max(differences(by_apex, plain).values()) < 1e-6


def test_compiled_training_is_the_same(tiny_flags, monkeypatch):
    monkeypatch.setitem(models.VITS["ViT-Mini_4"], "num_layers", 1)
    eager, _ = run(tiny_flags("--num_steps", 3), monkeypatch)
    compiled, _ = run(tiny_flags("--num_steps", 3, "--compile", "--overwrite"), monkeypatch)
    assert max(differences(eager, compiled).values()) < 1e-5


def test_a_new_training_metric_is_recorded_everywhere(tiny_flags, monkeypatch, tmp_path):
    """One more key of the step's dictionary, which is not measured in every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def step_with_one_more(state, batches):
        metrics = train_step(state, batches)
        return {**metrics, "step_number": metrics["loss"] * 0 + (state.step if state.step % 2 else math.nan)}

    monkeypatch.setattr("utils.training.train_step", step_with_one_more)
    shown = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda bar, text, refresh: shown.append(text))
    _, rows = run(tiny_flags("--gradient_accumulation_steps", 2), monkeypatch)
    assert [row["step_number"] for row in rows] == [3, 9]  # means of 1, 3, 5 and of 7, 9, 11
    assert re.match(r"loss \S+, accuracy \S+, grad_norm \S+, step_number 11, lr ", shown[10])
    events = EventAccumulator(str(tmp_path / "output" / "run")).Reload()
    assert [event.value for event in events.Scalars("train/step_number")][::2] == [1, 3, 5, 7, 9, 11]


def test_a_step_that_loss_scaling_skips_has_no_gradient_norm():
    """Dynamic scaling: the first gradients overflow, the weights stay, the next step is taken."""
    model = torch.nn.Linear(3, 2)
    precision = Precision("O1", torch.float16, torch.device("cpu"))
    optimizer = precision.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
    before = model.weight.detach().clone()
    images, norms = torch.randn(4, 3), []
    for factor in (1e36, 1.0):
        precision.backward(model(images).sum() * factor)
        expected = math.sqrt(
            sum((p.grad.double() / precision.scaler.get_scale()).square().sum() for p in model.parameters())
        )
        norms.append(precision.step(optimizer, max_grad_norm=1.0).item())
        if factor > 1:
            assert torch.equal(model.weight, before)
    assert math.isnan(norms[0])
    assert norms[1] == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(model.weight, before)


def test_the_meter_averages_what_was_measured():
    meter = Meter(one_process())
    for loss, norm in ((1.0, math.nan), (2.0, 5.0), (6.0, 7.0)):
        meter.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)})
    assert meter.read()["loss"] == [1.0, 2.0, 6.0]
    assert meter.read() == {}
    assert meter.means() == {"loss": 3.0, "grad_norm": 6.0}
    restored = Meter(one_process())
    restored.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for each in (meter, restored):
        each.add({"loss": torch.tensor(3.0), "grad_norm": torch.tensor(math.nan)})
        each.read()
    assert restored.means() == meter.means() == {"loss": 3.0, "grad_norm": 6.0}
    meter.reset()
    assert meter.means() == {}


def test_a_new_data_set_is_one_entry(tiny_flags, monkeypatch, capsys, tmp_path):
    """Trained, resumed and evaluated by its name."""
    random = np.random.default_rng(0)
    splits = {
        split: (random.integers(0, 256, (size, 3, 9, 7), dtype=np.uint8))
        for split, size in (("train", 48), ("test", 20))
    }
    names = ["left", "right", "straight on"]
    source = DataSource(
        lambda data_dir: 3, lambda data_dir, split: Split(splits[split], np.arange(len(splits[split])) % 3, names)
    )
    monkeypatch.setitem(DATASETS, "toy", source)
    flags = tiny_flags("--dataset", "toy", "--num_steps", 6, "--eval_every", 3, "--learning_rate", 0.1)
    weights, rows = run(flags, monkeypatch)
    assert read_config(tmp_path / "output" / "run")["classes"] == names
    _, rows = run([*flags, "--num_steps", 9, "--resume"], monkeypatch)
    assert [row["step"] for row in rows] == [3, 6, 9]
    capsys.readouterr()
    call_main(train, [*flags, "--mode", "eval"], monkeypatch)
    assert "on toy: 20 test images, 3 classes, at 8x8" in capsys.readouterr().out
    assert "unknown dataset 'toys'; did you mean toy" in fails(
        train, tiny_flags("--dataset", "toys"), monkeypatch, capsys
    )
