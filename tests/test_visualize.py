"""What is computed from attention, against closed forms; the pictures and the notebook as a user makes them."""

import math
import shutil

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn
from utils.visualize import (
    attention_distance,
    class_token_mask,
    cluster_colours,
    cluster_frames,
    grad_cam,
    plot_pictures,
    position_similarity,
    principal_filters,
    rollout,
    shrunk,
    upsample,
)

from helpers import ROOT, script, succeed, write_pictures
from models import build_model
from models.configs import VITS
from synthetic import make_checkpoint, make_images
from visualize import first_layer, labels_of

SMALL = {"hidden_size": 32, "mlp_dim": 32, "num_heads": 2, "num_layers": 4}


def test_a_cluster_has_one_colour_and_a_frame():
    """A picture of 4 x 6 pixels and 2 x 3 patches; cluster 1 lies in two pieces, of brightness 100 and 50."""
    numbers = torch.tensor([[0, 0, 1], [1, 0, 0]])
    picture = torch.zeros(3, 4, 6, dtype=torch.uint8)
    picture[0, :2, 4:] = 100
    picture[0, 2:, :2] = 50
    colours = cluster_colours(picture, numbers)
    assert colours[..., 0].tolist() == [[0, 0, 75], [75, 0, 0]]
    assert colours[..., 1:].max() == 0
    lines, owners = cluster_frames(numbers)
    middles = np.mean(lines, axis=1).round(2).tolist()
    near = {(*middle, owner) for middle, owner in zip(middles, owners, strict=True)}
    assert {(2.06, 0.5, 1), (1.94, 0.5, 0), (2.5, 0.94, 1), (2.94, 0.5, 1), (2.5, 0.06, 1)} <= near
    assert len(lines) == 2 * 4 + 2 * 5  # both pieces of cluster 1 have four sides, and of 0 the ten around it
    assert not any(owner == 0 and abs(x - 1) < 0.1 and y == 0.5 for x, y, owner in near)  # within cluster 0


def random_attention(blocks, tokens, images=2, heads=3):
    torch.manual_seed(0)
    return [torch.randn(images, heads, tokens, tokens).softmax(dim=-1) for _ in range(blocks)]


def attention_to(patch, blocks, tokens):
    """Every token attends to one patch alone."""
    weights = torch.zeros(1, 2, tokens, tokens)
    weights[..., 1 + patch] = 1
    return [weights] * blocks


