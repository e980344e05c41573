"""Use from Python: load a model with its processor. Legend: B pictures or captions, S image side, L tokens."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from m2_ds.convert.canonical import read_config, read_weights
from m2_ds.convert.fit import shapes_of
from m2_ds.convert.release import find_release_config, read_release
from m2_ds.convert.source import resolve, verify_weights
from m2_ds.data.image import EvalTransform
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import load_weights
from m2_ds.model.weights import init_weights

if TYPE_CHECKING:
    from m2_ds.convert.onnx.folder import Precision
    from m2_ds.convert.onnx.session import OnnxModel


class Processor:
    """Pictures and captions to the tensors that the model takes."""

    def __init__(self, image_size: int, tokenizer: Tokenizer | None) -> None:
        self.image_size = image_size
        self.tokenizer = tokenizer
        self._transform = EvalTransform(image_size)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL pictures of any size and mode -> uint8 [B, 3, S, S] (resized to the square, as the release does)."""
        return torch.stack([self._transform(image) for image in images])

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids int64 [B, L] and mask int64 [B, L] (1 token, 0 padding), L the longest of them."""
        if self.tokenizer is None:
            raise ValueError(
                "this model came without a tokenizer. Put tokenizer.model (the release's sentencepiece file or the one "
                "that the model was trained with) beside its weights, or set "
                "processor.tokenizer = m2_ds.data.text.load_tokenizer(path)"
            )
        return self.tokenizer.encode(list(texts))


def load(
    path_or_preset: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[M2Encoder, Processor]:
    """A model in evaluation mode and its processor.

    ``path_or_preset``: a run folder (its newest good checkpoint), a checkpoint, a canonical folder, a release ``.ckpt``
    with its configuration JSON beside it, or a preset name (random weights). Raises ValueError that says what is wrong
    with the files.
    """
    if str(path_or_preset) in PRESETS:
        config = M2EncoderConfig.preset(str(path_or_preset))
        model = M2Encoder(config)
        init_weights(model, config, seed=0)
        return model.to(device, dtype).eval(), Processor(config.image_size, None)
    if not Path(path_or_preset).exists():
        raise ValueError(f"{path_or_preset} does not exist and is no preset ({', '.join(PRESETS)})")
    source = resolve(Path(path_or_preset))
    config = find_release_config(source)[1] if source.is_file() else read_config(source)
    state = _read(source)
    shapes_of(config, source, len(state))  # sizes that no checkpoint has are refused before anything is made of them
    with torch.device("meta"):
        model = M2Encoder(config)
    model.to_empty(device="cpu")
    load_weights(model, config, state, str(source), tell=_warn)
    tokenizer = _find_tokenizer(source, config.max_text_length)
    return model.to(device, dtype).eval(), Processor(config.image_size, tokenizer)


def load_onnx(
    folder: str | Path, precision: "Precision" = "fp32", *, threads: int = 0, providers: Sequence[str] | None = None
) -> tuple["OnnxModel", Processor]:
    """The model that `m2 export onnx` wrote to a folder, computed by onnxruntime, and its processor.

    ``precision``: fp32, or int8 where it was exported; ``threads`` of one call, 0: one a core; ``providers``:
    onnxruntime's, in order of preference, None: the CPU. Raises ValueError that says what is wrong with the files.
    """
    from m2_ds.convert.onnx.session import CPU, open_model  # onnxruntime is needed here alone

    model = open_model(Path(folder), precision, threads=threads, providers=providers or (CPU,))
    return model, Processor(model.config.image_size, load_tokenizer(folder, max_length=model.config.max_text_length))


def load_into(
    model: M2Encoder,
    config: M2EncoderConfig,
    path: Path,
    opened: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Load weights from any of the layouts that `load` takes into a model that exists; resizes vision positions.

    A model that is cut over ranks takes its pieces; ``opened`` as in `m2_ds.model.weights.fill`.
    """
    source = resolve(path)
    load_weights(model, config, _read(source), str(source), tell=_warn, opened=opened)


def _read(source: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of what `resolve` found."""
    if source.is_file():
        return read_release(source)
    verify_weights(source)
    return read_weights(source)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _find_tokenizer(source: Path, max_length: int) -> Tokenizer | None:
    folder = source.parent if source.is_file() else source
    for candidate in ("tokenizer_config.json", "tokenizer.model", "sp.model"):
        if (folder / candidate).exists():
            where = folder if candidate == "tokenizer_config.json" else folder / candidate
            return load_tokenizer(where, max_length=max_length)
    return None
