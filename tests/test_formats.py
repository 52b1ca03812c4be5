"""Checkpoints of other libraries: the logits are those of the library that made the weights."""

import argparse
import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from helpers import random_model
from inference import SavedModel
from models import CheckpointError, build_model
from models.formats import identify, vit_pytorch
from models.formats import timm as timm_format
from models.formats import transformers as transformers_format
from models.formats.names import to_ours, to_theirs
from utils.checkpoint_files import CheckpointFile
from utils.errors import UserError

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80}
VIT_BOUND, RESNET_BOUND = 5e-6, 5e-5


@torch.no_grad()
def with_random_weights(model):
    """The model in evaluation mode; its weights are random and of the usual magnitudes."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 and "pos" not in name and "token" not in name else 0.2
        mean = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
        tensor.copy_(mean + scale * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def difference(path, theirs, size, **keywords):
    """The relative difference between the logits of the file's SavedModel and those of the library's model."""
    saved = SavedModel.load(path, **keywords)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs(images)
    expected = getattr(expected, "logits", expected)
    return ((saved.model(images) - expected).norm() / expected.norm()).item()


def timm_model(name, img_size=None, **options):
    sizes = {} if name.startswith("resnetv2") else {"img_size": img_size}
    return with_random_weights(timm.create_model(name, num_classes=5, **sizes, **options))


@pytest.mark.parametrize(
    "name, img_size, options, model_type",
    [
        ("vit_tiny_patch16_224", 224, {"depth": 2}, "ViT-Ti_16"),
        ("vit_tiny_patch16_224", 96, {"depth": 2}, "ViT-Ti_16"),
        ("vit_small_patch8_224", 32, {"depth": 1}, "ViT-S_16"),
        ("vit_base_patch32_224", 224, {"depth": 1}, "ViT-B_32"),
        ("vit_huge_patch14_224", 56, {"depth": 1}, "ViT-H_14"),
        ("flexivit_small", 96, {"depth": 1, "patch_size": 16}, "ViT-S_16"),  # without a position of the class token
    ],
)
def test_vit_of_timm(name, img_size, options, model_type, tmp_path, capsys):
    theirs = timm_model(name, img_size, **options)
    save_file(theirs.state_dict(), tmp_path / "weights.bin")  # what a file is does not follow from its name
    assert difference(tmp_path / "weights.bin", theirs, img_size) < VIT_BOUND
    note = capsys.readouterr().err
    assert f"weights of timm, --model_type {model_type} " in note
    assert "does not say gelu, mean_std, num_heads" in note


@pytest.mark.parametrize(
    "name, img_size",
    [
        ("vit_tiny_r_s16_p8_224", 224),
        ("vit_tiny_r_s16_p8_224", 96),
        ("vit_small_r26_s32_224", 64),
        pytest.param("vit_small_r26_s32_224", 224, marks=pytest.mark.slow),
        pytest.param("vit_base_r50_s16_224", 96, marks=pytest.mark.slow),
    ],
)
def test_hybrid_of_timm(name, img_size, tmp_path):
    theirs = timm_model(name, img_size, depth=1)
    torch.save(theirs.state_dict(), tmp_path / "weights.safetensors")
    assert difference(tmp_path / "weights.safetensors", theirs, img_size) < RESNET_BOUND


@pytest.mark.parametrize("img_size", [224, 97])
def test_bit_of_timm(img_size, tmp_path):
    theirs = timm_model("resnetv2_50x1_bit", channels=(128, 256, 512, 1024))
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    assert difference(tmp_path / "weights.pth", theirs, img_size, img_size=img_size) < RESNET_BOUND


def test_config_of_timm_decides_what_the_weights_do_not_show(tmp_path, capsys):
    theirs = timm_model("vit_tiny_patch16_224", 32, depth=1, num_heads=4, act_layer="gelu_tanh")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "global_pool": "token",
        "label_names": ["a", "b", "c", "d", "e"],
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "model_args": {"num_heads": 4, "act_layer": "gelu_tanh"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(tmp_path, theirs, 32) < VIT_BOUND
    saved = SavedModel.load(tmp_path)
    assert (saved.classes, saved.mean_std, saved.img_size) == (["a", "b", "c", "d", "e"], "imagenet", 32)
    assert "does not say" not in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    for given in ({"gelu": "tanh"}, {"model_fields": ["gelu=tanh"]}):
        given = {**given, "model_fields": [*given.get("model_fields", []), "num_heads=4"], "mean_std": "imagenet"}
        assert difference(tmp_path, theirs, 32, given=given) < VIT_BOUND
    assert difference(tmp_path, theirs, 32) > 1e-3  # with the usual GELU and number of heads


@pytest.mark.parametrize("later", [False, True], ids=["transformers-4", "transformers-5"])
@pytest.mark.parametrize("img_size, patch_size, activation, eps", [(224, 32, "gelu", 1e-12), (40, 8, "gelu_new", 1e-3)])
def test_vit_of_transformers(img_size, patch_size, activation, eps, later, tmp_path):
    config = transformers.ViTConfig(
        **VIT,
        image_size=img_size,
        patch_size=patch_size,
        hidden_act=activation,
        layer_norm_eps=eps,
        id2label={0: "cat", 1: "dog", 2: "emu"},
    )
    theirs = with_random_weights(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if later:  # the names of the modules
        torch.save(theirs.state_dict(), tmp_path / "weights.bin")
        path = tmp_path / "weights.bin"
    processor = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert difference(path, theirs, img_size) < VIT_BOUND
    saved = SavedModel.load(path)
    assert (saved.classes, saved.mean_std) == (["cat", "dog", "emu"], "0.1,0.2,0.3,0.4,0.5,0.6")


def test_vit_model_of_transformers_has_no_head(tmp_path):
    config = transformers.ViTConfig(**VIT, image_size=32, patch_size=8)
    theirs = with_random_weights(transformers.ViTModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    saved = SavedModel.load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = saved.model.encode(images)
        torch.testing.assert_close(saved.model.norm(tokens), theirs(images).last_hidden_state)
    assert saved.classes == ["no head"]


@pytest.mark.parametrize("img_size", [224, 97])
def test_bit_of_transformers(img_size, tmp_path):
    config = transformers.BitConfig(depths=[1, 2, 1], hidden_sizes=[128, 256, 512], embedding_size=32, num_labels=4)
    theirs = with_random_weights(transformers.BitForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    assert difference(tmp_path, theirs, img_size, img_size=img_size) < RESNET_BOUND


@pytest.mark.parametrize("entry, mean_std", [("model", "imagenet"), ("teacher", "imagenet"), (None, "half")])
def test_deit_and_dino_have_the_names_of_timm(entry, mean_std, tmp_path):
    """DINO's full checkpoint has wrapped names and a projection head; DeiT's and DINO's hold a Namespace."""
    theirs = timm_model("vit_tiny_patch16_224", 32, depth=1)
    state = theirs.state_dict()
    if entry == "teacher":
        state = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
        state |= {"module.head.mlp.0.weight": torch.randn(4, 4), "module.head.last_layer.weight_g": torch.randn(4, 1)}
    content = {entry: state, "args": argparse.Namespace(lr=0.1), "epoch": 3} if entry else state
    torch.save(content, tmp_path / "checkpoint.pth")
    assert difference(tmp_path / "checkpoint.pth", theirs, 32) < VIT_BOUND
    assert SavedModel.load(tmp_path / "checkpoint.pth").mean_std == mean_std


