"""Models as ONNX graphs: ONNX Runtime computes the same logits from ordinary operators."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from helpers import ROOT, write_images
from inference import SavedModel
from models import CONFORMERS, MODEL_TYPES, NORM_TYPES, REDUCTION_METHODS, RESNETS, TOKEN_REDUCTIONS
from models.facility_location import facility_location
from models.formats import onnx as onnx_format
from test_export import CLASSES, REDUCED, logits_of, relative_difference, write_checkpoint

ONNX_BOUND = 1e-4


def slow(options):
    return pytest.param(options, marks=pytest.mark.slow)  # a graph takes seconds


ONNX = [
    *({"norm_type": norm_type} for norm_type in NORM_TYPES),
    *({**REDUCED, "token_reduction": name} for name in REDUCTION_METHODS),
    {"token_reduction": "tome", "tome_r": 5},
    {"model_type": "R26-ViT-Mini_4", "fields": {"num_layers": 1, "resnet_layers": (1, 1), "gelu": "exact"}},
    {"model_type": "ResNet-Mini_Flops", "img_size": 24, "fields": {"resnet_layers": (1, 1, 1)}},
    {"model_type": "Conformer-Mini_4", "fields": {"cnn_units": 1}},
    *(
        slow({**REDUCED, "token_reduction": name, "norm_type": norm_type, "keep_tokens": 4})
        for name in REDUCTION_METHODS
        for norm_type in NORM_TYPES
    ),
    *(
        slow(
            {"model_type": "Conformer-Mini_4", "img_size": 32, "fields": {}, "norm_type": norm, "token_reduction": name}
        )
        for name in TOKEN_REDUCTIONS
        for norm in NORM_TYPES
    ),
    *(slow({"model_type": "R26-ViT-Mini_4", "fields": {"num_layers": 2}, "norm_type": norm}) for norm in NORM_TYPES),
]


def check_onnx(saved, path):
    """Export, and compare on noise with the batch sizes 1 and 3, where the same tokens are chosen."""
    report = saved.export("onnx", path)
    assert report["largest_relative_difference"] < ONNX_BOUND
    assert report["same_class"] == report["images"] == 10
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        images, expected = logits_of(saved, batch)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        assert relative_difference(found, expected) < ONNX_BOUND
    return session


@pytest.mark.parametrize("options", ONNX, ids=lambda options: "-".join(map(str, options.values())))
def test_onnx(options, tmp_path):
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", **options))
    session = check_onnx(saved, tmp_path / "model.onnx")
    reduces = getattr(saved.model, "reduction", None) is not None
    assert [output.name for output in session.get_outputs()] == ["logits", "kept_tokens", "clusters"][: 1 + 2 * reduces]
    graph = onnx.load(tmp_path / "model.onnx")
    assert [(domain.domain, domain.version) for domain in graph.opset_import] == [("", onnx_format.OPSET)]
    assert not graph.functions
    onnx.checker.check_model(graph)
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes()  # no paths of the exporting machine


@pytest.mark.slow  # wide layers
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if not name.startswith("BiT-S")])  # those of BiT-M
def test_onnx_of_each_model_type(model_type, tmp_path):
    """With few blocks and units; the widths are the published ones."""
    fields, img_size = {"num_layers": 1}, 56 if model_type == "ViT-H_14" else 64
    if model_type in CONFORMERS:
        fields = {"cnn_units": 1}
    elif model_type in RESNETS:
        fields = {"resnet_layers": (1,) * len(RESNETS[model_type].resnet_layers)}
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", model_type, img_size, fields=fields))
    check_onnx(saved, tmp_path / "model.onnx")


def test_onnx_describes_itself(tmp_path):
    """An image that is prepared with Pillow and numpy by the JSON file's text alone has the same class and logits."""
    path = write_checkpoint(tmp_path / "run", mean_std="imagenet")
    SavedModel.load(path).export("onnx", tmp_path / "model.onnx")
    content = json.loads((tmp_path / "model.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in metadata.items()} == content
    assert content["classes"] == list(CLASSES)
    steps = content["preprocessing"]
    (image,) = write_images(tmp_path / "noise", [(40, 50)])
    with Image.open(image) as opened:
        size = (steps["resize"]["width"], steps["resize"]["height"])
        pixels = np.asarray(opened.resize(size, Image.Resampling.BILINEAR))
    prepared = (pixels * steps["scale"] - steps["mean"]) / steps["std"]
    inputs = prepared.transpose(2, 0, 1)[None].astype(np.float32)
    assert content["input"]["shape"] == ["batch", *inputs.shape[1:]]
    (logits,) = session.run(content["outputs"], {content["input"]["name"]: inputs})
    (predicted,) = SavedModel.load(path).predict([image])
    assert content["classes"][logits[0].argmax()] == predicted["classes"][0]["class"]
    probability = torch.from_numpy(logits[0]).softmax(dim=0).max().item()
    assert probability == pytest.approx(predicted["classes"][0]["probability"], abs=0.02)


def run_translated(module, *inputs):
    """What ONNX Runtime computes for a module that consists of translated operators."""
    from models.formats.onnx_operators import translations

    with onnx_format.silent():
        options = {"dynamo": True, "custom_translation_table": translations(), "opset_version": onnx_format.OPSET}
        program = torch.onnx.export(module, inputs, verbose=False, **options)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


class FacilityLocation(torch.nn.Module):
    def forward(self, s):
        return facility_location(s, 5)


class StableSort(torch.nn.Module):
    def forward(self, x):
        return x.sort(dim=1, stable=True), x.sort(dim=1, stable=True, descending=True)


def test_translated_operators_decide_ties_as_pytorch_does():
    """Values are multiples of 1/4, so there are many ties and sums are exact."""
    generator = torch.Generator().manual_seed(4)
    s = torch.randint(0, 5, (6, 12, 12), generator=generator).double() / 4
    (picks,) = run_translated(FacilityLocation(), s)
    assert torch.equal(picks, facility_location(s, 5))
    assert len(picks.unique()) > 5
    x = torch.randint(0, 4, (6, 12), generator=generator).float()
    expected = StableSort()(x)
    for found, wanted in zip(run_translated(StableSort(), x), [*expected[0], *expected[1]], strict=True):
        assert torch.equal(found, wanted)


def test_kernels_in_the_graph_are_standardised(tmp_path):
    """The graph has plain convolutions only, and the model itself is unchanged."""
    saved = SavedModel.load(write_checkpoint(tmp_path / "run", "ResNet-Mini_Flops", 16, fields={}))
    before = saved.model.export_npz()
    saved.export("onnx", tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(isinstance(module, torch.nn.Conv2d) for module in saved.model.modules())
    assert all(node.input[1] in constants for node in convolutions)
    assert all(np.array_equal(array, before[key]) for key, array in saved.model.export_npz().items())


def test_weights_of_gigabytes_are_in_a_file_of_their_own(tmp_path, monkeypatch):
    """It is found next to the graph, and removed with it when a smaller one replaces both."""
    saved = SavedModel.load(write_checkpoint(tmp_path / "run"))
    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as context:
        context.setattr(onnx_format, "MAX_SINGLE_FILE", 0)
        saved.export("onnx", folder / "model.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx", "model.onnx.data"]
    images, expected = logits_of(saved)
    (found,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"images": images.numpy()})
    assert relative_difference(torch.from_numpy(found), expected) < ONNX_BOUND
    saved.export("onnx", folder / "model.onnx", overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx"]
