"""A tower in int8: matrix products with weights by onnxruntime's dynamic quantisation, the token table row by row.

Legend: V rows of the token table, D width.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from m2_ds.convert.onnx.graph import INPUTS, Tower, quiet, write

# Convolutions stay in fp32: those of a stem lost six times as much as all matrix products together (docs/onnx.md).
_OPERATORS = ["MatMul"]
_ROWS = 1 << 14  # of the token table at a time


def quantize(graph: ir.Model, tower: Tower, path: Path, max_bytes_inside: int) -> None:
    """Write ``graph``, which is changed by it, in int8 to ``path`` (and weights to ``path`` + .data, as `write` does).

    A weight has a scale for each of its outputs, an activation one for the whole tensor, taken when it is computed.
    Attention's own products, LayerNorms, position tables, convolutions and the head stay in fp32.
    """
    # The head is the only product with one row a sample, and so the only Gemm. Its numbers are few, and what it loses
    # nothing evens out. The quantiser makes a MatMul of it, under another name.
    heads = [f"{node.name}{end}" for node in graph.graph if node.op_type == "Gemm" for end in ("", "_MatMul")]
    if tower == "text":
        _quantize_table(graph)
    source = path.with_name(f".{path.name}.source")
    files = write(graph, source, max_bytes_inside)
    try:
        with quiet():
            quantize_dynamic(
                source,
                path,
                op_types_to_quantize=_OPERATORS,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=heads,
                use_external_data_format=len(files) > 1,
            )
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _quantize_table(graph: ir.Model) -> None:
    """fp32 [V, D] -> int8 [V, D] and a scale [V, 1]: table[ids] becomes table8[ids] * scale[ids].

    One scale for the whole table, which is what onnxruntime's quantiser gives it, lost three times as much.
    """
    ids = next(value for value in graph.graph.inputs if value.name == INPUTS["text"][0])
    (gather,) = (node for node in ids.consumers() if node.op_type == "Gather")
    table = gather.inputs[0]
    assert table is not None and table.const_value is not None and table.name is not None
    rows = table.const_value.numpy()
    largest = np.maximum(rows.max(axis=1, keepdims=True), -rows.min(axis=1, keepdims=True))
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    whole = np.empty(rows.shape, np.int8)
    for first in range(0, len(rows), _ROWS):
        part = slice(first, first + _ROWS)
        whole[part] = np.rint(rows[part] / scale[part]).astype(np.int8)
    held = ir.val(f"{table.name}_quantized", const_value=ir.tensor(whole, name=f"{table.name}_quantized"))
    scales = ir.val(f"{table.name}_scale", const_value=ir.tensor(scale, name=f"{table.name}_scale"))
    graph.graph.register_initializer(held)
    graph.graph.register_initializer(scales)
    looked_up = [ir.node("Gather", [value, ids], {"axis": 0}) for value in (held, scales)]
    widened = ir.node("Cast", [looked_up[0].outputs[0]], {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [widened.outputs[0], looked_up[1].outputs[0]])
    graph.graph.insert_before(gather, [*looked_up, widened, product])
    result, (out,) = product.outputs[0], gather.outputs
    result.type, result.shape = out.type, out.shape
    out.replace_all_uses_with(result)
    graph.graph.remove(gather, safe=True)
    del graph.graph.initializers[table.name]
