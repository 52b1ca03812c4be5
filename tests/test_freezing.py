"""What --train trains and freezes, in every model and in whole runs, and the layers of --layer_decay against timm's."""

import copy
import sys
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay

import train
from command_line import train_parser
from helpers import (
    assert_same_bits,
    call_main,
    fails,
    make_shallow,
    metrics,
    run_dir,
    run_processes,
    stop_after,
    train_run,
)
from models import MODEL_TYPES, NORM_TYPES, build_model
from utils.freezing import freeze, is_block, layer_scales, model_parts, part_of, repeated_parts, trained_weights
from utils.optimizers import OPTIMIZERS, make_optimizer, state_tensors
from utils.parallel.memory import recompute_activations
from utils.parallel.precision import Precision
from utils.profiling import activation_bytes
from utils.records.weights import BEST, LAST

CHOICES = ("head", "last:1", "norms")
CPU = torch.device("cpu")


def on_meta(model_type, **keywords):
    with torch.device("meta"):
        return build_model(model_type, **keywords)


def random_network(model_type="ViT-Mini_4", img_size=16, **keywords):
    """A new model with random weights everywhere, in training mode."""
    torch.manual_seed(0)
    model = build_model(model_type, img_size, **keywords).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def flags(*given):
    return train_parser().parse_args(["--name", "x", *map(str, given)])


def prefixes(names, depth):
    """The first `depth` parts of dotted names."""
    return {".".join(name.split(".")[:depth]) for name in names}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_has_a_head_repeated_parts_and_norms(model_type):
    """Each choice contains the head; the last N parts grow with N and end with all weights but the embedding's."""
    model = on_meta(model_type)
    weights = {name for name, _ in model.named_parameters()}
    freeze(model, "all")
    assert all(weight.requires_grad for weight in model.parameters())
    head = trained_weights(model, "head")
    assert prefixes(head, 1) == {"head"}
    count = len(repeated_parts(model_parts(model)))
    last = [trained_weights(model, f"last:{n}") for n in range(1, count + 1)]
    assert all(fewer < more for fewer, more in zip([head, *last], last, strict=False))
    assert prefixes(weights - last[-1], 1) <= {"cls_token", "pos_embed", "patch_embed", "stem"}
    assert head < trained_weights(model, "norms") < weights
    with pytest.raises(ValueError, match=f"last:{count + 1}: the model has {count} blocks or stages; give at most"):
        trained_weights(model, f"last:{count + 1}")


def test_the_last_parts_are_blocks_of_a_vit_stages_of_a_cnn_and_the_cnn_of_a_conformer():
    for model_type in ("ViT-B_16", "R50-ViT-B_16"):
        assert prefixes(trained_weights(on_meta(model_type), "last:2"), 2) == {
            *("blocks.10", "blocks.11", "norm.weight", "norm.bias", "head.weight", "head.bias")
        }
    assert prefixes(trained_weights(on_meta("BiT-M-R50x1"), "last:2"), 2) == {
        *("stages.2", "stages.3", "norm.weight", "norm.bias", "head.fc")
    }
    conformer = on_meta("Conformer-B_16")
    whole_cnn = {"cnn.0", "cnn.1", "cnn.2", "cnn_norm.weight", "cnn_norm.bias", "head.fc"}
    assert prefixes(trained_weights(conformer, "last:1"), 2) == whole_cnn
    assert prefixes(trained_weights(conformer, "last:2"), 2) == {*whole_cnn, "blocks.3"}


