"""A model as a folder that transformers loads anywhere, with its code, its tokenizer and a model card.

OUT/config.json                                 fields of the network, and which classes of the files below read them
OUT/model.safetensors                           or model-00001-of-0000N.safetensors and their index
OUT/tokenizer.model, tokenizer_config.json      sentencepiece
OUT/processor_config.json                       how pictures are made
OUT/*.py                                        the code (m2_ds.convert.hugging_face.code)
OUT/README.md                                   the model card
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from m2_ds.convert.canonical import INDEX, SINGLE
from m2_ds.convert.hugging_face import (
    M2EncoderConfig,
    M2EncoderImageProcessor,
    M2EncoderModel,
    M2EncoderProcessor,
    M2EncoderTokenizer,
)
from m2_ds.convert.hugging_face.card import model_card
from m2_ds.convert.hugging_face.code import published_code
from m2_ds.convert.hugging_face.run_facts import RunFacts
from m2_ds.data.text import MODEL_FILE, Tokenizer
from m2_ds.files import publish, sync, write_json
from m2_ds.model.config import M2EncoderConfig as NetworkConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import MASKED_HEADS

Dtype = Literal["float32", "bfloat16", "float16"]
_CONFIGURATION, _MODELING, _PROCESSING = (f"{name}_m2_encoder" for name in ("configuration", "modeling", "processing"))
_MODEL_CLASS = f"{_MODELING}.{M2EncoderModel.__name__}"
_PROCESSOR_CLASS = {"AutoProcessor": f"{_PROCESSING}.{M2EncoderProcessor.__name__}"}


def export(
    model: M2Encoder,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    dtype: Dtype = "float32",
    run: RunFacts | None = None,
    license: str | None = None,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Write a whole model to a folder that does not exist yet; it is there as a whole or not at all.

    Heads of masked objectives are left out. ``run``, ``license``: for the model card. Raises ValueError for what could
    not be loaded or used.
    """
    if tokenizer is None:
        raise ValueError(
            "the model came without a tokenizer, and without one captions have no ids: put tokenizer.model beside its "
            "weights, or name one"
        )
    config = model.config.without_masked_heads()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(MASKED_HEADS)}
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's table {config.vocab_size} rows: this is "
            "another model's tokenizer"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _write_weights(aside, state, getattr(torch, dtype), max_file_bytes)
        _write_config(aside, config, dtype)
        _write_processor(aside, config, tokenizer)
        for name, text in published_code().items():
            (aside / name).write_text(text, encoding="utf-8")
        parameters = sum(tensor.numel() for tensor in state.values())
        card = model_card(out.resolve().name, config, parameters, dtype, tokenizer.kind, run, license)
        (aside / "README.md").write_text(card, encoding="utf-8")
        for path in aside.iterdir():
            sync(path)
        publish(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_weights(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int) -> None:
    """One file in memory at a time, beside the model itself."""
    files = list(_cut(state, dtype, max_bytes))
    names = [
        SINGLE if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for name, members in zip(names, files):
        tensors = {each: state[each].detach().to("cpu", dtype, copy=True).contiguous() for each in members}
        if lost := [each for each, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"{lost[0]} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}; float16 reaches "
                "65504, bfloat16 and float32 much further"
            )
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets the owner alone read
    if len(files) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
        weight_map = {each: name for name, members in zip(names, files) for each in members}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cut(state: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int) -> Iterator[list[str]]:
    """Names in files of at most ``max_bytes``, or of one tensor."""
    members: list[str] = []
    used = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if members and used + size > max_bytes:
            yield members
            members, used = [], 0
        members.append(name)
        used += size
    yield members


def _write_config(folder: Path, config: NetworkConfig, dtype: Dtype) -> None:
    classes = {"AutoConfig": f"{_CONFIGURATION}.{M2EncoderConfig.__name__}"}
    classes |= dict.fromkeys(("AutoModel", "AutoModelForZeroShotImageClassification"), _MODEL_CLASS)
    M2EncoderConfig(
        **config.model_dump(mode="json"), architectures=[M2EncoderModel.__name__], auto_map=classes, dtype=dtype
    ).save_pretrained(folder)


def _write_processor(folder: Path, config: NetworkConfig, tokenizer: Tokenizer) -> None:
    tokenizer.save(folder)
    texts = M2EncoderTokenizer(
        str(folder / MODEL_FILE),
        model_max_length=tokenizer.max_length,
        truncation_side=tokenizer.truncation,
        auto_map={"AutoTokenizer": [f"{_PROCESSING}.{M2EncoderTokenizer.__name__}", None], **_PROCESSOR_CLASS},
    )
    side = config.image_size
    pictures = M2EncoderImageProcessor(
        {"height": side, "width": side},
        auto_map={"AutoImageProcessor": f"{_PROCESSING}.{M2EncoderImageProcessor.__name__}", **_PROCESSOR_CLASS},
    )
    both: Any = M2EncoderProcessor(pictures, texts)
    both.auto_map = dict(_PROCESSOR_CLASS)
    both.save_pretrained(folder)
