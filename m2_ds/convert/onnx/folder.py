"""The folder of an exported model: what lies in it, and what its config.json says.

image.onnx, text.onnx                    fp32; graphs of more than 2 GB have their weights beside them, in *.onnx.data
image.int8.onnx, text.int8.onnx          where int8 was asked for
tokenizer.model, tokenizer_config.json   sentencepiece
config.json                              `OnnxConfig`
README.md                                how to use it
metrics.json                             recalls, where they were measured
checksums.json                           SHA-256 of every file above; written last
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from m2_ds.convert.onnx.graph import Tower
from m2_ds.convert.run_folder import CHECKSUMS
from m2_ds.data.text import Tokenizer
from m2_ds.files import publish, sha256, sync, write_json
from m2_ds.model.config import M2EncoderConfig
from m2_ds.schema import Settings

Precision = Literal["fp32", "int8"]

CONFIG, README, METRICS = "config.json", "README.md", "metrics.json"
_FORMAT = "m2_ds-onnx"


class Preprocessing(Settings):
    """How a picture of any size becomes a row of ``pixel_values``. All of it is fixed: the model was trained so."""

    convert: Literal["RGB"] = "RGB"
    resample: Literal["bicubic"] = Field("bicubic", description="Pillow's, with its antialiasing")
    resize: Literal["square"] = Field(
        "square", description="to image_size x image_size; aspect ratio not kept, no crop"
    )
    scale: Literal["1/255"] = Field("1/255", description="to floats in [0, 1]; the graph normalises")
    layout: Literal["NCHW"] = "NCHW"


class OnnxConfig(Settings):
    """What a server has to know beside the graphs."""

    format: Literal["m2_ds-onnx"] = "m2_ds-onnx"
    format_version: Literal[1] = 1
    precisions: list[Precision] = Field(min_length=1)
    opset: int
    image_size: int = Field(description="side S of the square picture, pixels")
    embed_dim: int = Field(description="size E of the embeddings")
    max_text_length: int = Field(description="tokens that the tokenizer cuts a caption to, start and end counted")
    text_positions: int = Field(description="tokens of a caption that the graph takes at most")
    vocab_size: int = Field(description="token ids lie below it")
    logit_scale: float = Field(
        description="scores: softmax over captions of exp(logit_scale) * image_embeddings @ text_embeddings.T"
    )
    preprocessing: Preprocessing = Preprocessing()


def graph_name(tower: Tower, precision: Precision) -> str:
    return f"{tower}.onnx" if precision == "fp32" else f"{tower}.{precision}.onnx"


def refuse(config: M2EncoderConfig, tokenizer: Tokenizer | None, out: Path) -> Tokenizer:
    """Raises ValueError for what could not be used once it is written; otherwise the tokenizer."""
    if tokenizer is None:
        raise ValueError(
            "the model came without a tokenizer, and without one captions have no ids: put tokenizer.model beside its "
            "weights, or name one"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's table {config.vocab_size} rows: this is "
            "another model's tokenizer"
        )
    if tokenizer.max_length > config.text_positions - 2:
        raise ValueError(
            f"the tokenizer cuts captions to {tokenizer.max_length} tokens, the model has positions for "
            f"{config.text_positions - 2}: load it with max_length={config.max_text_length}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or give another folder")
    return tokenizer


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` with its checksums; where something is raised, nothing is left."""
    aside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        files = sorted(path for path in aside.iterdir())
        write_json(aside / CHECKSUMS, {path.name: sha256(path) for path in files})
        for path in files:
            sync(path)
        publish(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ValueError(f"{out} is not written: {error}. Look at free space, quota and rights") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_config(folder: Path) -> OnnxConfig:
    """Raises ValueError where the folder is none of these."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a folder that `m2 export onnx` wrote") from None
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f"{folder} was not written by `m2 export onnx`: its {CONFIG} is of another format")
    try:
        return OnnxConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{path} was not written by this version of m2_ds, or was changed: {error}") from None


def verify(folder: Path) -> None:
    """Compare every file with its checksum. Raises ValueError that names the first missing or changed one."""
    path = folder / CHECKSUMS
    try:
        listed = {str(name): digest for name, digest in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the folder again") from None
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: copy the folder again")
        if sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its checksum differs from the one in {CHECKSUMS}. Copy it again")