def test_rollout_is_the_product_of_averaged_matrices():
    attention = random_attention(3, 5)
    expected = np.eye(5)
    for weights in attention:
        expected = (0.5 * weights[1].mean(dim=0).numpy() + 0.5 * np.eye(5)) @ expected
    torch.testing.assert_close(rollout(attention)[1].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_rows_of_a_rollout_sum_to_one():
    torch.testing.assert_close(rollout(random_attention(12, 17)).sum(dim=-1), torch.ones(2, 17))


def test_rollout_of_uniform_attention_is_uniform():
    uniform = [torch.full((1, 4, 13, 13), 1 / 13)] * 6
    torch.testing.assert_close(class_token_mask(rollout(uniform), (3, 4)), torch.ones(1, 3, 4))


@pytest.mark.parametrize("patch, row, column", [(0, 0, 0), (4, 0, 4), (7, 1, 2), (14, 2, 4)])
def test_attention_to_one_patch_lights_that_patch(patch, row, column):
    """On a grid of 3 x 5 patches, and at its place in a picture of 30 x 100 pixels."""
    mask = class_token_mask(rollout(attention_to(patch, 4, 16)), (3, 5))[0]
    assert mask.shape == (3, 5)
    assert mask[row, column] == pytest.approx(15)
    assert mask.sum() == pytest.approx(15)
    heat = upsample(mask, (30, 100))
    assert heat.shape == (30, 100)
    brightest = heat[10 * row : 10 * row + 10, 20 * column : 20 * column + 20]
    assert brightest.mean() > 0.5 * 15
    assert heat.argmax() in torch.arange(3000).view(30, 100)[10 * row : 10 * row + 10, 20 * column : 20 * column + 20]


def test_a_model_that_is_forced_to_one_patch_lights_it():
    """Queries and keys that make every token look at the patch with the largest feature, whose embedding is large."""
    model = build_model("ViT-Mini_4", (12, 20), **SMALL).eval().requires_grad_(False)
    block = model.blocks[0]
    block.norm1.weight.fill_(1)
    for tensor in (block.attn.qkv.weight, block.attn.qkv.bias, model.pos_embed, model.cls_token):
        tensor.zero_()
    query, key, _ = block.attn.qkv.weight.chunk(3)
    block.attn.qkv.bias[:32] = 10  # every query is the same
    key[:, 0] = 10  # keys are the first feature
    model.patch_embed.proj.weight.zero_()
    model.patch_embed.proj.weight[0] = 1  # which is the brightness
    images = torch.full((1, 3, 12, 20), -1.0)
    images[:, :, 4:8, 12:16] = 1  # row 1, column 3
    model.pos_embed[..., 1] = 1e-3  # something for the norm to divide
    _, attention = model.forward_with_attention(images)
    mask = class_token_mask(attention[0].mean(dim=1), model.patch_embed.grid_size)[0]
    assert mask.shape == (3, 5)
    assert mask[1, 3] > 0.99 * 15
    mixed = class_token_mask(rollout(attention[:1]), (3, 5))[0]
    assert mixed[1, 3] > 0.99 * 15


@pytest.mark.parametrize("model_type", VITS)
def test_every_vit_and_hybrid_can_be_looked_into(model_type):
    """Also where images are not square."""
    img_size = (84, 126) if model_type == "ViT-H_14" else (64, 128)
    model = build_model(model_type, img_size, num_layers=2).eval()
    with torch.no_grad():
        _, attention = model.forward_with_attention(torch.zeros(1, 3, *img_size))
    grid_size = model.patch_embed.grid_size
    assert grid_size[0] < grid_size[1]
    assert class_token_mask(rollout(attention), grid_size).shape == (1, *grid_size)
    assert attention_distance(attention, grid_size, img_size).shape == (2, model.config.num_heads)
    filters = first_layer(model).weight
    assert len(principal_filters(filters, 8)) == min(8, len(filters) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type, img_size", [("ViT-Mini_4", (12, 20)), ("R26-ViT-Mini_4", (16, 32))])
def test_attention_costs_nothing_unless_it_is_asked_for(model_type, img_size, dtype):
    """The same logits; without asking no tensor with a value for each pair of tokens is kept."""
    model = build_model(model_type, img_size, num_layers=2).eval()
    model.load_from(make_checkpoint({key: array.shape for key, array in model.export_npz().items()}), head="keep")
    images = torch.from_numpy(make_images(32)[:, :, : img_size[0], : img_size[1]].copy()).to(dtype)
    model.to(dtype)
    tokens = model.pos_embed.shape[1]
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape[-2:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
        assert (tokens, tokens) not in shapes
        with_attention, attention = model.forward_with_attention(images)
        assert (tokens, tokens) in shapes
    exact = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(with_attention, logits, rtol=exact, atol=exact)
    for weights in attention:
        sums = weights.float().sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones(2, model.config.num_heads, tokens), rtol=0, atol=exact)


def test_attention_distance_against_closed_forms():
    """To oneself 0 pixels; to a neighbour on the right one patch; everywhere alike the mean distance of two patches."""
    grid_size, img_size = (2, 3), (8, 24)  # patches of 4 x 8 pixels
    oneself = torch.eye(7).expand(1, 2, 7, 7)
    right = torch.zeros(1, 2, 7, 7)
    for patch in range(6):
        right[..., 1 + patch, 1 + patch + (1 if patch % 3 < 2 else -1)] = 0.5
    right[..., 0] = 0.5  # half of the attention is the class token's, which does not count
    uniform = torch.full((1, 2, 7, 7), 1 / 7)
    places = [(4 * row, 8 * column) for row in range(2) for column in range(3)]
    mean = float(np.mean([math.dist(a, b) for a in places for b in places]))
    found = attention_distance([oneself, right, uniform], grid_size, img_size)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [8.0, 8.0], [mean, mean]]))


def test_similarity_of_position_embeddings():
    random = torch.randn(1, 7, 5)
    random[0, 1] = 3 * random[0, 6]
    similarity = position_similarity(random, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[0, 0, 1, 2] == pytest.approx(1)
    torch.testing.assert_close(similarity[1, 1, 1, 1], torch.tensor(1.0))
    expected = torch.cosine_similarity(random[0, 2], random[0, 4], dim=0)
    torch.testing.assert_close(similarity[0, 1, 1, 0], expected)


def test_principal_filters_find_the_direction_of_the_kernels():
    pattern = torch.randn(3, 4, 4)
    kernels = torch.randn(50, 1, 1, 1) * pattern + 0.01 * torch.randn(50, 3, 4, 4)
    first = principal_filters(kernels, 5)
    assert first.shape == (5, 4, 4, 3)
    assert first.min() >= 0
    assert first.max() <= 1
    found = (first[0] - 0.5).flatten()
    cosine = torch.cosine_similarity(found, pattern.permute(1, 2, 0).flatten(), dim=0)
    assert cosine.abs() > 0.99


def test_grad_cam_lights_what_the_class_depends_on():
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).view(2, 3, 1, 1))  # red and green
        model[3].weight.copy_(torch.eye(2))
    images = torch.zeros(1, 3, 4, 6)
    images[0, 0, 1, 2] = images[0, 1, 3, 5] = 1
    for label, place in ((0, (1, 2)), (1, (3, 5))):
        mask = grad_cam(model, model[0], images, torch.tensor([label]))[0]
        assert mask.shape == (4, 6)
        assert mask[place] == pytest.approx(24)


