"""A tower as an ONNX graph: pictures or captions to the unit vectors that the release scores.

Legend: B pictures or captions, S image side, L tokens, E embedding.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from m2_ds import __version__
from m2_ds.model.encoder import M2Encoder

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
INPUTS: dict[Tower, tuple[str, ...]] = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
OUTPUT = "embeddings"

OPSETS = range(18, 23)
DEFAULT_OPSET = 18
# A protobuf message ends at 2 GiB; weights beyond this go into a file beside the graph.
MAX_BYTES_INSIDE = 2_000_000_000
_ALL = 1 << 62


class _Image(nn.Module):
    """pixel_values float32 [B, 3, S, S] in [0, 1] -> [B, E]."""

    def __init__(self, model: M2Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _Text(nn.Module):
    """input_ids int64 [B, L] and attention_mask int64 [B, L] (1 token, 0 padding) -> [B, E]."""

    def __init__(self, model: M2Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, attention_mask)


def check_opset(opset: int) -> None:
    """Raises ValueError for one that is not in `OPSETS`."""
    if opset not in OPSETS:
        raise ValueError(
            f"opset is {opset}; there are {OPSETS[0]} to {OPSETS[-1]}. torch writes none below, and from 23 on "
            "attention is one operator, which onnxruntime refuses with a mask of padding"
        )


def trace(model: M2Encoder, tower: Tower, opset: int = DEFAULT_OPSET) -> ir.Model:
    """The graph of a whole model's tower, B and L left open; its weights are the model's own, not copies.

    What is traced is the model's own code on torch's meta device: there captions are not packed, which only a CPU does
    and which needs their lengths, and nothing is allocated. Raises ValueError for an opset that is not in `OPSETS`.
    """
    check_opset(opset)
    config = model.config
    with torch.device("meta"):
        twin = M2Encoder(config.model_copy(update={"recompute": "none"})).eval()
        batch = torch.export.Dim("batch", min=1)
        if tower == "image":
            module: nn.Module = _Image(twin)
            inputs: tuple[Tensor, ...] = (torch.zeros(2, 3, config.image_size, config.image_size),)
            shapes: tuple[dict[int, Any], ...] = ({0: batch},)
        else:
            length = torch.export.Dim("length", min=1, max=config.text_positions - 2)
            module = _Text(twin)
            inputs = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
            shapes = ({0: batch, 1: length},) * 2
    with torch.no_grad(), quiet():
        # strict: traced through bytecode, len(x) stays a symbol, too.
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=True)
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )
        assert written is not None
        weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        used = written.model.graph.initializers.keys()
        written.apply_weights({name: tensor for name, tensor in weights.items() if name in used})
        # Weights that are only transposed or cut are folded, whatever their size: the runtime would do it at every
        # start, and quantisation looks for weights, not for what is made of them.
        onnxscript.optimizer.optimize_ir(written.model, input_size_limit=_ALL, output_size_limit=_ALL)
    return _signed(written.model, tower)


def write(graph: ir.Model, path: Path, max_bytes_inside: int = MAX_BYTES_INSIDE) -> list[Path]:
    """Write a graph to ``path``, and weights of more than ``max_bytes_inside`` to ``path`` + .data; which files.

    One with weights beside it is read from where it lies: the two keep their names.
    """
    weights = sum(x.const_value.nbytes for x in graph.graph.initializers.values() if x.const_value is not None)
    beside = path.with_name(f"{path.name}.data")
    if weights <= max_bytes_inside:
        ir.save(graph, path)
        return [path]
    ir.save(graph, path, external_data=beside.name, size_threshold_bytes=1024)
    return [path, beside]


def _signed(model: ir.Model, tower: Tower) -> ir.Model:
    """Without what torch notes at every node: stack traces, with the paths of this machine."""
    model.producer_name, model.producer_version = "m2_ds", __version__
    model.graph.name, model.graph.doc_string, model.doc_string = tower, None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    assert tuple(x.name for x in model.graph.inputs) == INPUTS[tower]
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch, onnxscript and onnxruntime tell of every step, and of their own deprecated calls."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