@pytest.mark.parametrize(
    "model_type, norm_type, per_block, others",
    [
        ("ViT-Mini_4", "LN", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}, {"norm"}),
        ("ViT-Mini_4", "BN", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}, {"norm"}),
        ("ViT-Mini_4", "GN", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}, {"norm"}),
        ("ViT-Mini_4", "Rescale", {"norm1.bias", "norm2.bias", "add1.weight", "add2.weight"}, set()),
        ("R26-ViT-Mini_4", "LN", {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}, {"norm", "patch_embed"}),
        ("ResNet-Mini_Flops", "LN", None, {"norm", "stages"}),
        ("Conformer-Mini_4", "LN", None, {"blocks", "cnn", "cnn_norm"}),
    ],
)
def test_norms_are_the_norms_of_every_kind(model_type, norm_type, per_block, others):
    model = on_meta(model_type, img_size=32, norm_type=norm_type)
    norms = trained_weights(model, "norms") - trained_weights(model, "head")
    if per_block is not None:
        assert {name for name in norms if name.startswith("blocks.0.")} == {f"blocks.0.{key}" for key in per_block}
        others = others | {"blocks"}
    assert prefixes(norms, 1) == others
    weights = dict(model.named_parameters())
    assert all(weights[name].ndim == 1 for name in norms)
    # What is left has no other weights of one dimension than biases of layers with a matrix.
    rest = [name for name, weight in weights.items() if weight.ndim == 1 and name not in norms]
    assert all(weights[name.removesuffix("bias") + "weight"].ndim > 1 for name in rest)


def test_a_model_without_what_is_chosen_is_an_error():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="--train norms: the model has no norms with weights"):
        freeze(Plain(), "norms")
    with pytest.raises(ValueError, match="--train last:1: the model has 0 blocks"):
        freeze(Plain(), "last:1")
    with pytest.raises(ValueError, match="--train head needs a model with a module named head"):
        freeze(torch.nn.Sequential(torch.nn.Linear(2, 2)), "head")
    with pytest.raises(ValueError, match="--layer_decay needs a model of blocks"):
        layer_scales(Plain(), 0.75)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--train", "last:0"], "last:0 is not all, head, norms or last:N with N above 0, for example last:2"),
        (["--train", "last:-1"], "last:-1 is not all, head, norms or last:N"),
        (["--train", "last"], "last is not all, head, norms or last:N"),
        (["--train", "last:99"], "--train last:99: the model has 6 blocks or stages; give at most last:6"),
        (["--layer_decay", 0], "--layer_decay: 0 is not a number above 0 and at most 1"),
        (["--layer_decay", 1.5], "--layer_decay: 1.5 is not a number above 0 and at most 1"),
        (["--layer_decay", "nan"], "--layer_decay: nan is not a number above 0 and at most 1"),
    ],
)
def test_wrong_flags_are_errors(given, message, tiny_flags, monkeypatch, capsys):
    assert message in fails(train, tiny_flags(*given), monkeypatch, capsys)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "model_type, norm_type",
    [*(("ViT-Mini_4", norm) for norm in NORM_TYPES), ("R26-ViT-Mini_4", "LN"), ("ResNet-Mini_Params", "LN")],
)
def test_gradients_are_those_of_the_whole_model_and_only_of_what_is_trained(model_type, norm_type, choice):
    """Against the gradients that the whole model has, with the norms of the frozen blocks in evaluation mode."""
    whole = random_network(model_type, 16, norm_type=norm_type)
    part = copy.deepcopy(whole)
    freeze(part, choice)
    modes = {name: module.training for name, module in part.train().named_modules()}
    for name, module in whole.named_modules():
        module.training = modes[name]
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for model in (whole, part):
        F.cross_entropy(model(images), labels).backward()
    trained = trained_weights(whole, choice)
    expected = {name: p.grad for name, p in whole.named_parameters() if name in trained}
    found = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    "choice, active",
    [
        ("head", set()),
        ("last:1", {"blocks.2"}),
        ("norms", {"blocks.0", "blocks.1", "blocks.2"}),
        ("all", {"pos_drop", "blocks.0", "blocks.1", "blocks.2"}),
    ],
)
def test_frozen_parts_drop_nothing_out_and_keep_their_running_statistics(choice, active):
    """Also after model.train(), as it is called after each evaluation."""
    config = {"num_layers": 3, "dropout_rate": 0.5, "drop_path_rate": 0.5, "norm_type": "BN"}
    model = random_network(**config)
    freeze(model, choice)
    model.eval()
    model.train()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "rate")}
    drops = {name for name, layer in layers.items() if layer.training and layer.rate > 0}
    assert {name if name == "pos_drop" else ".".join(name.split(".")[:2]) for name in drops} == active
    before = {name: buffer.clone() for name, buffer in model.state_dict().items() if "running" in name}
    images = torch.randn(4, 3, 16, 16)
    if choice == "head":
        assert torch.equal(model(images), model(images))
    model(images)
    changed = {name for name, buffer in before.items() if not torch.equal(buffer, model.state_dict()[name])}
    final = {"norm.running_mean"} if choice != "head" else set()
    blocks = {name for name in before if name.startswith(tuple(f"{block}." for block in active))}
    assert {name for name in changed if "mean" in name} == {name for name in blocks if "mean" in name} | final


