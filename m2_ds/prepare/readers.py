"""Readers: one unit of any kind of input to pairs, in order.

What is wrong with a record is its `drop`; what is wrong with the file raises `BrokenShard` after the pairs before it.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2_ds.data.sources.captions import FieldError, read_captions, read_negatives
from m2_ds.data.sources.tar import read_tar
from m2_ds.prepare.config import InputConfig, PrepareConfig
from m2_ds.prepare.pairs import Drop, Pair
from m2_ds.prepare.units import missing_columns
from m2_ds.prepare.work import Unit

UNKNOWN = "und"  # ISO 639: a language that was not determined
_PARQUET_ROWS = 64  # rows in memory at a time: img2dataset writes row groups of 10,000 pictures
_MOST_LINE = 1 << 26
csv.field_size_limit(1 << 24)


class BrokenShard(Exception):
    """A file that can't be read, or not to its end. `again`: another attempt may help."""

    def __init__(self, detail: str, *, again: bool = False) -> None:
        super().__init__(detail)
        self.again = again


class Record(dict[str, Any]):
    """A record's fields as the file has them, with its name and what is wrong with it."""

    def __init__(self, name: str, fields: Any = (), drop: Drop | None = None) -> None:
        super().__init__(fields)
        self.name, self.drop = name, drop


def read_unit(unit: Unit, path: Path, config: PrepareConfig) -> Iterator[Pair]:
    """The pairs of a unit; `path` is its file on this machine.

    Raises:
        BrokenShard: after the last pair that could be read.
    """
    entry = config.inputs[unit.input]
    try:
        for record in _records(unit, path, entry, bool(config.fetch)):
            yield to_pair(record, unit, path, entry, config)
    except (OSError, pa.ArrowException, EOFError, csv.Error) as error:
        raise BrokenShard(f"{type(error).__name__}: {error}", again=isinstance(error, OSError)) from error


def _records(unit: Unit, path: Path, entry: InputConfig, fetches: bool) -> Iterator[Record]:
    if entry.kind == "jsonl":
        return _read_jsonl(unit, path)
    if entry.kind == "csv":
        return _read_csv(unit, path, entry, fetches)
    if entry.kind in ("parquet", "shards") or path.suffix == ".parquet":
        return _read_parquet(unit, path, entry, fetches)
    if entry.kind == "img2dataset":
        return _read_img2dataset(path)
    return _read_tar(path)


def _read_tar(path: Path) -> Iterator[Record]:
    trouble = ""
    for found in read_tar(path, "train", ""):
        if found.trouble and found.trouble[0] == "broken tar":
            # The file's own trouble, told once: what the records lost shows in their own rules.
            trouble = trouble or found.trouble[1]
            continue
        drop = Drop("bad_fields", found.trouble[1]) if found.trouble else None
        fields = dict(found.fields)
        if isinstance(found.captions, str) and not any(fields.get(n) for n in ("captions", "caption", "text")):
            fields["text"] = found.captions
        if found.image is not None:
            fields["image"] = found.image
        yield Record(found.name, fields, drop)
    if trouble:
        raise BrokenShard(trouble)


def _read_img2dataset(path: Path) -> Iterator[Record]:
    """A tar or a folder of its files; the Parquet file beside it tells what was never downloaded."""
    if path.is_dir():
        yield from _read_folder(path)
    else:
        yield from _read_tar(path)
    sidecar = path.with_suffix(".parquet") if not path.is_dir() else path.parent / f"{path.name}.parquet"
    if sidecar.exists():
        for batch in pq.ParquetFile(sidecar).iter_batches(use_threads=False):
            for row in batch.to_pylist():
                if row.get("status", "success") != "success":
                    why = f"{row['status']}: {row.get('error_message')}"
                    yield Record(str(row.get("key", "")), row, Drop("not_downloaded", why))


