"""The optimizers: Muon against its two parts, new entries in the table, their state in checkpoints, groups."""

import numpy as np
import pytest
import torch

import train
from command_line import train_parser
from helpers import (
    assert_same_bits,
    call_main,
    differences,
    evaluate_and_export,
    fails,
    make_shallow,
    metrics,
    stop_after,
    succeed,
    train_run,
)
from models import build_model
from utils.errors import UserError
from utils.optimizers import OPTIMIZERS, make_optimizer, restore_state, state_tensors
from utils.parallel.precision import Precision
from utils.records.checkpoint import load_checkpoint


@pytest.fixture
def two_blocks(monkeypatch):
    make_shallow(monkeypatch, 2)


def two_block_model(model_type="ViT-Mini_4"):
    torch.manual_seed(0)
    model = build_model(model_type, 8, **({} if model_type.startswith("ResNet") else {"num_layers": 2}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def flags(*given):
    return train_parser().parse_args(["--name", "x", *map(str, given)])


@pytest.mark.parametrize(
    "model_type, prefixes, count",
    [
        ("ViT-Mini_4", ("blocks.",), 2 * 4),  # qkv, proj, fc1 and fc2 of each block
        (
            "R26-ViT-Mini_4",
            ("blocks.", "patch_embed.stem.block"),
            2 * 4 + 8 * 3 + 3,
        ),  # 3 of the stem's 8 units have a projection
        ("ResNet-Mini_Flops", ("stages.",), 5 * 3 + 3),
    ],
)
def test_muon_is_muon_for_the_matrices_of_the_blocks_and_adamw_for_the_rest(model_type, prefixes, count):
    """Against separate optimizers, in which query, key and value are parameters of their own, and kernels matrices."""
    model, reference = two_block_model(model_type), two_block_model(model_type)
    args = flags("--optimizer", "muon", "--learning_rate", 0.02, "--weight_decay", 0.1)
    optimizer = make_optimizer(args, model, list(model.named_parameters()))

    matrices = [(name, p) for name, p in reference.named_parameters() if name.startswith(prefixes) and p.ndim > 1]
    assert len(matrices) == count
    names = dict(matrices)
    others = [(name, p) for name, p in reference.named_parameters() if name not in names]
    not_decayed = [p for name, p in others if p.ndim == 1 or name in ("cls_token", "pos_embed")]
    decayed = [p for name, p in others if not (p.ndim == 1 or name in ("cls_token", "pos_embed"))]
    parts = {
        name: [torch.nn.Parameter(part.flatten(1).clone()) for part in p.detach().chunk(3 if "qkv" in name else 1)]
        for name, p in matrices
    }
    muon = torch.optim.Muon(
        [part for name in parts for part in parts[name]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": not_decayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, fused=True)
    for step in range(4):
        give_gradients(model, step)
        give_gradients(reference, step)
        for name, p in matrices:
            for part, gradient in zip(parts[name], p.grad.chunk(len(parts[name])), strict=True):
                part.grad = gradient.flatten(1)
        for each in (optimizer, muon, adamw):
            each.step()
    expected = {
        **dict(reference.named_parameters()),
        **{name: torch.cat(parts[name]).view_as(p) for name, p in matrices},
    }
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name


@pytest.mark.parametrize("model_type", ["ViT-Mini_4", "ResNet-Mini_Flops"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_restored_state_continues_with_the_same_bits(name, model_type):
    model = two_block_model(model_type)
    optimizer = make_optimizer(flags("--optimizer", name), model, list(model.named_parameters()))
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    copy = two_block_model(model_type)
    copy.load_state_dict(model.state_dict())
    restored = make_optimizer(flags("--optimizer", name), copy, list(copy.named_parameters()))
    restore_state(restored, {key: tensor.clone() for key, tensor in state_tensors(optimizer).items()})
    for each, its_optimizer in ((model, optimizer), (copy, restored)):
        give_gradients(each, 7)
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


@pytest.mark.usefixtures("two_blocks")
def test_muon_with_accumulation_is_muon_with_the_whole_batch(tiny_flags, monkeypatch):
    """Its matrix products in bfloat16 amplify the rounding of the gradients."""
    given = ["--optimizer", "muon", "--learning_rate", 1e-3, "--dropout_rate", 0.2]
    whole, _ = train_run(tiny_flags(*given), monkeypatch)
    parts, _ = train_run(tiny_flags(*given, "--gradient_accumulation_steps", 4, "--overwrite"), monkeypatch)
    # A learning rate of 0, so the initial weights.
    start, _ = train_run(tiny_flags(*given, "--num_steps", 1, "--warmup_steps", 1, "--overwrite"), monkeypatch)
    moved = max(differences(whole, start).values())
    assert max(differences(whole, parts).values()) < 0.05 * moved


@pytest.mark.slow
def test_muon_in_two_processes_gives_the_losses_of_one(tiny_flags, monkeypatch):
    """Losses within 5e-6 and gradient norms within 5e-5, relative: five times the differences that were measured.

    The sum over the processes rounds the gradients differently, and Muon's products in bfloat16 amplify that. The
    measured differences of the 12 steps were at most 9e-7 and 9e-6; the test loss falls by 0.7 % meanwhile.
    """
    given = ["--optimizer", "muon", "--learning_rate", 1e-3, "--dropout_rate", 0.2, "--eval_every", 2]
    one, two = (tiny_flags(*given, "--name", name) for name in ("one", "two"))
    call_main(train, one, monkeypatch)
    succeed("train.py", *two, processes=2)
    for mine, theirs in zip(metrics(two), metrics(one), strict=True):
        for name, bound in (("train_loss", 5e-6), ("test_loss", 5e-6), ("grad_norm", 5e-5)):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=bound), (name, mine["step"])
    losses = [float(row["test_loss"]) for row in metrics(two)]
    assert losses[-1] < 0.995 * losses[0]


@pytest.mark.usefixtures("two_blocks")
def test_muon_reduces_the_test_loss(tiny_flags, monkeypatch):
    given = ["--optimizer", "muon", "--learning_rate", 3e-3, "--num_steps", 60, "--eval_every", 60]
    _, rows = train_run(tiny_flags(*given, "--min_crop_scale", 0.6), monkeypatch)
    assert rows[-1]["test_loss"] < 1.5


def test_the_state_of_kernels_that_adamw_updated_is_an_error():
    model = two_block_model("ResNet-Mini_Flops")
    earlier = make_optimizer(flags("--optimizer", "adamw"), model, list(model.named_parameters()))
    give_gradients(model, 0)
    earlier.step()
    optimizer = make_optimizer(flags("--optimizer", "muon"), model, list(model.named_parameters()))
    with pytest.raises(UserError, match="earlier version, in which --optimizer muon did not update convolution"):
        restore_state(optimizer, state_tensors(earlier))


def test_muon_is_an_error_with_fsdp(tiny_flags, monkeypatch, capsys):
    message = fails(train, tiny_flags("--optimizer", "muon", "--parallel", "fsdp"), monkeypatch, capsys)
    assert "--parallel fsdp does not support --optimizer muon, which needs whole matrices" in message


class SignAndMomentum(torch.optim.Optimizer):
    """A toy made of two: a sign update for the first group with its own state, torch's SGD for the others."""

    def __init__(self, groups, lr, model):
        super().__init__(groups, {"lr": lr})
        self.sgd = torch.optim.SGD(self.param_groups[1:], lr=lr, momentum=0.5)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        for weight in group["params"]:
            state = self.state[weight]
            slow = state.setdefault("slow_gradient", torch.zeros_like(weight))
            slow.lerp_(weight.grad, 0.1)
            weight.sub_(group["lr"] * slow.sign())
        self.sgd.param_groups, self.sgd.state = self.param_groups[1:], self.state
        self.sgd.step()


@pytest.mark.usefixtures("two_blocks")
def test_a_new_optimizer_needs_one_line_to_be_trained_resumed_and_evaluated(tiny_flags, monkeypatch, tmp_path, capsys):
    """Its resumed run has the same bits; its weights differ from SGD's."""
    monkeypatch.setitem(OPTIMIZERS, "toy", SignAndMomentum)
    given = ["--optimizer", "toy", "--learning_rate", 1e-3]
    whole, rows = train_run(tiny_flags(*given), monkeypatch)
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        train_run(tiny_flags(*given, "--name", "stopped"), monkeypatch)
    assert load_checkpoint(tmp_path / "output" / "stopped")[0].step == 5
    resumed, _ = train_run(tiny_flags(*given, "--name", "stopped", "--resume"), monkeypatch, "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    by_sgd, _ = train_run(tiny_flags("--learning_rate", 1e-3, "--name", "sgd"), monkeypatch, "sgd")
    assert max(differences(whole, by_sgd).values()) > 1e-4
    evaluate_and_export(tiny_flags(*given), monkeypatch, capsys)
    call_main(train, tiny_flags("--mode", "eval"), monkeypatch)
    assert f"top-1    {100 * max(row['test_accuracy'] for row in rows):.2f} %" in capsys.readouterr().out


def test_state_that_is_not_a_tensor_is_an_error_when_it_is_saved():
    model = two_block_model()
    optimizer = make_optimizer(flags(), model, list(model.named_parameters()))
    optimizer.state[model.head.weight]["age"] = 3
    with pytest.raises(TypeError, match="the optimizer's age of head.weight is not a tensor, so it can't be saved"):
        state_tensors(optimizer)


@pytest.mark.usefixtures("two_blocks")
def test_a_group_keeps_its_own_learning_rate_through_schedule_and_resumption(tiny_flags, monkeypatch):
    """One group has a tenth of the rate."""
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setitem(
        OPTIMIZERS, "two rates", lambda groups, lr, model: Watched([{**groups[0], "lr": lr / 10}, *groups[1:]], lr=lr)
    )
    train_run(tiny_flags("--optimizer", "two rates", "--num_steps", 6), monkeypatch)
    train_run(tiny_flags("--optimizer", "two rates", "--resume"), monkeypatch)
    assert len(rates) == 12
    slow, fast = np.transpose(rates)
    assert slow == pytest.approx(fast / 10)
    assert len(set(fast)) > 4


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_first_step_that_loss_scaling_skips_leaves_no_trace(name):
    """The next step is the first one of a fresh optimizer, to the bit."""
    results = []
    for skips in (True, False):
        model = two_block_model()
        precision = Precision("O1", torch.float16, torch.device("cpu"))
        args = flags("--optimizer", name)
        optimizer = precision.prepare(model, lambda named, args=args, model=model: make_optimizer(args, model, named))
        garbage = [torch.full_like(p, torch.nan) for p in model.parameters()]
        del garbage  # so that memory without values is likely to hold NaN
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for factor in (1e38, 1.0) if skips else (1.0,):
            precision.backward(model(images).square().mean() * factor)
            precision.step(optimizer, max_grad_norm=1.0)
        results.append(model.state_dict())
    assert_same_bits(*results)
    assert not torch.equal(results[0]["head.bias"], two_block_model().head.bias)
