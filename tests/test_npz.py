"""The table of checkpoint keys: it must contain every weight of a model exactly once."""

import pytest
import torch

from models import CheckpointError, build_model, npz
from models.npz import Row

MODELS = {"ViT-Mini_4": {"num_layers": 1}, "Conformer-Mini_4": {}, "ResNet-Mini_Flops": {}}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("add", ["parameter", "buffer"])
def test_a_weight_without_a_key_is_an_error(model_type, add):
    """Also in export: the arrays would be those of another model."""
    model = build_model(model_type, 32, **MODELS[model_type])
    arrays = model.export_npz()
    block = next(module for module in model.modules() if getattr(module, "is_block", False))
    if add == "parameter":
        block.gate = torch.nn.Parameter(torch.ones(3))
    else:
        block.register_buffer("gate", torch.ones(3))
    for call in (model.export_npz, lambda: model.load_from(arrays), lambda: model.load_from(arrays, head="keep")):
        with pytest.raises(CheckpointError, match=r"\.gate is not at all in the model's table of checkpoint keys"):
            call()


def test_a_buffer_that_is_not_persistent_needs_no_key():
    model = build_model("ViT-Mini_4", 32, num_layers=1)
    model.register_buffer("gate", torch.ones(3), persistent=False)
    assert not any("gate" in key for key in model.export_npz())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows, bias: [row for row in rows if row.view is not bias], "head.bias is not at all in"),
        (lambda rows, bias: [*rows, Row("again", bias)], "head.bias is more than once in"),
        (lambda rows, bias: [*rows[:-1], Row("half", bias[:5])], "head.bias is in part in"),
        (lambda rows, bias: [*rows[:-1], Row("one", bias[:5]), Row("two", bias[:5])], "head.bias is more than once in"),
        (lambda rows, bias: [*rows, Row("cls", bias)], "two weights of the model have the checkpoint key cls"),
        (lambda rows, bias: [*rows[:-1], Row("half", bias[:5]), Row("rest", bias[5:])], None),
    ],
    ids=["missing", "twice", "half", "one half twice", "key twice", "two halves"],
)
def test_each_weight_is_in_the_table_once(change, message):
    model = build_model("ViT-Mini_4", 32, num_layers=1)
    rows = change(npz.vit_rows(model), model.head.bias)
    if message is None:
        npz.check_rows(model, rows)
    else:
        with pytest.raises(CheckpointError, match=message):
            npz.check_rows(model, rows)