def test_a_random_choice_of_tokens_remains_random_when_all_around_it_is_frozen():
    model = random_network(token_reduction="random", keep_tokens=4, reduction_layer=1)
    freeze(model, "head")
    model.train()
    images = torch.randn(2, 3, 16, 16)
    kept = [model.forward_with_clusters(images)[2][0].kept for _ in range(5)]
    assert any(not torch.equal(each, kept[0]) for each in kept)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "model_type, last",
    [
        ("ViT-Mini_4", {"blocks.5"}),
        ("R26-ViT-Mini_4", {"blocks.5"}),
        ("ResNet-Mini_Params", {"stages.3.blocks.0"}),
        ("Conformer-Mini_4", {"cnn.0", "cnn.1"}),
    ],
)
def test_frozen_parts_keep_no_activations(model_type, last, recomputes):
    """And the blocks before the first trained one are computed once, also if the others are computed again."""
    images = torch.randn(8, 3, 32, 32)
    kept, calls = {}, Counter()
    for choice in ("all", "last:1", "head"):
        model = random_network(model_type, 32)
        freeze(model, choice)
        if recomputes:
            recompute_activations(model)
        blocks = {name: module for name, module in model.named_modules() if is_block(module)}
        for name, block in blocks.items():
            next(block.children()).register_forward_hook(lambda *_, name=name: calls.update([name]))
        calls.clear()
        kept[choice] = activation_bytes(model, lambda model=model: model(images).sum().backward())
        twice = {"all": set(blocks), "last:1": last, "head": set()}[choice] if recomputes else set()
        assert calls == {name: 2 if name in twice else 1 for name in blocks}
    assert kept["head"] < kept["last:1"] < kept["all"]
    assert kept["head"] <= 4 * 8 * 512  # of 8 images at most 512 float32 features, the input of the head


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_is_held_for_trained_weights_only(name, choice, level):
    model = random_network(num_layers=2)
    freeze(model, choice)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    precision = Precision(level, torch.bfloat16, CPU)
    args = flags("--optimizer", name, "--weight_decay", 0.1, "--layer_decay", 0.5)
    optimizer = precision.prepare(model, lambda named: make_optimizer(args, model, named))
    frozen = {key: weight.clone() for key, weight in precision.weights().items()}
    trained = trained_weights(model, choice)
    for _ in range(2):
        with precision.autocast():
            logits = model(precision.inputs(torch.randn(4, 3, 16, 16)))
        precision.backward(logits.float().square().mean())
        assert {key for key, p in model.named_parameters() if p.grad is not None} == trained
        precision.step(optimizer, max_grad_norm=1.0)
    assert {key.rpartition("/")[0] for key in state_tensors(optimizer)} == trained
    assert precision.masters.keys() <= trained
    after = precision.weights()
    assert all(torch.equal(after[key], frozen[key]) for key in after.keys() - trained)
    assert all(not torch.equal(after[key], frozen[key]) for key in trained)
    if level != "O3":  # whose weights have 16 bits, in files too
        assert all(torch.equal(after[key], before[key]) for key in after.keys() - trained)


