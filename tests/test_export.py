"""export.py: what is written loads in its own library, with the same logits, or is refused by name."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import evaluate
import export
from helpers import random_model, read_config, succeed, write_images, write_run
from inference import CHECK_IMAGES, SavedModel, flags_of_checkpoint
from models.configs import format_fields
from models.formats import exports
from models.formats.onnx import Plain
from synthetic import with_random_state
from test_formats import RESNET_BOUND, VIT_BOUND, timm_model
from utils.data.augmentation import mean_and_std
from utils.data.images import centre_crop, images_of
from utils.errors import UserError
from utils.exports import compare
from utils.flag_groups import token_reduction_of
from utils.records.weights import save_weights

CLASSES = ("cat", "dog", "emu", "fox", "gnu")
SMALL = {"num_layers": 1}
REDUCED = {"token_reduction": "tome", "keep_tokens": 8, "reduction_layer": 1, "fields": {"num_layers": 2}}


def write_checkpoint(folder, model_type="ViT-Mini_4", img_size=16, norm_type="LN", fields=SMALL, **flags):
    """The weights of a run with random weights; `fields` are those of its config, `flags` its other flags."""
    written = {"model_type": model_type, "img_size": img_size, "dataset": "digits", "norm_type": norm_type, **flags}
    written["model_fields"] = format_fields(fields)
    _, path = write_run(folder, written, CLASSES, **fields, **token_reduction_of(flags))
    return path


def relative_difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def logits_of(saved, batch=3):
    """(images, logits of a SavedModel)"""
    size = saved.img_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, saved.model(images)


# timm and Hugging Face

VITS_TO_EXPORT = [
    {},
    {"fields": {**SMALL, "gelu": "exact"}, "mean_std": "imagenet", "dataset": "imagenet"},
    {"fields": {"hidden_size": 48, "mlp_dim": 80, "num_heads": 2, "num_layers": 1}, "mean_std": "0.1,0.2,0.3,0.4,1,2"},
    {"model_type": "ViT-Ti_16", "img_size": 224, "fields": {"num_layers": 1}},
    {"model_type": "ViT-B_32", "img_size": 64, "fields": {"num_layers": 1}},
]


@pytest.mark.parametrize("options", VITS_TO_EXPORT, ids=range(len(VITS_TO_EXPORT)))
@pytest.mark.parametrize("target", ["timm", "hf"])
def test_vit(target, options, tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **options))
    report = saved.export(target, tmp_path / "out")
    images, expected = logits_of(saved)
    with torch.no_grad():
        if target == "timm":
            theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
            found, names = theirs(images), theirs.pretrained_cfg["label_names"]
            prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
        else:
            theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
            found, names = theirs(images).logits, [theirs.config.id2label[number] for number in range(len(CLASSES))]
            processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
            prepare = lambda image: processor(image, return_tensors="pt").pixel_values[0]  # noqa: E731
    assert relative_difference(found, expected) < VIT_BOUND
    assert tuple(names) == CLASSES
    assert report["largest_relative_difference"] < VIT_BOUND
    assert report["same_class"] == report["images"] == 10
    (path,) = write_images(tmp_path / "noise", [(72, 96)])  # of a crop's odd margins, libraries round either
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        prepared = prepare(image)
    ours = saved.prepare(pixels)[0]
    assert prepared.shape == ours.shape
    assert (prepared - ours).abs().mean() < 0.01 * ours.std()


def export_of_timm(name, folder, **sizes):
    """The SavedModel of timm's model with random weights, which timm's rules are recorded for."""
    folder.mkdir()
    save_file(timm_model(name, **sizes).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, "label_names": CLASSES}))
    return SavedModel.load(folder, img_size=64)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}),
        pytest.param("vit_small_r26_s32_224", {"img_size": 64, "depth": 1}, marks=pytest.mark.slow),
        pytest.param("vit_base_r50_s16_224", {"img_size": 64, "depth": 1}, marks=pytest.mark.slow),
        pytest.param("vit_large_r50_s32_224", {"img_size": 64, "depth": 1}, marks=pytest.mark.slow),
        ("resnetv2_50x1_bit", {}),
        pytest.param("resnetv2_101x1_bit", {}, marks=pytest.mark.slow),
    ],
)
def test_hybrid_and_bit_with_timms_rules(name, sizes, tmp_path):
    saved = export_of_timm(name, tmp_path / "in", **sizes)
    report = saved.export("timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images, expected = logits_of(saved)
    with torch.no_grad():
        assert relative_difference(theirs(images), expected) < RESNET_BOUND
    assert report["bound"] == RESNET_BOUND
    assert theirs.pretrained_cfg["architecture"].startswith(name.rpartition("_")[0][:10])


def test_published_resnets_have_timms_architectures():
    """timm's own rule, from its names, gives the widths and units."""
    for (units, width), name in exports.timm.RESNETS.items():
        with torch.device("meta"):
            theirs = timm.create_model(name)
        assert tuple(len(stage.blocks) for stage in theirs.stages) == units
        assert theirs.stem.conv.out_channels == width


