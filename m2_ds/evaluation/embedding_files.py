"""Embeddings as Parquet, for other programs: `images.parquet` and `texts.parquet`."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from m2_ds.evaluation.embed import Embeddings, TextEmbeddings
from m2_ds.files import publish

IMAGES_FILE, TEXTS_FILE = "images.parquet", "texts.parquet"


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
