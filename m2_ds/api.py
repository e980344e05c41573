"""Use from Python: load a model with its processor. Legend: B pictures or captions, S image side, L tokens."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from m2_ds.convert.canonical import read_config, read_weights, weight_files
from m2_ds.convert.release import find_release_config, read_release
from m2_ds.convert.run_folder import CHECKPOINTS, CHECKSUMS, MODEL, newest_good, verify
from m2_ds.data.image import EvalTransform
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.model.config import PRESETS, M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import load_weights
from m2_ds.model.weights import init_weights


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
    source = resolve(Path(path_or_preset))
    config = find_release_config(source)[1] if source.is_file() else read_config(source)
    with torch.device("meta"):
        model = M2Encoder(config)
    model.to_empty(device="cpu")
    load_into(model, config, source)
    tokenizer = _find_tokenizer(source, config.max_text_length)
    return model.to(device, dtype).eval(), Processor(config.image_size, tokenizer)


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
    state = read_release(source) if source.is_file() else read_weights(source)
    load_weights(
        model,
        config,
        state,
        str(source),
        tell=lambda message: warnings.warn(message, stacklevel=3),
        opened=opened,
    )


def resolve(path: Path) -> Path:
    """The canonical folder or release file that a path stands for."""
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist and is no preset ({', '.join(PRESETS)})")
    if (path / CHECKPOINTS).is_dir():
        newest = newest_good(path / CHECKPOINTS, part=f"{MODEL}/")
        if newest is None:
            raise ValueError(f"{path} is a run folder without a good checkpoint")
        path = newest
    elif (path / CHECKSUMS).exists():
        verify(path, part=f"{MODEL}/")
    if (path / MODEL).is_dir():
        path = path / MODEL
    weight_files(path)
    return path


def _find_tokenizer(source: Path, max_length: int) -> Tokenizer | None:
    folder = source.parent if source.is_file() else source
    for candidate in ("tokenizer_config.json", "tokenizer.model", "sp.model"):
        if (folder / candidate).exists():
            where = folder if candidate == "tokenizer_config.json" else folder / candidate
            return load_tokenizer(where, max_length=max_length)
    return None