@pytest.mark.parametrize("cut", [{}, {"resnet_layers": (1, 2), "stage_widths": (256, 96), "num_groups": 8}])
def test_bit_of_hugging_face(cut, tmp_path):
    fields = {"standardisation_eps": 1e-8, "resnet_layers": (1, 1, 1, 1), **cut}
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", "BiT-M-R50x1", 64, fields=fields))
    saved.export("hf", tmp_path / "out")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images, expected = logits_of(saved)
    with torch.no_grad():
        assert relative_difference(theirs(images).logits, expected) < RESNET_BOUND


BIT = {"resnet_layers": (1, 1), "stage_widths": (256, 512)}
STANDARD = {"standardisation": "var", "standardisation_eps": 1e-8, "group_norm_eps": 1e-5}
REFUSED = [
    ("timm", {"norm_type": "BN"}, "timm has no model with the norm BN of tokens; export it to onnx or npz"),
    ("timm", {"norm_type": "GN"}, "the norm GN of tokens"),
    ("timm", {"norm_type": "Rescale"}, "the norm Rescale of tokens"),
    ("timm", {"model_type": "Conformer-Mini_4", "fields": {}}, "a Conformer's CNN"),
    ("timm", REDUCED, "a token reduction"),
    ("timm", {"fields": {**SMALL, "layer_norm_eps": 1e-12}}, "have layer_norm_eps 1e-06, this model has 1e-12"),
    ("timm", {"model_type": "R26-ViT-S_32", "img_size": 32, "fields": {"num_layers": 1}}, "hybrids have .*standardisa"),
    ("timm", {"model_type": "R26-ViT-Mini_4", "fields": {"num_layers": 1, **STANDARD}}, "hybrids have root_width 64"),
    (
        "timm",
        {"model_type": "R26-ViT-S_32", "img_size": 16, "fields": {"num_layers": 1, "resnet_layers": (1,), **STANDARD}},
        r"timm has no architecture with \(1,\) units",
    ),
    ("timm", {"model_type": "BiT-M-R50x1", "fields": BIT}, "BiTs have standardisation_eps 1e-08, this model has 1e-10"),
    ("timm", {"model_type": "BiT-M-R50x1", "fields": {**BIT, "standardisation_eps": 1e-8}}, "no architecture with"),
    ("timm", {"model_type": "ResNet-Mini_Flops", "fields": {}}, "timm's BiTs have root_stride 4, this model has 1"),
    ("hf", {"norm_type": "BN"}, "transformers has no model with the norm BN of tokens; export it to onnx or npz"),
    ("hf", {"norm_type": "GN"}, "the norm GN of tokens"),
    ("hf", {"norm_type": "Rescale"}, "the norm Rescale of tokens"),
    ("hf", {"model_type": "Conformer-Mini_4", "fields": {}}, "a Conformer's CNN"),
    ("hf", REDUCED, "a token reduction"),
    ("hf", {"model_type": "R26-ViT-Mini_4", "fields": {"num_layers": 1}}, "ViT has no ResNet stem"),
    ("hf", {"model_type": "BiT-M-R50x1", "fields": BIT}, "BiTs have standardisation_eps 1e-08, this model has 1e-10"),
    ("hf", {"model_type": "ResNet-Mini_Flops", "fields": {}}, "BiTs have root_stride 4, this model has 1"),
    (
        "hf",
        {
            "model_type": "BiT-M-R50x1",
            "fields": {**BIT, "stage_widths": (256, 336), "num_groups": 4, "standardisation_eps": 1e-8},
        },
        "multiples of 32 channels, this model has 336",
    ),
]


