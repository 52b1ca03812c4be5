"""Figures of models: colours and frames of clusters, scales, and texts with dollar signs."""

import numpy as np
import torch

from utils.figures import (
    blocks_to_draw,
    cluster_colours,
    cluster_frames,
    downscale,
    plot_attention_matrices,
    plot_attention_rows,
    plot_clusters,
    plot_image_grid,
    prediction_caption,
    wrap_text,
)


def test_a_cluster_has_one_colour_and_a_frame():
    """An image of 4 x 6 pixels and 2 x 3 patches; cluster 1 has two separate parts, of brightness 100 and 50."""
    numbers = torch.tensor([[0, 0, 1], [1, 0, 0]])
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[0, :2, 4:] = 100
    image[0, 2:, :2] = 50
    colours = cluster_colours(image, numbers)
    assert colours[..., 0].tolist() == [[0, 0, 75], [75, 0, 0]]
    assert colours[..., 1:].max() == 0
    lines, owners = cluster_frames(numbers)
    middles = np.mean(lines, axis=1).round(2).tolist()
    near = {(*middle, owner) for middle, owner in zip(middles, owners, strict=True)}
    assert {(2.06, 0.5, 1), (1.94, 0.5, 0), (2.5, 0.94, 1), (2.94, 0.5, 1), (2.5, 0.06, 1)} <= near
    assert len(lines) == 2 * 4 + 2 * 5  # both parts of cluster 1 have four sides; cluster 0 has ten
    assert not any(owner == 0 and abs(x - 1) < 0.1 and y == 0.5 for x, y, owner in near)  # within cluster 0


def test_one_image_or_several_are_drawn_with_their_clusters():
    numbers, kept = torch.tensor([[0, 0, 1], [1, 0, 0]]), [(0, 1), (1, 0)]
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    for count, panels in ((1, 2), (8, 16)):
        figure = plot_clusters(count * [image], count * [(numbers, kept)], count * ["caption"], "title")
        figure.draw_without_rendering()
        assert len(figure.axes) == panels
        dots = [axes.collections[1] for axes in figure.axes if axes.collections]
        assert len(dots) == count
        assert dots[0].get_offsets().tolist() == [[1.5, 0.5], [0.5, 1.5]]


def test_images_of_different_sizes_and_texts_with_dollar_signs_are_drawn():
    """A text between two dollar signs would be read as a formula, and "x^" is not a valid one."""
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 300, 500, dtype=torch.uint8)]
    figure = plot_image_grid(images, [torch.rand(2, 2), torch.rand(3, 5)], ["a $ b", "c $x^$"], "$x^$")
    figure.draw_without_rendering()


def test_masks_of_a_column_have_one_scale():
    rows = {"LN": {"block 0": torch.full((2, 2), 3.0)}, "BN": {"block 0": torch.full((2, 2), 7.0)}}
    figure = plot_attention_rows(torch.zeros(3, 8, 8, dtype=torch.uint8), rows, "title")
    figure.draw_without_rendering()
    masks = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert [mask.get_clim() for mask in masks] == [(0, 7), (0, 7)]


def test_large_images_are_downscaled_for_drawing():
    image = torch.zeros(3, 1024, 2000, dtype=torch.uint8)
    image[:, :, 1000:] = 200
    small = downscale(image)
    assert (small.shape, small.dtype) == ((3, 262, 512), torch.uint8)
    assert small[:, :, :256].max() == 0
    assert small[:, :, 256:].min() == 200
    assert downscale(small) is small


def test_text_is_wrapped_and_keeps_its_own_lines():
    assert wrap_text("one two three\n\nfour $", 8) == "one two\nthree\n\nfour \\$"


def test_the_blocks_to_draw_and_the_caption_of_a_prediction():
    assert blocks_to_draw(12) == [0, 3, 6, 9]
    assert blocks_to_draw(6) == [0, 1, 3, 4]
    assert blocks_to_draw(24) == [0, 6, 12, 18]
    assert blocks_to_draw(2) == [0, 1]
    assert blocks_to_draw(1) == [0]
    logits = torch.tensor([[0.0, np.log(3.0)]])
    assert prediction_caption(logits, ["cat", "dog"]) == "dog 75 %"
    assert prediction_caption(logits, ["cat", "dog"], 0) == "cat 25 %"


def test_attention_matrices_have_one_scale_and_a_line_per_row_of_patches():
    """Two models, two blocks, 2 x 3 patches; weights of 0 and 1 are possible."""
    matrices = torch.rand(2, 7, 7).softmax(dim=-1)
    figure = plot_attention_matrices({"LN": matrices, "a $x^$": torch.eye(7).expand(2, 7, 7)}, [0, 3], (2, 3), "title")
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 4
    assert len({axes.images[0].norm for axes in panels}) == 1
    scale = panels[0].images[0].norm
    assert (scale.vmin, scale.vmax) == (0.1 / 7, 1)
    assert scale(0.0) == 0
    np.testing.assert_array_equal(panels[1].images[0].get_array(), matrices[1].numpy())
    horizontal, vertical = (lines.get_segments() for lines in panels[3].collections)
    assert [line.tolist() for line in horizontal] == [[[-0.5, y], [6.5, y]] for y in (0.5, 3.5)]  # after tokens 0 and 3
    assert [line.tolist() for line in vertical] == [[[x, -0.5], [x, 6.5]] for x in (0.5, 3.5)]
    assert [axes.get_title() for axes in panels] == ["block 0", "block 3", "", ""]