def test_backbone_of_dino_without_a_head(tmp_path, capsys):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "dino.pth")
    assert SavedModel.load(tmp_path / "dino.pth").mean_std == "imagenet"
    assert "weights of timm or DINO" in capsys.readouterr().err


def test_vit_pytorch(tmp_path):
    theirs = timm_model("vit_tiny_patch16_224", 32, depth=2)  # the same function: exact GELU, epsilon 1e-6
    state = to_theirs(theirs.state_dict(), vit_pytorch.NAMES)
    assert "transformer.encoder.layer.1.attn.query.weight" in state
    assert {"head.weight", "transformer.encoder.encoder_norm.bias"} < state.keys()
    torch.save(state, tmp_path / "weights.bin")
    assert difference(tmp_path / "weights.bin", theirs, 32) < VIT_BOUND


@pytest.mark.parametrize(
    "names, model_type, options",
    [
        (transformers_format.VIT_NAMES, "ViT-Nano_4", {}),
        (vit_pytorch.NAMES, "ViT-Nano_4", {}),
        (transformers_format.BIT_NAMES, "BiT-M-R50x1", {"resnet_layers": (2, 1), "stage_widths": (128, 256)}),
        (timm_format.NAMES, "R26-ViT-Mini_4", {}),
    ],
)
def test_tables_of_names_are_read_both_ways(names, model_type, options):
    state = random_model(model_type, 32, **options).state_dict()
    theirs = to_theirs(state, names)
    assert any(name not in state for name in theirs)
    back = to_ours(theirs, names)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