@pytest.mark.parametrize("target, options, message", REFUSED)
def test_what_a_library_lacks_is_refused_by_name(target, options, message, tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **options))
    with pytest.raises(UserError, match=message):
        saved.export(target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_pre_logits_are_refused(target, tmp_path):
    arrays = random_model("ViT-Mini_4", 16, 3, num_layers=1).export_npz()
    arrays |= {"pre_logits/kernel": np.eye(128, dtype=np.float32), "pre_logits/bias": np.zeros(128, np.float32)}
    np.savez(tmp_path / "ViT-Mini_4.npz", **arrays)
    saved = SavedModel.load(tmp_path / "ViT-Mini_4.npz", given={"model_fields": ["num_layers=1"]})
    with pytest.raises(UserError, match="the layer pre_logits before the head"):
        saved.export(target, tmp_path / "out")
    assert saved.export("npz", tmp_path / "again.npz")["largest_relative_difference"] == 0


def test_the_flags_that_a_refusal_names_are_accepted(tmp_path):
    """They replace Google's rule by that of the library."""
    fields = {"num_layers": 1}
    path = write_checkpoint(tmp_path / "run", "R-ViT-Ti_16", 32, fields=fields)
    with pytest.raises(UserError) as refused:
        SavedModel.load(path).export("timm", tmp_path / "out")
    flags = str(refused.value).partition("--model_fields ")[2].split()
    assert sorted(flags) == ["group_norm_eps=1e-05", "standardisation=var", "standardisation_eps=1e-08"]
    saved = SavedModel.load(path, given={"model_fields": flags})
    assert saved.export("timm", tmp_path / "out")["largest_relative_difference"] < RESNET_BOUND


# What is checked and what is left


def changed_by(target, monkeypatch, change):
    """Let the library's logits of a target be changed by a function."""
    load = exports.TARGETS[target].load

    def load_changed(path, model):
        loaded = load(path, model)
        return loaded._replace(run=lambda images: [change(loaded.run(images)[0]), *loaded.run(images)[1:]])

    monkeypatch.setitem(exports.TARGETS, target, exports.TARGETS[target]._replace(load=load_changed))


PATHS = {"npz": "model.npz", "timm": "out", "hf": "out", "onnx": "model.onnx"}


@pytest.mark.parametrize("target, factor", [*((target, 1.001) for target in PATHS), ("npz", math.nan)])
def test_other_logits_are_an_error_and_leave_no_file(target, factor, tmp_path, monkeypatch):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    changed_by(target, monkeypatch, lambda logits: factor * logits)
    with pytest.raises(UserError, match="nothing is written: the logits of .* differ by (1.0e-03|nan)"):
        saved.export(target, tmp_path / PATHS[target])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_its_library_can_not_load_is_an_error_of_one_line(tmp_path, main_fails, monkeypatch):
    def load(path, model):
        raise RuntimeError("sizes do not match:\n  head.weight")

    monkeypatch.setitem(exports.TARGETS, "timm", exports.TARGETS["timm"]._replace(load=load))
    flags = ["--checkpoint", write_checkpoint(tmp_path / "run"), "--to", "timm", "--output", tmp_path / "out"]
    message = f"nothing is written: timm {timm.__version__} can't load it: sizes do not match: head.weight"
    assert message in main_fails(export, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("target", PATHS)
def test_an_output_is_replaced_only_if_asked_for(target, tmp_path):
    path = tmp_path / PATHS[target]
    first, second = (SavedModel.load(write_checkpoint(tmp_path / name, mean_std=m)) for name, m in RUNS)
    first.export(target, path)
    before = contents_of(tmp_path)
    with pytest.raises(UserError, match="exists; add --overwrite to replace it"):
        second.export(target, path)
    assert contents_of(tmp_path) == before
    second.model.head.bias.data.add_(1)
    second.export(target, path, overwrite=True)
    after = contents_of(tmp_path)
    assert after.keys() == before.keys()
    assert [file for file in before if before[file] != after[file]]


RUNS = [("a", "half"), ("b", "imagenet")]


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_happens_to_a_failed_replacement(tmp_path, monkeypatch):
    """The earlier export stays as it was."""
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    saved.export("timm", tmp_path / "out")
    before = contents_of(tmp_path)
    changed_by("timm", monkeypatch, torch.neg)
    with pytest.raises(UserError, match="nothing is written"):
        saved.export("timm", tmp_path / "out", overwrite=True)
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("target, missing", [("timm", "timm"), ("hf", "transformers"), ("onnx", "onnxruntime")])
def test_without_the_library_the_result_is_not_checked(target, missing, tmp_path, monkeypatch):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, missing, None)
    report = saved.export(target, tmp_path / PATHS[target])
    text = export.export_text(report)
    assert f"is written but not checked: {missing} is missing: pip install {report_packages(target)}" in text
    assert (tmp_path / PATHS[target]).exists()


def report_packages(target):
    return " ".join(exports.TARGETS[target].packages)


def test_without_onnxscript_nothing_is_written(tmp_path, monkeypatch):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    monkeypatch.delitem(sys.modules, "models.formats.onnx_operators", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript is missing: pip install onnx onnxscript onnxruntime"):
        saved.export("onnx", tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_images_on_which_other_tokens_are_chosen_are_counted(tmp_path):
    """Their logits are not compared; if there are no others, it is an error."""
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **REDUCED))
    saved.export("npz", tmp_path / "model.npz")
    images = images_of([CHECK_IMAGES])

    def report(rows):
        """The comparison with what chooses other tokens for these images of each batch of 8."""

        def load(path, model):
            def run(images):
                logits, kept, clusters = Plain(model)(images)
                logits[rows], kept[rows, -1] = 0, 0
                return logits, kept, clusters

            return exports.Loaded(run)

        return compare(exports.TARGETS["npz"]._replace(load=load), saved, tmp_path / "model.npz", images)

    found = report([0])
    assert (found["other_tokens_chosen"], found["largest_relative_difference"]) == (2, 0)
    assert "other tokens chosen on 2, whose" in export.export_text({"output": "x", "usage": "y", **found})
    with pytest.raises(UserError, match="on none of the 10 images were the same tokens chosen"):
        report(slice(None))


# Round trips


def as_run(folder, saved, checkpoint):
    """The run folder with these weights, written as by train.py: its flags come from the checkpoint."""
    flags, _ = flags_of_checkpoint(checkpoint, {})
    folder.mkdir()
    flags = {**flags, "img_size": saved.img_size, "dataset": "digits", "name": folder.name}
    save_weights(folder / "best.safetensors", saved.model.state_dict(), 1, model_type=flags["model_type"])
    (folder / "config.json").write_text(json.dumps({"flags": flags, "classes": saved.classes}))
    return SavedModel.load(folder / "best.safetensors")


@pytest.mark.parametrize("fields", [SMALL, {**SMALL, "gelu": "exact", "num_heads": 2}], ids=["google", "exact"])
def test_round_trip_through_all_libraries(fields, tmp_path):
    """.npz -> run -> timm -> run -> Hugging Face -> run -> .npz is the same array for array."""
    given = {"model_fields": format_fields(fields)}
    np.savez(tmp_path / "ViT-Mini_4.npz", **random_model("ViT-Mini_4", 16, 5, **fields).export_npz())
    saved = SavedModel.load(tmp_path / "ViT-Mini_4.npz", given=given)
    path = write_checkpoint(tmp_path / "first", fields=fields, mean_std="imagenet")
    save_weights(path, saved.model.state_dict(), 1)
    saved = SavedModel.load(path)
    for target in ("timm", "hf"):
        saved.export(target, tmp_path / target)
        saved = as_run(tmp_path / f"run-{target}", SavedModel.load(tmp_path / target), tmp_path / target)
    saved.export("npz", tmp_path / "ViT-Mini_4-last.npz")
    assert (tuple(saved.classes), saved.mean_std, saved.img_size) == (CLASSES, "imagenet", 16)
    assert {name: saved.model.config[name] for name in fields} == fields
    with np.load(tmp_path / "ViT-Mini_4.npz") as first, np.load(tmp_path / "ViT-Mini_4-last.npz") as last:
        assert list(first) == list(last)
        assert all(np.array_equal(first[key], last[key]) for key in first)


@pytest.mark.slow  # a BiT of full width
def test_round_trip_of_bit(tmp_path):
    """timm -> run -> Hugging Face -> run -> timm: the weights are the same bits."""
    saved = export_of_timm("resnetv2_50x1_bit", tmp_path / "in")
    before = saved.model.state_dict()
    saved = as_run(tmp_path / "run", saved, tmp_path / "in")
    saved.export("hf", tmp_path / "hf")
    saved = as_run(tmp_path / "run2", SavedModel.load(tmp_path / "hf", img_size=64), tmp_path / "hf")
    saved.export("timm", tmp_path / "timm")
    after = SavedModel.load(tmp_path / "timm").model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tuple(saved.classes) == CLASSES


@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
def test_npz_has_all_arrays(norm_type, tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", norm_type=norm_type))
    with_random_state(saved.model)
    report = saved.export("npz", tmp_path / "model.npz")
    assert report["largest_relative_difference"] == 0
    with np.load(tmp_path / "model.npz") as arrays:
        assert all(np.array_equal(arrays[key], array) for key, array in saved.model.export_npz().items())


# The script


@pytest.mark.parametrize("target", PATHS)
def test_script(target, tmp_path, tiny_flags, run_main):
    """From a run of train.py to another library; the last line of the output says how to load the result."""
    import train

    run_main(train, *tiny_flags("--num_steps", 2, "--eval_every", 2))
    path = tmp_path / "output" / "run" / "best.safetensors"
    out = tmp_path / PATHS[target]
    flags = ["--checkpoint", path, "--to", target, "--output", out]
    printed = succeed("export.py", *flags) if target == "npz" else run_main(export, *flags)
    assert printed.startswith(f"{out} is written, and checked with ")
    assert "same class for 10 of 10" in printed
    if target == "onnx":
        return
    report = json.loads(run_main(export, *flags, "--overwrite", "--json"))
    assert report["output"] == str(out)
    assert report["largest_relative_difference"] < report["bound"]
    config = read_config(path.parent)
    assert SavedModel.load(out).classes == config["classes"]


@pytest.mark.parametrize(
    "options",
    [
        {**REDUCED, "fields": {"num_layers": 2, "gelu": "exact"}, "mean_std": "imagenet"},
        {"fields": {**SMALL, "patch_size": 8}, "norm_type": "BN"},
        {"norm_type": "Rescale"},
        {"model_type": "Conformer-Mini_4", "fields": {"cnn_units": 1}},
        {"model_type": "ResNet-Mini_Flops", "fields": {"resnet_layers": (1, 1, 1)}},
    ],
)
def test_an_npz_is_loaded_with_what_its_description_says(options, tmp_path, monkeypatch):
    """By the command that the report names."""
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **options))
    usage = saved.export("npz", tmp_path / "model.npz")["usage"]
    monkeypatch.setattr(sys, "argv", usage.split())
    args = evaluate.parse_flags()
    reduction = token_reduction_of({}, vars(args))
    loaded = SavedModel.load(args.checkpoint, args.model_type, None, False, reduction, vars(args))
    assert mean_and_std(loaded.mean_std) == mean_and_std(saved.mean_std)
    assert (loaded.classes, loaded.img_size, loaded.crops) == (saved.classes, saved.img_size, saved.crops)
    images, expected = logits_of(saved)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), expected)