def timm_scales(model, layer_decay=0.75):
    """({weight: factor}, {weight: weight decay}) of timm's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=layer_decay)
    each = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    return {name: g["lr_scale"] for name, g in each}, {name: g["weight_decay"] for name, g in each}


@pytest.mark.parametrize(
    "model_type, timm_name",
    [
        ("ViT-Ti_16", "vit_tiny_patch16_224"),
        ("ViT-L_16", "vit_large_patch16_224"),
        ("BiT-M-R50x1", "resnetv2_50x1_bit"),
        ("BiT-M-R101x3", "resnetv2_101x3_bit"),
    ],
)
def test_the_groups_of_layer_decay_are_timms(model_type, timm_name):
    with torch.device("meta"):
        theirs = timm.create_model(timm_name, num_classes=10)
    if not hasattr(theirs, "no_weight_decay"):
        theirs.no_weight_decay = set
    scales, decays = timm_scales(theirs)
    model = on_meta(model_type)
    assert layer_scales(model, 0.75) == scales
    args = flags("--layer_decay", 0.75, "--weight_decay", 0.05, "--learning_rate", 0.1)
    optimizer = make_optimizer(args, model, model.named_parameters())
    assert len(optimizer.param_groups) == len({(scales[name], decays[name]) for name in scales})
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            assert group["initial_lr"] == pytest.approx(0.1 * scales[name]), name
            assert group["weight_decay"] == decays[name], name


def test_the_stem_of_a_hybrid_is_one_layer_as_in_timm():
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_r50_s16_224", num_classes=10)
    ours, scales = layer_scales(on_meta("R50-ViT-B_16"), 0.75), timm_scales(theirs)[0]
    for all_scales in (ours, scales):
        stem = {name for name in all_scales if name.startswith("patch_embed.")}
        assert {all_scales.pop(name) for name in stem} == {0.75**13}
    assert ours == scales


def test_each_unit_of_a_conformers_cnn_is_a_layer():
    scales = layer_scales(on_meta("Conformer-Mini_4", img_size=32), 0.5)  # two blocks, two units
    expected = {"head": 1, "cnn_norm": 1, "cnn.1": 1, "cnn.0": 2, "blocks.1": 3, "blocks.0": 4}
    expected |= {"patch_embed": 5, "cls_token": 5, "pos_embed": 5, "head": 0}
    for name, scale in scales.items():
        [layers] = [count for part, count in expected.items() if f"{name}.".startswith(f"{part}.")]
        assert scale == 0.5**layers, name


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_layer_has_the_update_of_its_own_learning_rate(name, monkeypatch):
    """Against optimizers of the whole model with that rate; no weight decays."""
    start = random_network(num_layers=2)
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(p.shape, generator=generator) for p in start.parameters()]

    def updated(*given):
        model = copy.deepcopy(start)
        optimizer = make_optimizer(flags("--optimizer", name, *given), model, model.named_parameters())
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        return model.state_dict()

    decayed = updated("--layer_decay", 0.5, "--learning_rate", 0.1)
    for layers, parts in enumerate((("head",), ("blocks.1", "norm"), ("blocks.0",), ("patch_embed", "cls_token"))):
        plain = updated("--learning_rate", 0.1 * 0.5**layers)
        chosen = [key for key in plain if key.startswith(parts)]
        assert_same_bits({key: decayed[key] for key in chosen}, {key: plain[key] for key in chosen})


def first_model(norm_type):
    """The model of a tiny run before its first step."""
    torch.manual_seed(42)
    return build_model("ViT-Mini_4", 8, norm_type=norm_type)


def compare(model, weights, choice):
    """(frozen weights and statistics that differ from the model's, trained weights that do not)."""
    trained, before = trained_weights(model, choice), model.state_dict()
    assert weights.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], weights[name])}
    parts = model_parts(model)
    trained_parts = {part_of(name, parts) for name in trained}
    measured = {name for name in before if "running" in name and part_of(name, parts) in trained_parts}
    return before.keys() - same - trained - measured, same & (trained | measured)


