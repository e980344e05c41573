"""Embeddings of a split: every picture once, every different caption once, on one process or several.

Shapes: N pictures, U different texts of a language, C captions (a caption is a text listed by a picture), E embedding.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from m2_ds.data.image import decode
from m2_ds.data.progress import track
from m2_ds.data.shards import Split
from m2_ds.files import publish
from m2_ds.parallel.collectives import all_gather_rows
from m2_ds.parallel.mesh import SOLO, Group

IMAGES_FILE, TEXTS_FILE = "images.parquet", "texts.parquet"


class Model(Protocol):
    """What evaluation asks of a model; features have unit length."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor: ...


class Processor(Protocol):
    """What evaluation asks of a processor."""

    def images(self, images: Sequence[Image.Image]) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TextEmbeddings:
    """Captions of one language. A text that several pictures list has one row of features and several captions."""

    texts: list[str]  # U, all different
    features: Tensor  # fp32 [U, E]
    text: Tensor  # int64 [C]: the caption's row in `texts`
    owner: Tensor  # int64 [C]: the picture that lists it


@dataclass(frozen=True)
class Embeddings:
    """Pictures in the split's order, and their captions by language. On the CPU."""

    image: Tensor  # fp32 [N, E]
    keys: list[str]
    groups: list[str]
    categories: list[str | None]
    texts: dict[str, TextEmbeddings] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What a split says about its pictures, without the pictures."""

    keys: list[str]
    groups: list[str]
    categories: list[str | None]
    captions: list[list[dict[str, Any]]]
    hard_negatives: list[list[dict[str, Any]]]

    def texts(self, language: str, kinds: Sequence[str] | None = None) -> tuple[list[str], Tensor, Tensor]:
        """Different texts of a language, and each caption's text and picture (int64 [C], [C])."""
        rows: dict[str, int] = {}
        pairs = dict.fromkeys(
            (rows.setdefault(caption["text"], len(rows)), owner)
            for owner, captions in enumerate(self.captions)
            for caption in captions
            if caption["language"] == language and (kinds is None or caption["kind"] in kinds)
        )
        text, owner = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T.copy()
        return list(rows), torch.from_numpy(text), torch.from_numpy(owner)


def list_split(split: Split, limit: int | None = None) -> Listing:
    """Read everything but the pictures of a split's first `limit` rows."""
    columns = ["key", "group", "category", "captions", "hard_negatives"]
    rows = [row for row, _ in zip(split.iter(columns), range(len(split) if limit is None else limit))]
    return Listing(
        keys=[row["key"] for row in rows],
        groups=[row["group"] for row in rows],
        categories=[row["category"] for row in rows],
        captions=[row["captions"] or [] for row in rows],
        hard_negatives=[row["hard_negatives"] or [] for row in rows],
    )


def embed_split(
    model: Model,
    processor: Processor,
    split: Split,
    batch_size: int,
    device: torch.device | str,
    languages: Sequence[str],
    caption_kinds: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    threads: int = 2,
    group: Group = SOLO,
) -> Embeddings:
    """Embed a split's pictures and its captions of the given languages (and kinds; None: all).

    Every rank of `group` must call it; each computes its share and all hold the whole. Raises ValueError for a picture
    that can't be decoded and for a language without captions.
    """
    listing = list_split(split, limit)
    texts = {}
    for language in languages:
        different, text, owner = listing.texts(language, caption_kinds)
        if not different:
            raise ValueError(
                f"split {split.name!r} of {split.folder} has no captions in {language!r}"
                f"{'' if caption_kinds is None else f' of kinds {list(caption_kinds)}'}; it has {dict(split.languages)}"
            )
        features = embed_texts(model, processor, different, batch_size, device, group=group, what=f"texts {language}")
        texts[language] = TextEmbeddings(different, features, text, owner)
    image = embed_images(model, processor, split, len(listing.keys), batch_size, device, threads=threads, group=group)
    return Embeddings(image, listing.keys, listing.groups, listing.categories, texts)


def embed_images(
    model: Model,
    processor: Processor,
    split: Split,
    count: int,
    batch_size: int,
    device: torch.device | str,
    *,
    threads: int = 2,
    group: Group = SOLO,
) -> Tensor:
    """fp32 [count, E] of the first `count` pictures; reading and decoding run ahead in `threads` threads."""
    share = -(-count // group.size)
    # Ranks at the end repeat the last picture: partitioned weights need every rank to run as often as the others.
    rows = [min(group.rank * share + i, count - 1) for i in range(share)]
    batches = [rows[first : first + batch_size] for first in range(0, share, batch_size)]

    def load(batch: list[int]) -> Tensor:
        pictures = []
        for record in split.read(batch):
            try:
                pictures.append(decode(record.image))
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"picture {record.key!r} of split {split.name!r} in {split.folder} can't be decoded ({error}): "
                    "evaluation leaves nothing out, so build the data set without it"
                ) from error
        return processor.images(pictures)

    what = f"pictures {split.name}"
    found = []
    with torch.no_grad(), ThreadPoolExecutor(threads) as pool:
        for images in _show(_ahead(pool, load, batches, threads + 1), what, len(batches), group):
            found.append(model.encode_image(images.to(device)).float())
    return _gather(torch.cat(found), group)[:count].cpu()