def test_float16_halves_an_npz(tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    saved.export("npz", tmp_path / "whole.npz")
    report = saved.export("npz-float16", tmp_path / "half.npz")
    assert 1e-5 < report["largest_relative_difference"] < 1e-2
    with np.load(tmp_path / "half.npz") as half, np.load(tmp_path / "whole.npz") as whole:
        assert half.files == whole.files
        assert all(np.array_equal(half[key], whole[key].astype(np.float16)) for key in half.files)
    assert SavedModel.load(tmp_path / "half.npz").classes == saved.classes


def test_an_npz_of_a_run_that_crops_is_loaded_as_one(tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", dataset="imagenet"))
    saved.export("npz", tmp_path / "model.npz")
    loaded = SavedModel.load(tmp_path / "model.npz")
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    assert loaded.resize is centre_crop and torch.equal(loaded.prepare(image), saved.prepare(image))


def test_given_flags_replace_those_of_an_npz_description(tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **REDUCED))
    saved.export("npz", tmp_path / "model.npz")
    given = {"mean_std": "imagenet", "gelu": "exact"}
    loaded = SavedModel.load(tmp_path / "model.npz", token_reduction={"token_reduction": "none"}, given=given)
    assert (loaded.mean_std, loaded.model.config.gelu, loaded.model.reduction) == ("imagenet", "exact", None)
    assert loaded.model.config.num_layers == saved.model.config.num_layers
    assert SavedModel.load(tmp_path / "model.npz", img_size=32).img_size == 32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content["classes"].pop(), "model.json names 4 classes, but"),
        (lambda content: content.pop("preprocessing"), "model.json does not describe an exported model"),
        (lambda content: content.update(model_type="ViT-X"), "unknown model type 'ViT-X'"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(change, message, tmp_path):
    SavedModel.load(write_checkpoint(tmp_path / "run")).export("npz", tmp_path / "model.npz")
    content = json.loads((tmp_path / "model.json").read_text())
    change(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        SavedModel.load(tmp_path / "model.npz")


def test_mistakes_of_a_user(tmp_path, main_fails):
    path = write_checkpoint(tmp_path / "run")
    flags = ["--checkpoint", path, "--output", tmp_path / "out", "--to"]
    assert "best.safetensors does not exist" in main_fails(
        export, "--checkpoint", tmp_path / "best.safetensors", "--to", "timm", "--output", tmp_path / "out"
    )
    assert "unknown target 'onx'; did you mean onnx?" in main_fails(export, *flags, "onx")
    assert "whose name ends with .onnx" in main_fails(export, *flags, "onnx")
    assert "nowhere is not a folder that exists" in main_fails(export, *flags, "hf", "--output", tmp_path / "nowhere/x")
    assert "missing.png does not exist" in main_fails(export, *flags, "hf", "--images", tmp_path / "missing.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    assert "out exists; add --overwrite to replace it" in main_fails(export, *flags, "timm")
    message = main_fails(export, *flags, "timm", "--output", path.parent, "--overwrite")
    assert "run holds other files, such as best.safetensors; name a folder of its own" in message
    (tmp_path / "file").write_text("mine")
    assert "file is a file; this target is a folder" in main_fails(export, *flags, "hf", "--output", tmp_path / "file")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"


def test_a_checkpoint_without_a_head_is_refused(tmp_path, main_fails):
    state = timm_model("vit_tiny_patch16_224", 32, depth=1).state_dict()
    torch.save({name: each for name, each in state.items() if not name.startswith("head.")}, tmp_path / "dino.pth")
    flags = ["--checkpoint", tmp_path / "dino.pth", "--to", "timm", "--output", tmp_path / "out"]
    assert "has no head, so it can't classify" in main_fails(export, *flags)
    with pytest.raises(UserError, match="has no head"):
        SavedModel.load(tmp_path / "dino.pth").export("timm", tmp_path / "out")
