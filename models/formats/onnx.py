"""ONNX: the graph of a model in evaluation mode, for any number of images, written by torch.onnx.

The graph has ONNX's ordinary operators only. While PyTorch exports, the layers use PyTorch's own operators in place of
those for CPUs, and what ONNX lacks is translated by models/formats/onnx_operators.py.
"""

import contextlib
import copy
import json
import logging
import warnings

import torch
from torch import nn

from models.convolution import StdConv2d
from models.formats.cards import INPUT, description

OPSET = 20  # the first one with an operator for GELU
OUTPUTS = ("logits", "kept_tokens", "clusters")
MAX_SINGLE_FILE = 2**31 - 2**24  # bytes of weights: a file of Protocol Buffers is limited to 2 GiB


class Plain(nn.Module):
    """Images -> (logits,); with a token reduction also which tokens were kept (B, K) and each token's cluster (B, N).

    See Clusters in models/token_reduction.py; after merges in several blocks they are those of the last one.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        if getattr(self.model, "reduction", None) is None:
            return (self.model(images),)
        logits, _, clusters = self.model.forward_with_clusters(images)
        return logits, *clusters[-1]


@torch.no_grad()
def write(model, card, path):
    """Write an .onnx file and return what its metadata say: the `description` and the names of the outputs.

    Weights of 2 GiB and more are in a file of their own with the further suffix .data.
    """
    from models.formats.onnx_operators import translations  # needs onnxscript, which is optional

    model = Plain(with_standardised_kernels(model)).eval()
    example = torch.zeros(2, 3, card.img_size, card.img_size)  # a batch of one would be taken for a constant
    with silent():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=OUTPUTS[: len(model(example))],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translations(),
            verbose=False,
        )
    content = {**description(model.model, card), "outputs": [output.name for output in program.model.graph.outputs]}
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine's files
    program.model.metadata_props.update({name: json.dumps(value) for name, value in content.items()})
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=size > MAX_SINGLE_FILE)
    return content


def with_standardised_kernels(model):
    """A copy on the CPU whose kernels are standardised once, so that the graph has plain convolutions."""
    model = copy.deepcopy(model).cpu()
    for module in model.modules():
        if isinstance(module, StdConv2d):
            module.weight.copy_(module.standardise(module.weight, module.eps))
            module.standardise = lambda weight, eps: weight
    return model


@contextlib.contextmanager
def silent():
    """Without warnings and messages of the exporter, which concern its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