def embed_texts(
    model: Model,
    processor: Processor,
    texts: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    *,
    group: Group = SOLO,
    what: str = "texts",
) -> Tensor:
    """fp32 [U, E], in the order of `texts`; texts of like length share a batch, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row].encode()))
    share = -(-len(texts) // group.size)
    mine = [order[min(i * group.size + group.rank, len(texts) - 1)] for i in range(share)]
    found = []
    with torch.no_grad():
        for first in _show(range(0, share, batch_size), what, -(-share // batch_size), group):
            ids, mask = processor.texts([texts[row] for row in mine[first : first + batch_size]])
            found.append(model.encode_text(ids.to(device), mask.to(device)).float())
    by_rank = _gather(torch.cat(found), group).cpu()
    by_length = by_rank.view(group.size, share, -1).transpose(0, 1).reshape(group.size * share, -1)[: len(texts)]
    features = torch.empty_like(by_length)
    features[torch.tensor(order)] = by_length
    return features


def write_embeddings(embeddings: Embeddings, folder: Path) -> None:
    """`images.parquet` (key, group, category, embedding) and `texts.parquet` (language, text, keys, embedding)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {
        "key": pa.array(embeddings.keys, pa.string()),
        "group": pa.array(embeddings.groups, pa.string()),
        "category": pa.array(embeddings.categories, pa.string()),
        "embedding": _vectors(embeddings.image),
    }
    _write_table(pa.table(images), folder / IMAGES_FILE)
    parts = []
    for language, texts in embeddings.texts.items():
        owners: list[list[str]] = [[] for _ in texts.texts]
        for text, owner in zip(texts.text.tolist(), texts.owner.tolist()):
            owners[text].append(embeddings.keys[owner])
        columns = {
            "language": pa.array([language] * len(texts.texts), pa.string()),
            "text": pa.array(texts.texts, pa.string()),
            "keys": pa.array(owners, pa.list_(pa.string())),
            "embedding": _vectors(texts.features),
        }
        parts.append(pa.table(columns))
    if parts:
        _write_table(pa.concat_tables(parts), folder / TEXTS_FILE)


def read_embeddings(folder: Path) -> Embeddings:
    """What `write_embeddings` wrote. Raises ValueError that names a file which is missing or not of this form."""
    images = _read_table(folder / IMAGES_FILE, ("key", "group", "category", "embedding"))
    keys = images.column("key").to_pylist()
    rows = {key: row for row, key in enumerate(keys)}
    texts: dict[str, TextEmbeddings] = {}
    if (folder / TEXTS_FILE).exists():
        table = _read_table(folder / TEXTS_FILE, ("language", "text", "keys", "embedding"))
        languages = table.column("language").to_pylist()
        for language in dict.fromkeys(languages):
            part = table.filter(pa.array([other == language for other in languages]))
            pairs = [(text, rows[key]) for text, owners in enumerate(part.column("keys").to_pylist()) for key in owners]
            text, owner = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
            texts[language] = TextEmbeddings(part.column("text").to_pylist(), _tensor(part), text, owner)
    return Embeddings(
        _tensor(images), keys, images.column("group").to_pylist(), images.column("category").to_pylist(), texts
    )


def _ahead(pool: ThreadPoolExecutor, load: Any, batches: Sequence[list[int]], depth: int) -> Iterator[Tensor]:
    """Results in order, `depth` of them in the making."""
    waiting: deque[Future[Tensor]] = deque()
    for batch in batches:
        waiting.append(pool.submit(load, batch))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _show(items: Any, what: str, total: int, group: Group) -> Iterator[Any]:
    """Progress in batches, on the first rank."""
    return track(items, f"embedding {what} (batches)", total=total) if group.is_first else iter(items)


def _gather(mine: Tensor, group: Group) -> Tensor:
    return all_gather_rows(mine, group, "embeddings")


def _vectors(features: Tensor) -> pa.Array:
    flat = pa.array(features.float().contiguous().view(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(flat, features.shape[1])


def _tensor(table: pa.Table) -> Tensor:
    column = table.column("embedding").combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    flat = chunk.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).view(len(table), -1)


def _write_table(table: pa.Table, path: Path) -> None:
    aside = path.with_name(f".{path.name}.part")
    pq.write_table(table, aside, compression={n: "none" if n == "embedding" else "zstd" for n in table.column_names})
    publish(aside, path)


def _read_table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path} holds no embeddings ({error}): write them with `m2 embed`") from None