def _read_folder(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("_stats.json"):
            continue
        try:
            fields = json.loads(path.read_bytes())
            if not isinstance(fields, dict):
                raise ValueError("not an object")
        except ValueError as error:
            yield Record(path.stem, (), Drop("bad_fields", f"{path.name}: {error}"))
            continue
        if fields.get("status", "success") != "success" and not folder.with_suffix(".parquet").exists():
            why = f"{fields['status']}: {fields.get('error_message')}"
            yield Record(path.stem, fields, Drop("not_downloaded", why))
            continue
        images = [path.with_suffix(f".{kind}") for kind in ("jpg", "png", "webp")]
        fields["image"] = next((image.read_bytes() for image in images if image.exists()), None)
        yield Record(path.stem, fields)


def _read_jsonl(unit: Unit, path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        file.seek(unit.start)
        number = unit.first
        while unit.stop < 0 or file.tell() < unit.stop:
            line = file.readline(_MOST_LINE)
            if not line:
                return
            if len(line) == _MOST_LINE:
                raise BrokenShard(f"line {number + 1} is longer than {_MOST_LINE >> 20} MB: these are no JSON lines")
            number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                raw = line[:500].decode("utf-8", "replace")
                yield Record(f"{number}", {"raw": raw}, Drop("bad_line", f"line {number}: {error}"))
                continue
            yield Record(f"{number}", fields)


def _read_csv(unit: Unit, path: Path, entry: InputConfig, fetches: bool) -> Iterator[Record]:
    with open(path, "rb") as file:
        # The header may be a record of several lines; csv reads on until its quotes are closed.
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        header = next(csv.reader(lines, delimiter=entry.delimiter), [])
    if trouble := missing_columns(header, entry, fetches):
        raise BrokenShard(f"wrong schema: {trouble}")
    with open(path, "rb") as file:
        file.seek(unit.start)
        content = file if unit.stop < 0 else io.BytesIO(file.read(unit.stop - unit.start))
        text = io.TextIOWrapper(content, "utf-8", "surrogateescape", newline="")  # type: ignore[arg-type]
        rows = csv.reader(text, delimiter=entry.delimiter)
        for number, row in enumerate(rows, start=unit.first + 1):
            if number == 1 or not row:
                continue
            name = f"{number}"
            if len(row) != len(header):
                drop = Drop("bad_line", f"record {number}: {len(row)} fields, the header has {len(header)}")
                yield Record(name, {"raw": entry.delimiter.join(row)[:500]}, drop)
            elif any("\udc80" <= c <= "\udcff" for field in row for c in field if c > "\ud7ff"):
                yield Record(name, {"raw": " ".join(row)[:500]}, Drop("bad_line", f"record {number}: not UTF-8"))
            else:
                yield Record(name, zip(header, row))


def _read_parquet(unit: Unit, path: Path, entry: InputConfig, fetches: bool) -> Iterator[Record]:
    file = pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
    if trouble := missing_columns(file.schema_arrow.names, entry, fetches):
        raise BrokenShard(f"wrong schema: {trouble}")
    groups = range(unit.start, file.num_row_groups if unit.stop < 0 else unit.stop)
    number = unit.first
    for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, use_threads=False):
        try:
            rows: list[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_row(batch, place) for place in range(batch.num_rows)]
        for row in rows:
            number += 1
            if isinstance(row, Drop):
                yield Record(f"{number}", (), row)
            elif row.get("status", "success") not in ("success", None) and entry.kind == "img2dataset":
                why = f"{row['status']}: {row.get('error_message')}"
                yield Record(str(row.get("key", number)), row, Drop("not_downloaded", why))
            else:
                yield Record(f"{number}", row)


def _row(batch: pa.RecordBatch, place: int) -> dict[str, Any] | Drop:
    try:
        return dict(batch.slice(place, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        return Drop("bad_line", f"a text is not UTF-8: {error}")


def to_pair(record: Record, unit: Unit, path: Path, entry: InputConfig, config: PrepareConfig) -> Pair:
    """Fields of any file to a pair, by the input's mapping."""
    names = entry.fields
    pair = Pair(
        key=_key(record, unit, entry),
        source=_clean(record.get(names.source) or entry.name),
        license=_clean(record.get(names.license) or entry.license),
        shard=unit.file,
        raw=record.get("raw"),
        drop=record.drop,
    )
    pair.group = _clean(record.get(names.group) or pair.key)
    category = record.get(names.category)
    pair.category = None if category is None else _clean(category)
    language = record.get(names.language) or entry.language or UNKNOWN
    value = next((record[name] for name in names.captions if _given(record.get(name))), None)
    try:
        pair.captions = read_captions(value, _clean(language))
        pair.negatives = read_negatives(record.get("hard_negatives"))
    except FieldError as error:
        pair.drop = pair.drop or Drop(error.reason.replace(" ", "_"), str(error))
    for column in config.columns:
        pair.numbers[column.field] = _number(record.get(column.field))
    image = next((record[name] for name in names.image if record.get(name) is not None), None)
    if isinstance(image, dict):  # datasets writes pictures as {bytes, path}
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    url = record.get(names.url)
    if isinstance(image, str) and "://" in image:
        image, url = None, image
    if isinstance(image, str) and image:
        root = entry.images or path.parent
        pair.image = root / image
        # A record of someone else's file must not read what lies outside the folder that was named.
        if not _below(root, pair.image):
            pair.drop = pair.drop or Drop("missing_picture", f"{image!r} leads out of {root}")
    elif isinstance(image, bytes | bytearray):
        pair.image = bytes(image)
    elif isinstance(url, str):
        pair.url = url
    return pair


def _key(record: Record, unit: Unit, entry: InputConfig) -> str:
    """The record's own name where its file gives one, below the input's; else the file's name and the row."""
    key = record.get(entry.fields.key)
    if key in (None, "") or entry.kind in ("tar", "img2dataset"):
        return f"{unit.prefix}/{_clean(record.name)}"
    return _clean(key) if entry.kind == "shards" else f"{entry.name}/{_clean(key)}"


def _below(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _given(value: Any) -> bool:
    """Whether a field has a value: pandas writes what is missing as NaN."""
    return bool(value) and value == value


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _clean(value: Any) -> str:
    """Text that can be written: no lone surrogates, no control characters."""
    text = str(value).encode("utf-8", "replace").decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text).strip()