@pytest.mark.parametrize(
    "choice, given",
    [
        ("head", ["--fp16", "--fp16_opt_level", "O2"]),
        ("last:1", ["--layer_decay", 0.75, "--optimizer", "muon", "--learning_rate", 0.01, "--grad_checkpointing"]),
        pytest.param(
            *("norms", ["--gradient_accumulation_steps", 2, "--layer_decay", 0.75, "--weight_decay", 0.1]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("last:1", ["--fp16", "--fp16_opt_level", "O1", "--optimizer", "adamw", "--learning_rate", 0.01]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits_and_the_frozen_weights_it_began_with(
    choice, given, tiny_flags, monkeypatch, tmp_path
):
    make_shallow(monkeypatch)
    given = ["--train", choice, *given, "--norm_type", "BN", "--ema_decay", 0.9, "--dropout_rate", 0.1]
    whole, _ = train_run(tiny_flags(*given), monkeypatch)
    best = load_file(tmp_path / "output" / "run" / BEST)
    for weights in (whole, best):
        changed, unchanged = compare(first_model("BN"), weights, choice)
        assert changed == unchanged == set()
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*given, "--name", "stopped"), monkeypatch)
    resumed, _ = train_run(tiny_flags(*given, "--name", "stopped", "--resume"), monkeypatch, "stopped")
    assert_same_bits(whole, resumed)
    assert_same_bits(best, load_file(tmp_path / "output" / "stopped" / BEST))


def test_a_run_can_not_be_resumed_with_another_part(tiny_flags, monkeypatch, capsys):
    make_shallow(monkeypatch)
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags("--train", "last:1"), monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call_main(train, tiny_flags("--resume"), monkeypatch)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == "train.py: error: the run was started with --train last:1, so it can't be resumed with all\n"


def test_frozen_weights_of_a_new_model_are_probably_a_mistake(tiny_flags, monkeypatch, capsys):
    make_shallow(monkeypatch)
    call_main(train, tiny_flags("--train", "head", "--num_steps", 4), monkeypatch)
    printed = capsys.readouterr().out
    assert "warning: --train head freezes weights that no --pretrained_dir provides" in printed
    assert "M parameters (0.00 M trained), on digits" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that compute")
@pytest.mark.parametrize(
    "parallel, choice, given",
    [
        ("ddp", "last:1", ["--norm_type", "BN"]),
        ("fsdp", "last:1", ["--norm_type", "BN"]),
        pytest.param("ddp", "norms", ["--gradient_accumulation_steps", 2], marks=pytest.mark.slow),
        pytest.param("ddp", "head", ["--norm_type", "BN"], marks=pytest.mark.slow),
        pytest.param("fsdp", "norms", ["--gradient_accumulation_steps", 2, "--bf16"], marks=pytest.mark.slow),
        pytest.param("fsdp", "head", ["--norm_type", "BN", "--grad_checkpointing"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_metrics_of_one_and_resume_in_it(parallel, choice, given, tiny_flags, monkeypatch):
    """BN has the statistics of the whole batch in the trained block, and keeps them in the frozen ones."""
    make_shallow(monkeypatch)
    given = [*given, "--train", choice, "--layer_decay", 0.75, "--ema_decay", 0.9, "--dropout_rate", 0.1]
    given += ["--num_steps", 8, "--eval_every", 4]
    one, two = (tiny_flags(*given, "--parallel", parallel, "--name", name) for name in ("one", "two"))
    train_run(one, monkeypatch, "one")
    for status, printed in run_processes(2, two):
        assert status == 0, printed
    for flags, name in ((one, "one"), (two, "two")):
        train_run([*flags, "--resume", "--num_steps", "12"], monkeypatch, name)
    for mine, theirs in zip(metrics(two), metrics(one), strict=True):
        for name in ("step", "train_loss", "test_loss", "grad_norm"):
            bound = 0.02 if "--bf16" in given else 1e-4
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=bound), name
    model = first_model("BN" if "BN" in given else "LN")
    for file in (LAST, BEST):
        changed, unchanged = compare(model, load_file(run_dir(two) / file), choice)
        assert changed == unchanged == set()


@pytest.mark.slow
@pytest.mark.parametrize("given", [["--train", "last:1"], ["--train", "norms", "--grad_checkpointing"]])
def test_a_compiled_run_has_the_weights_of_an_ordinary_one(given, tiny_flags, monkeypatch):
    """In float32, which a CPU would not compile by itself, because rounding to 16 bits hides errors."""
    monkeypatch.setattr("utils.train_state.is_compiled", lambda args, *others: args.compile)
    make_shallow(monkeypatch, num_layers=3)
    eager, _ = train_run(tiny_flags("--num_steps", 3, *given), monkeypatch)
    compiled, _ = train_run(tiny_flags("--num_steps", 3, "--compile", "--overwrite", *given), monkeypatch)
    assert max((eager[name] - compiled[name]).abs().max() for name in eager) < 1e-5
