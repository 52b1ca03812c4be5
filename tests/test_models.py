"""`build_model` and the published configs: names, sizes, dropout rates, wrong arguments."""

import pytest
import torch

import models
from helpers import random_model
from models import CONFORMERS, MODEL_TYPES, REDUCTION_METHODS, RESNETS, TOKEN_REDUCTIONS, VITS, build_model
from models.convolution import StdConv2d
from utils.profiling import count_flops

SIZES = {  # millions of parameters at 224x224 and 10 classes
    "ViT-Ti_16": 5.53,
    "ViT-S_16": 21.67,
    "ViT-B_16": 85.81,
    "ViT-B_32": 87.46,
    "ViT-L_16": 303.31,
    "ViT-L_32": 305.52,
    "ViT-H_14": 630.78,
    "R50-ViT-B_16": 97.90,
    "R26-ViT-S_32": 36.05,
    "R-ViT-Ti_16": 6.15,
    "Conformer-B_16": 43.42,
}


def test_every_name_is_in_one_table():
    assert sorted(MODEL_TYPES) == sorted([*VITS, *CONFORMERS, *RESNETS])
    assert ("none", *REDUCTION_METHODS) == TOKEN_REDUCTIONS
    assert all(hasattr(models, name) for name in models.__all__)


@pytest.mark.parametrize("model_type", SIZES)
def test_the_number_of_parameters_is_the_published_one(model_type):
    with torch.device("meta"):
        model = build_model(model_type)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == SIZES[model_type]


@pytest.mark.parametrize("model_type", VITS)
def test_every_vit_maps_images_to_logits(model_type):
    img_size = 42 if model_type == "ViT-H_14" else 64
    with torch.device("meta"):
        model = build_model(model_type, img_size, num_classes=7)
        assert model(torch.zeros(2, 3, img_size, img_size)).shape == (2, 7)


@pytest.mark.parametrize(
    "model_type, keywords",
    [
        ("ViT-Nano_4", {}),
        ("ViT-Nano_4", {"token_reduction": "facility", "keep_tokens": 4, "reduction_layer": 1}),
        ("ViT-Nano_4", {"token_reduction": "tome", "keep_tokens": 4, "reduction_layer": 1}),
        ("ViT-Nano_4", {"token_reduction": "tome", "tome_r": 9}),
        ("ViT-Nano_4", {"token_reduction": "random", "keep_tokens": 4, "reduction_layer": 1}),
        ("ViT-Nano_4", {"norm_type": "BN"}),
        ("R26-ViT-Mini_4", {}),
        ("Conformer-Mini_4", {}),
        ("ResNet-Mini_Params", {}),
    ],
)
def test_evaluation_accepts_a_batch_without_images(model_type, keywords):
    """All images of a batch may be unreadable."""
    model = random_model(model_type, 32, 7, **keywords)
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 7)


def test_the_flops_of_vit_b_16_and_the_hybrid_are_known():
    for model_type, gflops in (("ViT-B_16", 35.13), ("R50-ViT-B_16", 43.0)):
        with torch.device("meta"):
            model = build_model(model_type)
        assert count_flops(model, 224) / 1e9 == pytest.approx(gflops, rel=0.003)


def test_the_published_spelling_of_hybrids_is_known():
    with torch.device("meta"):
        assert build_model("R50+ViT-B_16").config == build_model("R50-ViT-B_16").config


def test_the_dropout_rates_are_those_of_the_published_configs():
    with torch.device("meta"):
        rates = {name: build_model(name).config.dropout_rate for name in VITS}
        assert build_model("ViT-B_16", dropout_rate=0.3).blocks[0].mlp.drop1.rate == 0.3
    with_dropout = {"ViT-L_16", "ViT-H_14", "R50-ViT-B_16", "R50-ViT-L_32"}
    assert rates == {name: 0.1 if name in with_dropout else 0.0 for name in VITS}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_model("ViT-B16"), "unknown model type 'ViT-B16'; did you mean ViT-B_16"),
        (lambda: build_model("ViT-B_16", img_size=225), "225 is not a multiple of the model's patch size 16"),
        (lambda: build_model("R50-ViT-B_16", img_size=200), "200 is not a multiple of the model's patch size 16"),
        (lambda: build_model("ViT-B_16", norm_type="XN"), "unknown norm type 'XN'"),
        (lambda: build_model("ViT-B_16", depth=3), "ViT-B_16 has no field 'depth'; it has .*num_layers"),
        (lambda: build_model("ViT-B_16", num_layers="3"), "num_layers has values of the type int like 12, not '3'"),
        (lambda: build_model("ViT-B_16", gelu="quick"), "gelu is tanh or exact, not 'quick'"),
        (lambda: build_model("ViT-B_16", num_heads=5), "hidden_size 768 is not a multiple of num_heads 5"),
        (lambda: build_model("ViT-B_16", num_layers=0), "num_layers is greater than 0, not 0"),
        (lambda: build_model("R50-ViT-B_16", resnet_layers=(3, -1)), r"resnet_layers is greater than 0, not \(3, -1\)"),
        (lambda: build_model("ViT-B_16", dropout_rate=1.0), "dropout_rate is at least 0 and less than 1, not 1.0"),
    ],
)
def test_wrong_arguments_are_named_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rate_may_be_an_integer():
    assert build_model("ViT-L_16", 16, num_layers=1, dropout_rate=0).pos_drop.rate == 0


def test_the_fields_that_libraries_set_differently_reach_the_layers():
    """Against the formulas of PyTorch: GELU, and the epsilons of LayerNorm, GroupNorm and weight standardisation."""
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for gelu, approximate in (("exact", "none"), ("tanh", "tanh")):
        mlp = build_model("ViT-Mini_4", 8, gelu=gelu, num_layers=1).blocks[0].mlp
        expected = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x), approximate=approximate))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
    fields = {"standardisation": "var", "standardisation_eps": 0.3, "group_norm_eps": 0.2, "layer_norm_eps": 0.1}
    hybrid = build_model("R26-ViT-Mini_4", 8, num_layers=1, **fields)
    assert {norm.eps for norm in hybrid.modules() if isinstance(norm, torch.nn.LayerNorm)} == {0.1}
    assert {norm.eps for norm in hybrid.modules() if isinstance(norm, torch.nn.GroupNorm)} == {0.2}
    del fields["layer_norm_eps"]
    for model in (hybrid, build_model("ResNet-Mini_Flops", **fields), build_model("Conformer-Mini_4", 32, **fields)):
        for conv in (module for module in model.modules() if isinstance(module, StdConv2d)):
            kernels = conv.weight - conv.weight.mean(dim=(1, 2, 3), keepdim=True)
            expected = kernels / (kernels.var(dim=(1, 2, 3), keepdim=True, correction=0) + 0.3).sqrt()
            torch.testing.assert_close(conv.standardise(conv.weight, conv.eps), expected)
