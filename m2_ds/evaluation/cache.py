"""Embeddings kept on disk, so that an evaluation that was killed goes on, and one that is repeated computes nothing.

    folder/<weights>/pictures-<key>.safetensors            a finished set of vectors
    folder/<weights>/pictures-<key>-<random>.part          what a process had computed until then; merged at the end

A key is the digest of everything that the vectors depend on: weights, preparation, batches and data. It is also inside
the file, and compared: vectors of anything else are never used. Files are whole or absent (m2_ds.files).

Legend: N rows, E embedding.
"""

import hashlib
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import m2_ds
from m2_ds.files import publish

FORMAT = 1
FLUSH_S = 10.0  # what a killed evaluation loses at most, on top of the batch in work

log = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """Rows of a set, and what was computed for them. ``marks``: numbers that say more about a row than its vector."""

    rows: Tensor  # int64 [n]
    features: Tensor  # fp32 [n, E]
    marks: Tensor  # int64 [n]


@dataclass(frozen=True)
class Identity:
    """Digests of what turns pictures and texts into vectors."""

    weights: str
    pictures: str
    texts: str

    @classmethod
    def of(cls, model: nn.Module, pictures: object, texts: object) -> "Identity":
        """``pictures`` and ``texts``: how they are prepared, in words that differ where the preparation does."""
        versions = [FORMAT, m2_ds.__version__, torch.__version__]
        return cls(digest(versions, model_digest(model)), digest(pictures), digest(texts))


def digest(*parts: object) -> str:
    """SHA-256 over JSON."""
    return hashlib.sha256(json.dumps(parts, default=str, ensure_ascii=False).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer with its name, kind and shape, of the device's kind and of the shape's
    description, where the model has one. Reads all weights: about a second for each 1.5 GB."""
    state = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}\n".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


class Cache:
    """A folder of embeddings of one model."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.root, self.identity = folder, identity
        self.folder = folder / identity.weights[:16]

    def pictures(self, *parts: object) -> "Store":
        """``parts``: the data, how it is decoded, and how it is put into batches."""
        return Store(self.folder, "pictures", digest(self.identity.weights, self.identity.pictures, parts))

    def texts(self, texts: Sequence[str], *parts: object) -> "Store":
        return Store(self.folder, "texts", digest(self.identity.weights, self.identity.texts, texts, parts))

    def forget_others(self) -> None:
        """Delete what other weights left in the folder."""
        for other in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if other.is_dir() and other != self.folder and re.fullmatch("[0-9a-f]{16}", other.name):
                log.info("deleting embeddings of other weights: %s", other)
                shutil.rmtree(other)


class Store:
    """One set of vectors in the cache."""

    def __init__(self, folder: Path, kind: str, key: str) -> None:
        self.folder, self.kind, self.key = folder, kind, key
        self._path = folder / f"{kind}-{key[:32]}.safetensors"
        self._held: list[Vectors] = []
        self._flushed = time.monotonic()

    def load(self) -> Vectors | None:
        """What is there: all rows, or those of the finished parts."""
        paths = [self._path] if self._path.exists() else self._parts()
        found = [vectors for path in paths if (vectors := self._read(path)) is not None]
        if not found:
            return None
        joined = Vectors(*(torch.cat(columns) for columns in zip(*found)))
        log.info("%s: %d rows are taken from %s", self.kind, len(joined.rows), self.folder)
        return joined

    def add(self, vectors: Vectors) -> None:
        """Keep what this process has computed; on disk every `FLUSH_S` seconds."""
        self._held.append(Vectors(*(column.cpu() for column in vectors)))
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            # A name that no other process, and no earlier one, has.
            part = f"{self._path.stem}-{uuid.uuid4().hex[:12]}.part"
            self._write(self.folder / part, Vectors(*(torch.cat(columns) for columns in zip(*self._held))))
            self._held = []
        self._flushed = time.monotonic()

    def finish(self, vectors: Vectors) -> None:
        """Write the whole set; the parts go. One process calls it, when no other computes for the set any more."""
        self._write(self._path, vectors)
        self._held = []
        for left in (*self._parts(), *self.folder.glob(f".{self._path.stem}*")):
            left.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._path.stem}-*.part"))

    def _write(self, path: Path, vectors: Vectors) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        tensors = {name: column.contiguous() for name, column in vectors._asdict().items()}
        save_file(tensors, aside, metadata={"key": self.key, "kind": self.kind})
        publish(aside, path)

    def _read(self, path: Path) -> Vectors | None:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    log.warning("%s holds embeddings of something else: they are computed again", path)
                    return None
                return Vectors(*(file.get_tensor(name) for name in Vectors._fields))
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s): its embeddings are computed again", path, error)
            return None
