"""CLIP-like models that say how well captions fit pictures, and users' functions, each made once a worker."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from m2_ds.prepare.config import SimilarityConfig


@dataclass(frozen=True)
class Item:
    """What a user's function is given of a record."""

    key: str
    source: str
    picture: Image.Image
    captions: list[tuple[str, str]]  # (language, text)


class Scorer(Protocol):
    """Cosine similarities of pictures and texts, pair by pair: float32 [pairs]."""

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], of: Sequence[int]) -> np.ndarray:
        """`of` [pairs]: which picture each text belongs to."""


class M2Scorer:
    """A model of this project, as `m2_ds.load` opens it."""

    def __init__(self, model: str, device: str) -> None:
        import torch

        from m2_ds.api import load

        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        self.torch, self.device = torch, device
        self.model, self.processor = load(model, device)
        if self.processor.tokenizer is None:
            raise ValueError(f"similarity.model {model}: it has no tokenizer; put tokenizer.model beside its weights")

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], of: Sequence[int]) -> np.ndarray:
        with self.torch.inference_mode():
            images = self.model.encode_image(self.processor.images(pictures).to(self.device))
            ids, mask = self.processor.texts(texts)
            captions = self.model.encode_text(ids.to(self.device), mask.to(self.device))
            return _cosine(self.torch, images, captions, of)


class HuggingFaceScorer:
    """A model of transformers with get_image_features and get_text_features: CLIP, Chinese-CLIP, SigLIP ..."""

    def __init__(self, model: str, device: str) -> None:
        import torch
        from transformers import AutoModel, AutoProcessor

        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        self.torch, self.device = torch, device
        try:
            self.model = AutoModel.from_pretrained(model).to(device).eval()
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"similarity.model {model}: transformers can't load it: {error}") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ValueError(f"similarity.model {model}: {type(self.model).__name__} gives no features of both sides")

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], of: Sequence[int]) -> np.ndarray:
        with self.torch.inference_mode():
            pixels = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
            # SigLIP was trained with texts padded to full length, and says so in its tokenizer.
            padding = "max_length" if "siglip" in type(self.model).__name__.lower() else True
            ids = self.processor(text=list(texts), padding=padding, truncation=True, return_tensors="pt").to(
                self.device
            )
            images = _features(self.model.get_image_features(**pixels))
            captions = _features(self.model.get_text_features(**ids))
            return _cosine(self.torch, images, captions, of)


def _features(output: Any) -> Any:
    """The tensor of features, which newer releases of transformers put into an object."""
    return output if hasattr(output, "norm") else output.pooler_output


def _cosine(torch: Any, images: Any, captions: Any, of: Sequence[int]) -> np.ndarray:
    images = torch.nn.functional.normalize(images.float(), dim=-1)[torch.tensor(list(of), device=images.device)]
    captions = torch.nn.functional.normalize(captions.float(), dim=-1)
    return np.asarray((images * captions).sum(-1).cpu().numpy())


@functools.lru_cache(maxsize=2)
def open_scorer(kind: str, model: str, device: str) -> Scorer:
    """A scorer, made once a worker."""
    return HuggingFaceScorer(model, device) if kind == "hugging_face" else M2Scorer(model, device)


def scorer_of(config: SimilarityConfig) -> Scorer:
    return open_scorer(config.kind, config.model, config.device)


def find_function(spec: str, home: Path) -> Any:
    """What a user's `module:name` or `file.py:name` stands for, looked up from the folder of the configuration.

    Raises:
        ValueError: it is not there, or can't be imported.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"function {spec!r}: write it as module:name or file.py:name")
    try:
        if where.endswith(".py"):
            path = home / where
            location = importlib.util.spec_from_file_location(path.stem, path)
            if location is None or location.loader is None or not path.is_file():
                raise ImportError(f"there is no file {path}")
            module = importlib.util.module_from_spec(location)
            location.loader.exec_module(module)
        else:
            if str(home) not in sys.path:
                sys.path.insert(0, str(home))
            module = importlib.import_module(where)
        found = getattr(module, name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"function {spec!r} can't be opened: {error}") from error
    if not callable(found):
        raise ValueError(f"function {spec!r} is no function but {type(found).__name__}")
    return found


@functools.lru_cache(maxsize=16)
def open_function(spec: str, home: Path) -> Callable[[list[Item]], Any]:
    """A user's function, or an object of a user's class, made once a worker."""
    found = find_function(spec, home)
    made: Any = found() if inspect.isclass(found) else found
    return made  # type: ignore[no-any-return]


def call(spec: str, home: Path, items: list[Item]) -> list[Any]:
    """What a user's function answers about a batch, one entry an item.

    Raises:
        ValueError: it fails, or answers with another number of entries; names the function and the first record.
    """
    if not items:
        return []
    function = open_function(spec, home)
    try:
        answer = list(function(items))
    except Exception as error:  # the user's own
        raise ValueError(
            f"function {spec!r} failed on the batch that starts with {items[0].key!r}: {type(error).__name__}: {error}"
        ) from error
    if len(answer) != len(items):
        raise ValueError(
            f"function {spec!r} gave {len(answer)} answers about the {len(items)} records from {items[0].key!r} on; "
            "one for each is needed"
        )
    return answer
