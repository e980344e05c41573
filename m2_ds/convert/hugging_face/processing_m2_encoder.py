"""Pictures and captions for the M2-Encoder in transformers: the rules of m2_ds.api.Processor.

Legend: B pictures or captions, S image side, L tokens.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizer, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from m2_ds.data.text import DEFAULT_MAX_LENGTH, MODEL_FILE, TokenizerConfig, load_tokenizer


class M2EncoderImageProcessor(BaseImageProcessor):
    """RGB, then bicubic resize to the square, aspect ratio not kept, no crop; the model normalises."""

    model_input_names: Any = ["pixel_values"]

    def __init__(self, size: dict[str, int] | None = None, do_rescale: bool = True, **kwargs: Any) -> None:
        """``size``: height and width S; ``do_rescale``: floats in [0, 1], else uint8 (the model takes both)."""
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224} if size is None else dict(size)
        if self.size.keys() != {"height", "width"} or self.size["height"] != self.size["width"]:
            raise ValueError(f"size is {size}; the model takes squares, such as {{'height': 224, 'width': 224}}")
        self.do_rescale = do_rescale

    def preprocess(
        self, images: Any, do_rescale: bool | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """PIL pictures, arrays or URLs -> pixel_values [B, 3, S, S], float32 or uint8."""
        if other := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(
                f"{', '.join(other)}: pictures are made as the model was trained; only do_rescale can be set"
            )
        pictures: Any = make_flat_list_of_images(self.fetch_images(images))
        pixels = np.stack(
            [self._square(each if isinstance(each, Image.Image) else to_pil_image(each)) for each in pictures]
        )
        if self.do_rescale if do_rescale is None else do_rescale:
            pixels = pixels.astype(np.float32) / np.float32(255)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _square(self, picture: Image.Image) -> np.ndarray:
        """uint8 [3, S, S], as m2_ds.data.image.EvalTransform, whose module brings all of training's augmentation."""
        side = self.size["height"]
        return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


class M2EncoderTokenizer(PreTrainedTokenizer):
    """The tokenizers of m2_ds.data.text, of either kind: told from the pieces of the sentencepiece model.

    Ids, truncation (on the kind's side) and mask are theirs. A text is cut to ``model_max_length`` unless
    ``truncation=False`` is said.
    """

    vocab_files_names: Any = {"vocab_file": MODEL_FILE}
    model_input_names: Any = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        # Given where the folder was written by m2_ds.data.text itself.
        saved = {name: kwargs.pop(name) for name in TokenizerConfig.model_fields if name in kwargs}
        length = int(kwargs.pop("model_max_length", saved.get("max_length", DEFAULT_MAX_LENGTH)))
        self._inner = load_tokenizer(vocab_file, max_length=length)
        sides = {"truncation_side": saved.get("truncation", self._inner.truncation), "padding_side": "right"}
        roles = {f"{role}_token": piece for role, piece in self._inner.required.items()}
        self._pieces = [self._inner._sp.id_to_piece(i) for i in range(self._inner.vocab_size)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        super().__init__(model_max_length=length, **{**sides, **roles, **kwargs})

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """The pieces of a text. Which special strings count in it is the inner tokenizer's matter."""
        return self._inner.pieces(text)[1:-1]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if token_ids_1 is not None:
            raise ValueError("captions come one by one; this tokenizer knows no pairs of texts")
        return [self._inner.cls_id, *token_ids_0, self._inner.eos_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(i in self._inner.special_ids) for i in token_ids_0]
        return [1, *(0 for _ in token_ids_0), 1]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text between special tokens, which stand for themselves."""
        parts: list[str] = []
        for special, group in groupby(tokens, key=lambda token: self._ids[token] in self._inner.special_ids):
            run = list(group)
            parts += run if special else [self._inner.decode([self._ids[token] for token in run])]
        return " ".join(parts)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{MODEL_FILE}"
        path.write_bytes(self._inner._model)
        return (str(path),)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._inner.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def _get_padding_truncation_strategies(self, padding: Any = False, truncation: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super()._get_padding_truncation_strategies(padding, True if truncation is None else truncation, **kwargs)


class M2EncoderProcessor(ProcessorMixin):
    """Pictures and captions at once: pixel_values, input_ids and attention_mask, captions padded to the longest."""

    text_kwargs: Any = {"padding": True}

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