REFUSED = [
    ("vit_small_patch14_dinov2", "DINOv2 has LayerScale, which this model does not have"),
    ("vit_small_patch14_reg4_dinov2", "register tokens|LayerScale"),
    ("deit_tiny_distilled_patch16_224", "has a distillation token"),
    ("vit_tiny_patch16_224/qkv_bias=False", "queries, keys and values without bias"),
    ("vit_tiny_patch16_224/qk_norm=True", "a norm of queries and keys"),
    ("vit_tiny_patch16_224/pre_norm=True", "a norm before its first block"),
    ("vit_tiny_patch16_224/global_pool=avg", "a head that reads the mean of the patches"),
    ("vit_medium_patch16_gap_240", "LayerScale|mean of the patches|no class token"),
    ("vit_base_patch16_siglip_224", "attention pooling"),
    ("vit_relpos_small_patch16_224", "relative position bias|LayerScale"),
    ("beitv2_base_patch16_224", "LayerScale|relative position bias"),
    ("vit_base_resnet26d_224", "batch normalisation"),
    ("vit_base_mci_224", "batch normalisation|deep stem"),
    ("resnetv2_50d_gn", "a deep stem"),
    ("resnetv2_50", "batch normalisation"),
    ("resnet18", "its format is unknown"),
    ("swin_tiny_patch4_window7_224", "relative position bias|its format is unknown"),
]


@pytest.mark.parametrize("name, message", REFUSED, ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_is_refused_by_name(name, message):
    name, *options = name.split("/")
    options = dict(option.split("=") for option in options)
    with torch.device("meta"):
        depth = {"depth": 1} if "swin" not in name and "resnet" not in name.split("_")[0] else {}
        model = timm.create_model(
            name, **depth, **{key: {"True": True, "False": False}.get(v, v) for key, v in options.items()}
        )
    config = {"architecture": name} if "dinov2" in name else None
    with pytest.raises(CheckpointError, match=message):
        identify(CheckpointFile(model.state_dict(), {}, config, None, None))


def test_other_models_of_transformers_are_refused_by_name():
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="DINOv2 has LayerScale, which this model does not have"):
        identify(CheckpointFile(model.state_dict(), {}, {"model_type": "dinov2"}, None, None))
    with pytest.raises(CheckpointError, match="its format is unknown .model type clip"):
        identify(CheckpointFile({"logit_scale": torch.ones(1)}, {}, {"model_type": "clip"}, None, None))
    hybrid = {"transformer.embeddings.hybrid_model.root.conv.weight": torch.ones(1)}
    names = {"transformer.embeddings.patch_embeddings.weight": torch.ones(1), **hybrid}
    with pytest.raises(CheckpointError, match="a ResNet stem with symmetric padding"):
        identify(CheckpointFile(names, {}, None, None, None))
    with pytest.raises(CheckpointError, match="hidden_act quick_gelu is not supported"):
        config = {"model_type": "vit", "hidden_act": "quick_gelu"}
        with torch.device("meta"):
            state = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).state_dict()
        identify(CheckpointFile(state, {}, config, None, None))


def test_errors_name_the_weight(tmp_path):
    state = timm_model("vit_tiny_patch16_224", 32, depth=1).state_dict()
    target = build_model("ViT-Ti_16", 32, num_layers=1)

    def load(**changed):
        tensors = {name: tensor for name, tensor in {**state, **changed}.items() if tensor is not None}
        target.load_checkpoint(CheckpointFile(tensors, {}, None, None, None))

    load()
    for changed, message in (
        ({"blocks.0.mlp.fc2.bias": None}, r"blocks.0.mlp.fc2.bias is missing, expected shape \(192,\)"),
        ({"blocks.0.extra": torch.ones(1)}, "blocks.0.extra is left over"),
        ({"norm.weight": torch.ones(3)}, r"norm.weight has shape \(3,\), expected \(192,\)"),
        ({"norm.weight": torch.ones(192, dtype=torch.int64)}, "norm.weight holds torch.int64"),
        ({"pos_embed": torch.ones(1, 7, 192)}, "are not for a square grid"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(**changed)
    with pytest.raises(CheckpointError, match="it holds a ViT"):
        build_model("ResNet-Mini_Flops").load_checkpoint(CheckpointFile(state, {}, None, None, None))
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit ViT-S_16: .*expected shape"):
        SavedModel.load(tmp_path / "weights.safetensors", "ViT-S_16")