def test_pictures_with_dollar_signs_and_of_different_sizes_are_drawn():
    pictures = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 300, 500, dtype=torch.uint8)]
    figure = plot_pictures(pictures, [torch.rand(2, 2), torch.rand(3, 5)], ["a $ b", "c $"], "$x^")
    figure.canvas.draw()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An .npz of ViT-Ti_16 at 64x64 and one of ResNet-Mini_Flops, all random."""
    folder = tmp_path_factory.mktemp("weights")
    for name, model in (
        ("ViT-Ti_16", build_model("ViT-Ti_16", 64)),
        ("ResNet-Mini_Flops", build_model("ResNet-Mini_Flops")),
    ):
        arrays = make_checkpoint({key: array.shape for key, array in model.export_npz().items()})
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def test_every_picture_from_the_shell(weights, tmp_path):
    write_pictures(tmp_path / "cats", [(40, 60), (60, 30)])
    command = ["visualize.py", "--checkpoint", weights / "ViT-Ti_16.npz", "--output_dir", tmp_path / "out"]
    printed = succeed(*command, "--image", tmp_path / "cats")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    single = {f"cats-00{i}-{kind}.png" for i in (0, 1) for kind in ("rollout", "blocks", "heads")}
    assert names == {"grid.png", "distance.png", "positions.png", "filters.png"} | single
    assert {line.rpartition("/")[2] for line in printed.splitlines()} == names
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 150, path

    shutil.rmtree(tmp_path / "out")
    succeed(*command, "--image", tmp_path / "cats" / "000.png", "--blocks", 1, 11, "--img_size", 96)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cats-000-blocks.png"]


def test_pictures_of_the_same_name_do_not_overwrite_each_other():
    paths = ["a/x/1.png", "b/x/1.png", "x/1.jpg", "/1.png", "x/2.png"]
    assert labels_of(paths) == ["x-1", "x-1~2", "x-1~3", "1", "x-2"]


def test_large_pictures_are_shrunk_for_drawing():
    picture = torch.zeros(3, 1024, 2000, dtype=torch.uint8)
    picture[:, :, 1000:] = 200
    small = shrunk(picture)
    assert (small.shape, small.dtype) == ((3, 262, 512), torch.uint8)
    assert small[:, :, :256].max() == 0
    assert small[:, :, 256:].min() == 200
    assert shrunk(small) is small


def test_a_cnn_gets_grad_cam(weights, tmp_path):
    write_pictures(tmp_path, [(40, 60)])
    command = ["visualize.py", "--checkpoint", weights / "ResNet-Mini_Flops.npz", "--output_dir", tmp_path / "out"]
    succeed(*command, "--image", tmp_path / "000.png", "--img_size", 32)
    assert [path.name.partition("-")[2] for path in (tmp_path / "out").iterdir()] == ["000-grad_cam.png"]
    done = script(*command, "--image", tmp_path / "000.png", "--rollout")
    assert done.returncode == 2
    assert "is a CNN without attention; leave --rollout away" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "there is nothing to draw"),
        (["--checkpoint", "ViT-Ti_16.npz", "--rollout"], "--rollout needs --image"),
        (
            ["--checkpoint", "ViT-Ti_16.npz", "--image", "000.png", "--blocks", 12],
            "--blocks 12: the model has the blocks 0 to 11",
        ),
        (["--checkpoint", "ViT-Ti_16.npz", "--image", "nothing.png"], "nothing.png is not a readable picture"),
        (["--checkpoint", "ViT-Ti_16.npz", "--image", "000.png", "--output_dir", "000.png"], "000.png can't be made"),
        (["--curves", "nowhere"], "nowhere is no folder of a run"),
        (["--curves", "nowhere", "--image", "000.png"], "--image needs --checkpoint"),
    ],
)
def test_wrong_flags(flags, message, weights, tmp_path, monkeypatch, capsys):
    import visualize
    from test_flags import fails

    write_pictures(tmp_path, [(8, 8)])
    shutil.copy(weights / "ViT-Ti_16.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in fails(visualize, flags, monkeypatch, capsys)


def test_attention_is_logged_while_training_and_runs_are_drawn_over_each_other(tiny_flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = tiny_flags("--name", "plain")
    logged = tiny_flags("--name", "logged", "--log_attention_every", 4)
    succeed("train.py", *plain)
    succeed("train.py", *logged)
    output = tmp_path / "output"
    events = EventAccumulator(str(output / "logged"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("attention rollout")] == [4, 8, 12]
    assert (output / "plain" / "last.safetensors").read_bytes() == (output / "logged" / "last.safetensors").read_bytes()
    succeed("visualize.py", "--curves", output / "plain", output / "logged", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").exists()
    done = script("train.py", *tiny_flags("--model_type", "ResNet-Mini_Flops", "--log_attention_every", 4))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--log_attention_every: ResNet-Mini_Flops has no attention" in done.stderr


def test_the_notebook_runs_from_a_clean_kernel(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "visualize_attention_map.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 7


def test_the_notebook_is_committed_with_its_pictures_and_small():
    path = ROOT / "visualize_attention_map.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.outputs for cell in notebook.cells[2:] if cell.cell_type == "code")
    assert path.stat().st_size < 2 * 2**20
