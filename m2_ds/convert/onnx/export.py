"""Write a model as ONNX graphs with all that a server needs beside them (m2_ds.convert.onnx.folder says what)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from m2_ds.convert.onnx.check import CAPTIONS, cosines, largest_difference
from m2_ds.convert.onnx.folder import CONFIG, METRICS, README, OnnxConfig, Precision, graph_name, new_folder, refuse
from m2_ds.convert.onnx.graph import DEFAULT_OPSET, MAX_BYTES_INSIDE, TOWERS, Tower, check_opset, trace, write
from m2_ds.convert.onnx.quantize import quantize
from m2_ds.convert.onnx.readme import readme
from m2_ds.convert.onnx.session import OnnxModel
from m2_ds.data.text import Tokenizer
from m2_ds.files import write_json
from m2_ds.model.encoder import M2Encoder


@dataclass(frozen=True)
class Exported:
    """What was found when the graphs were run: by tower, or by the name of a file."""

    difference: dict[Tower, float]  # largest, of fp32 to torch
    cosine: dict[Tower, tuple[float, float]]  # mean and smallest, of int8 to fp32; empty without int8
    sizes: dict[str, int]  # bytes of the graphs with their weights


def export(
    model: M2Encoder,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    opset: int = DEFAULT_OPSET,
    int8: bool = False,
    measure: Callable[[dict[Precision, OnnxModel]], Mapping[str, object]] | None = None,
    max_bytes_inside: int = MAX_BYTES_INSIDE,
) -> Exported:
    """Write a whole fp32 model to a folder that does not exist yet; it is there as a whole or not at all.

    The graphs are run before the folder appears: those in fp32 have to give torch's embeddings. ``measure`` gets the
    models by precision, and what it returns goes to metrics.json. Raises ValueError for what could not be used, and
    where the graphs do not give the model's embeddings.
    """
    check_opset(opset)
    found = refuse(model.config, tokenizer, out)
    precisions: list[Precision] = ["fp32", "int8"] if int8 else ["fp32"]
    config = OnnxConfig(
        precisions=precisions,
        opset=opset,
        image_size=model.config.image_size,
        embed_dim=model.config.embed_dim,
        max_text_length=found.max_length,
        text_positions=model.config.text_positions - 2,
        vocab_size=model.config.vocab_size,
        logit_scale=float(model.logit_scale.detach()),
    )
    with new_folder(out) as folder:
        for tower in TOWERS:
            graph = trace(model, tower, opset)
            write(graph, folder / graph_name(tower, "fp32"), max_bytes_inside)
            if int8:
                quantize(graph, tower, folder / graph_name(tower, "int8"), max_bytes_inside)
        sessions = {precision: OnnxModel(folder, config, precision) for precision in precisions}
        difference = largest_difference(model, sessions["fp32"], config)
        cosine: dict[Tower, tuple[float, float]] = {}
        if int8:
            both = cosines(sessions["fp32"], sessions["int8"], found.encode(CAPTIONS), config.image_size)
            cosine = {tower: (float(each.mean()), float(each.min())) for tower, each in both.items()}
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if measure is not None:
            write_json(folder / METRICS, measure(sessions))
        found.save(folder)
        write_json(folder / CONFIG, config.model_dump(mode="json"))
        (folder / README).write_text(readme(out.resolve().name, config), encoding="utf-8")
    return Exported(difference, cosine, sizes)
