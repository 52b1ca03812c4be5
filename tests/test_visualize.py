"""visualize.py and the notebook: which figures they draw, and the errors for wrong flags."""

import ast
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

import train
import visualize
from helpers import DIGITS_RUN, ROOT, call_main, fails, make_shallow, succeed, write_images, write_run
from inference import SavedModel
from models import build_model
from synthetic import make_checkpoint
from utils import attention_comparison
from utils.data.images import read_image, unique_stems

NOTEBOOK = ROOT / "visualize_attention_map.ipynb"
REDUCTION = ("--token_reduction", "facility", "--reduction_layer", 2, "--keep_tokens")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with ViT-Mini_4.npz for 16x16 images and ResNet-Mini_Flops.npz; the weights are random."""
    folder = tmp_path_factory.mktemp("weights")
    for model_type in ("ViT-Mini_4", "ResNet-Mini_Flops"):
        shapes = {key: array.shape for key, array in build_model(model_type, 16).export_npz().items()}
        np.savez(folder / f"{model_type}.npz", **make_checkpoint(shapes))
    return folder


@pytest.fixture
def draw(weights, tmp_path, monkeypatch, capsys):
    """`draw("ViT-Mini_4", "--flag", ...)` runs visualize.py; returns the names of the figures that it has drawn.

    Its --image is a folder of two images unless the flags have one.
    """
    write_images(tmp_path / "cats", [(40, 60), (60, 30)])

    def run(model_type, *flags):
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        images = () if "--image" in flags else ("--image", tmp_path / "cats")
        checkpoint = ("--checkpoint", weights / f"{model_type}.npz", "--output_dir", folder)
        call_main(visualize, [*checkpoint, *images, *flags], monkeypatch)
        names = {path.name for path in folder.iterdir()}
        printed = capsys.readouterr().out.splitlines()
        assert sorted(printed) == sorted(str(folder / name) for name in names)
        for name in names:
            with Image.open(folder / name) as image:
                assert min(image.size) > 150, name
        return names

    return run


def of_each_image(*kinds):
    return {f"cats-00{i}-{kind}.png" for i in (0, 1) for kind in kinds}


def test_without_flags_all_figures_of_a_vit_are_drawn(draw, tmp_path):
    together = {"distance.png", "positions.png", "filters.png"}
    names = draw("ViT-Mini_4", "--image", tmp_path / "cats" / "000.png")
    kinds = ("rollout", "class", "blocks", "heads", "matrix")
    assert names == together | {f"cats-000-{kind}.png" for kind in kinds}


@pytest.mark.parametrize("reduction", [(*REDUCTION, 0.5), ("--token_reduction", "tome", "--tome_r", 2)])
def test_without_flags_all_figures_of_a_vit_with_a_token_reduction_are_drawn(reduction, draw):
    together = {"grid.png", "clusters.png", "distance.png", "positions.png", "filters.png"}
    names = draw("ViT-Mini_4", *reduction)
    assert names == together | of_each_image("rollout", "class", "blocks", "heads", "matrix", "clusters")


def test_flags_select_the_figures(draw, tmp_path):
    one = ("--image", tmp_path / "cats" / "000.png")
    assert draw("ViT-Mini_4", *one, "--blocks", 1, 5, "--img_size", 24) == {"cats-000-blocks.png"}
    assert draw("ViT-Mini_4", *one, "--blocks", 1, "--heads") == {"cats-000-heads.png"}
    assert draw("ViT-Mini_4", *one, "--blocks", 1, "--matrix") == {"cats-000-matrix.png"}
    assert draw("ViT-Mini_4", *one, "--class") == {"cats-000-class.png"}
    assert draw("ViT-Mini_4", *one, "--rollout") == {"cats-000-rollout.png"}  # a single image needs no grid
    assert draw("ViT-Mini_4", *REDUCTION, 3, *one, "--clusters") == {"cats-000-clusters.png"}
    assert draw("ViT-Mini_4", "--distance", "--filters") == {"distance.png", "filters.png"}
    assert draw("ViT-Mini_4", "--image", tmp_path / "cats", "--positions") == {"positions.png"}


def test_the_title_of_a_grid_says_if_images_are_omitted(draw, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(visualize, "plot_image_grid", lambda *given: titles.append(given[3]) or Figure())
    monkeypatch.setattr(visualize, "MAX_GRID", 2)
    draw("ViT-Mini_4", "--rollout")
    write_images(tmp_path / "cats", [(9, 9), (9, 9), (9, 9)])
    draw("ViT-Mini_4", "--rollout")
    whole, part = (title.partition("ViT-Mini_4.npz: ")[2] for title in titles)
    assert (whole, part) == ("attention rollout", "attention rollout, the first 2 of 3 images")


def test_a_cnn_gets_grad_cam(draw):
    assert draw("ResNet-Mini_Flops", "--img_size", 32) == of_each_image("grad_cam") | {"grid.png"}
    assert draw("ResNet-Mini_Flops", "--img_size", 32, "--class", 3) == of_each_image("class")


def test_each_class_has_a_row_of_maps(draw, monkeypatch):
    """By name or number; of a CNN Grad-CAM only."""
    figures = []
    monkeypatch.setattr(visualize, "plot_attention_rows", lambda *given: figures.append(given[1]) or Figure())
    draw("ViT-Mini_4", "--class", "class 3", 0)
    draw("ResNet-Mini_Flops", "--img_size", 32, "--class", 1)
    for rows in figures[:2]:
        assert [label.rpartition(" ")[0].rpartition(" ")[0] for label in rows] == ["class 3", "class 0"]
        assert all(list(maps) == ["Grad-CAM", "attention relevance"] for maps in rows.values())
        three, zero = (maps["attention relevance"] for maps in rows.values())
        assert three.shape == (4, 4)
        assert not three.allclose(zero)
    assert [list(maps) for rows in figures[2:] for maps in rows.values()] == [["Grad-CAM"]] * 2


def test_the_attention_of_several_checkpoints_is_drawn_in_one_figure(tmp_path, monkeypatch, capsys):
    """The blocks are those of the shallowest model; the labels are norms, or names of runs where norms are equal."""
    maps, matrices = [], []
    for function, figures in (("plot_attention_rows", maps), ("plot_attention_matrices", matrices)):
        monkeypatch.setattr(
            attention_comparison, function, lambda *given, figures=figures: figures.append(given) or Figure()
        )
    paths = []
    for name, norm in (("one", "LN"), ("two", "GN"), ("three", "LN")):
        flags = {**DIGITS_RUN, "norm_type": norm, "name": name}
        paths.append(write_run(tmp_path / name, flags)[1])
    image = write_images(tmp_path / "cats", [(16, 16)])[0]
    monkeypatch.chdir(tmp_path)
    call_main(visualize, ["--image", image, "--checkpoint", *paths[:2]], monkeypatch)
    call_main(visualize, ["--image", image, "--checkpoint", *paths, "--matrix", "--blocks", 5], monkeypatch)
    call_main(visualize, ["--image", image, "--checkpoint", *paths, "--blocks", 5], monkeypatch)
    kinds = [line.removeprefix("pictures/cats-000-") for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["blocks.png", "matrix.png", "matrix.png", "blocks.png"]
    for figures in ([rows for rows, *_ in matrices], [rows for _, rows, _ in maps]):
        assert [[label.split("\n")[0] for label in rows] for rows in figures] == [["LN", "GN"], ["one", "two", "three"]]
    assert [blocks for _, blocks, *_ in matrices] == [[0, 1, 3, 4], [5]]
    assert [list(next(iter(rows.values()))) for _, rows, _ in maps] == [
        ["attention rollout", "block 0", "block 1", "block 3", "block 4"],
        ["attention rollout", "block 5"],
    ]
    drawn = zip(matrices[1][0].values(), maps[1][1].values(), strict=True)
    for saved, (of_block, masks) in zip(map(SavedModel.load, paths), drawn, strict=True):
        with torch.no_grad():
            attention = saved.model.forward_with_attention(saved.prepare(read_image(image)))[1]
        torch.testing.assert_close(of_block[0], attention[5][0, 0])
        of_class_token = attention[5][0].mean(dim=0)[0, 1:]
        torch.testing.assert_close(masks["block 5"], (of_class_token / of_class_token.mean()).view(4, 4))
        assert not masks["attention rollout"].allclose(masks["block 5"])


def test_figures_of_images_with_the_same_name_do_not_overwrite_each_other():
    paths = ["a/x/1.png", "b/x/1.png", "x/1.jpg", "/1.png", "x/2.png"]
    assert unique_stems(paths) == ["x-1", "x-1~2", "x-1~3", "1", "x-2"]


VIT, CNN = ("--checkpoint", "ViT-Mini_4.npz"), ("--checkpoint", "ResNet-Mini_Flops.npz")
CONFORMER = ("--image", "000.png", "--checkpoint", "conformer/best.safetensors")
TWO_GRIDS = ("--image", "000.png", *VIT, "finer/best.safetensors")


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "there is nothing to draw"),
        ((*VIT, "--rollout"), "--rollout needs --image"),
        ((*VIT, "--image", "000.png", "--blocks", 6), "--blocks 6: the model has the blocks 0 to 5"),
        (
            (*VIT, "--image", "000.png", "--clusters"),
            "ViT-Mini_4.npz merges no tokens; give for example --token_reduction",
        ),
        ((*VIT, "--image", "000.png", "--clusters", *REDUCTION, 16), "--keep_tokens 16 keeps all patches"),
        (
            (*VIT, "--image", "000.png", "--clusters", "--token_reduction", "tome", "--tome_r", 0),
            "--tome_r 0 merges no tokens; give a larger number",
        ),
        ((*VIT, "--image", "nothing.png"), "nothing.png does not exist"),
        ((*VIT, "--image", "000.png", "--output_dir", "000.png"), "000.png can't be created: "),
        ((*CNN, "--image", "000.png", "--rollout"), "is a CNN without attention; omit --rollout"),
        ((*CNN, "--image", "000.png", "--matrix"), "is a CNN without attention; omit --matrix"),
        (
            (*VIT, CNN[1], "--image", "000.png"),
            "ResNet-Mini_Flops.npz is a CNN without attention; give several --checkpoint files of ViTs alone",
        ),
        ((*VIT, VIT[1], "--image", "000.png", "--class"), "--class is for one --checkpoint; --blocks, with"),
        ((*VIT, VIT[1]), "several --checkpoint files need --image"),
        ((*VIT, "--class"), "--class needs --image"),
        ((*VIT, "--image", "000.png", "--class", "clas 3"), "unknown class 'clas 3'; did you mean class 3"),
        ((*VIT, "--image", "000.png", "--class", "10"), "Numbers from 0 to 9 are accepted too"),
        ((*VIT, VIT[1], "--image", "000.png", "--blocks", 6), "--blocks 6: the model has the blocks 0 to 5"),
        (
            (*CONFORMER, "--class"),
            "conformer/best.safetensors is a Conformer, whose head does not read the class token",
        ),
        ((*TWO_GRIDS, "--matrix"), "ViT-Mini_4.npz sees 4x4 patches of the whole, finer/best.safetensors sees 8x8"),
        (CNN, "Grad-CAM needs --image"),
        (("--curves", "nowhere"), "nowhere is not the folder of a run"),
        (("--curves", "nowhere", "--image", "000.png"), "--image needs --checkpoint"),
    ],
)
def test_wrong_flags_are_errors(flags, message, weights, tmp_path, monkeypatch, capsys):
    write_images(tmp_path, [(8, 8)])
    for path in weights.iterdir():
        os.link(path, tmp_path / path.name)
    write_run(tmp_path / "conformer", {**DIGITS_RUN, "model_type": "Conformer-Mini_4"})
    write_run(tmp_path / "finer", {**DIGITS_RUN, "img_size": 32})
    monkeypatch.chdir(tmp_path)
    assert message in fails(visualize, flags, monkeypatch, capsys)


def test_curves_of_runs_are_drawn(tiny_flags, tmp_path, monkeypatch, capsys):
    make_shallow(monkeypatch)
    for name in ("one", "two"):
        call_main(train, tiny_flags("--name", name, "--num_steps", 2), monkeypatch)
    capsys.readouterr()
    folders = (tmp_path / "output" / name for name in ("one", "two"))
    call_main(visualize, ["--curves", *folders, "--output_dir", tmp_path / "out"], monkeypatch)
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'curves.png'}\n"
    assert (tmp_path / "out" / "curves.png").exists()


@pytest.mark.slow
def test_visualize_from_the_shell(weights, tmp_path):
    write_images(tmp_path / "cats", [(40, 60), (60, 30)])
    command = ("visualize.py", "--checkpoint", weights / "ViT-Mini_4.npz", "--output_dir", tmp_path / "out")
    printed = succeed(*command, "--image", tmp_path / "cats")
    assert {Path(line).name for line in printed.splitlines()} == {path.name for path in (tmp_path / "out").iterdir()}
    assert "cats-000-rollout.png" in printed


def figures_of_code(notebook):
    """Run the notebook's code cells in one namespace; returns the figures that are values of their last lines."""
    namespace, figures = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source.removeprefix("%matplotlib inline\n"))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, NOTEBOOK.name, "exec"), namespace)
            value = last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), namespace)
            figures += [value] if isinstance(value, Figure) else []
    return figures


def test_the_code_of_the_notebook_draws_its_figures(monkeypatch):
    monkeypatch.chdir(ROOT)
    figures = figures_of_code(nbformat.read(NOTEBOOK, as_version=4))
    assert len(figures) == 7
    for figure in figures:
        figure.canvas.draw()


@pytest.mark.slow
def test_the_notebook_runs_in_a_new_kernel(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(figures) == 7


def test_the_notebook_is_committed_with_its_figures_and_is_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells[2:] if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 2 * 2**20
