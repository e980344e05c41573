"""From the inputs of a configuration to units of work, the same ones every time.

A tar, an img2dataset folder and a remote file are one unit each; JSONL and CSV files are cut at line ends and Parquet
files at row groups, into units of `unit_records` records, so that one large file keeps all workers busy.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.shardlists import expand_urls

from m2_ds.data.reader import open_dataset
from m2_ds.prepare.config import InputConfig, PrepareConfig
from m2_ds.prepare.work import Unit


def is_remote(file: str) -> bool:
    """Whether a name is a URL, to be opened by fsspec."""
    return "://" in file


def list_files(entry: InputConfig, skip_missing: bool) -> tuple[list[str], list[str]]:
    """(files of an input in order, names for which there is none).

    Raises:
        ValueError: a name or pattern without a file, unless `skip_missing`.
    """
    if entry.kind == "shards":
        files = [f"{folder}/{file}" for folder in entry.files for file in _shards(folder, entry.split)]
    else:
        files = []
    missing = []
    for pattern in entry.files if entry.kind != "shards" else []:
        for name in expand_urls(pattern):
            found = _matches(name)
            if entry.kind == "img2dataset":
                found = [file for folder in found for file in _img2dataset(folder)]
            if not found:
                missing.append(name)
            files += found
    missing += [file for file in files if not is_remote(file) and not Path(file).exists()]
    if missing and not skip_missing:
        raise ValueError(
            f"input {entry.name!r}: {missing[0]}: no such file" + (f" ({len(missing)} in all)" * (len(missing) > 1))
            + "; correct `files`, or set skip_broken_shards: true to go on without"
        )  # fmt: skip
    return list(dict.fromkeys(file for file in files if file not in missing)), missing


def _matches(name: str) -> list[str]:
    if is_remote(name):
        if not glob.has_magic(name):
            return [name]
        system, path = fsspec.core.url_to_fs(name)
        return [system.unstrip_protocol(found) for found in sorted(system.glob(path))]
    return sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).exists()


def _shards(folder: str, name: str) -> list[str]:
    return open_dataset(folder).index(name).files()


def _img2dataset(name: str) -> list[str]:
    """An output folder's tars, or else its numbered folders, or else its Parquet files; a file is itself."""
    folder = Path(name)
    if is_remote(name) or not folder.is_dir():
        return [name]
    tars = sorted(map(str, folder.glob("*.tar")))
    folders = sorted(str(path) for path in folder.iterdir() if path.is_dir() and any(path.glob("*.json")))
    return tars or folders or ([name] if any(folder.glob("*.json")) else sorted(map(str, folder.glob("*.parquet"))))


def stamp(file: str) -> list[int] | None:
    """[size, time of the last change in ns] of a file, by which a change is noticed; None: it is not there."""
    if is_remote(file):
        try:
            info = fsspec.core.url_to_fs(file)[0].info(file)
        except (OSError, ValueError):
            return None
        return [int(info.get("size") or 0), 0]
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size if not Path(file).is_dir() else 0, status.st_mtime_ns]


def plan(config: PrepareConfig) -> tuple[list[Unit], dict[str, list[int] | None]]:
    """(units in the order of the input, stamps of all files).

    Raises:
        ValueError: a file that is missing, two inputs with one file, or fields that a file's columns do not have.
    """
    units: list[Unit] = []
    stamps: dict[str, list[int] | None] = {}
    for number, entry in enumerate(config.inputs):
        files, missing = list_files(entry, config.skip_broken_shards)
        if twice := [file for file in files if file in stamps]:
            raise ValueError(f"input {entry.name!r}: {twice[0]} is named by another input, too")
        stamps.update(dict.fromkeys(missing))
        units += [Unit(len(units) + i, number, file, entry.name) for i, file in enumerate(missing)]
        prefixes = _prefixes(entry.name, files)
        for place, file in enumerate(files):
            stamps[file] = stamp(file)
            if place == 0 and not is_remote(file):
                check_columns(file, entry, bool(config.fetch))
            for start, stop, first in _pieces(file, entry, config.unit_records):
                units.append(Unit(len(units), number, file, prefixes[place], start, stop, first))
    if not units:
        raise ValueError("the inputs have no files: nothing to prepare")
    return units, stamps


def _prefixes(name: str, files: list[str]) -> list[str]:
    """Source and file as the beginning of keys: as much of the path as tells the files apart."""
    stems = [file.rsplit("/", 1)[-1].split(".")[0] for file in files]
    if len(set(stems)) == len(stems):
        return [f"{name}/{stem}" for stem in stems]
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    return [f"{name}/{os.path.splitext(os.path.relpath(file, common))[0]}" for file in files]


def _pieces(file: str, entry: InputConfig, records: int) -> Iterator[tuple[int, int, int]]:
    if is_remote(file) or entry.kind in ("tar", "img2dataset"):
        yield 0, -1, 0
    elif entry.kind in ("jsonl", "csv"):
        yield from _line_pieces(file, records, quotes=entry.kind == "csv")
    else:
        yield from _row_group_pieces(file, records)


def _line_pieces(file: str, records: int, quotes: bool) -> Iterator[tuple[int, int, int]]:
    """Bytes (start, stop) of every `records` lines. In CSV a line end between quotes is no record's end."""
    start = first = place = count = open_quotes = 0
    try:
        with open(file, "rb") as lines:
            # In pieces: a file without line ends must not fill the memory.
            while line := lines.readline(1 << 20):
                place += len(line)
                if quotes:
                    open_quotes ^= line.count(b'"') & 1
                if line.endswith(b"\n") and not open_quotes:
                    count += 1
                    if count - first >= records:
                        yield start, place, first
                        start, first = place, count
    except OSError:
        pass  # the unit's own reading tells it
    if place > start or not place:
        yield start, -1, first


def _row_group_pieces(file: str, records: int) -> Iterator[tuple[int, int, int]]:
    try:
        metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        yield 0, -1, 0
        return
    start = first = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows - first >= records or group == metadata.num_row_groups - 1:
            yield start, group + 1, first
            start, first = group + 1, rows


def check_columns(file: str, entry: InputConfig, fetches: bool) -> None:
    """Complain about a mapping that fits no file before the work begins, by an input's first file."""
    if entry.kind == "csv":
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            there = [name.strip('" \r\n') for name in lines.readline().split(entry.delimiter)]
    elif entry.kind == "parquet":
        try:
            there = pq.read_schema(file).names
        except (OSError, pa.ArrowException):
            return  # a broken file: reported when its turn comes
    else:
        return
    if trouble := missing_columns(there, entry, fetches):
        raise ValueError(f"input {entry.name!r}: {file}: {trouble}; set inputs.fields to its columns")


def missing_columns(there: list[str], entry: InputConfig, fetches: bool) -> str:
    """What a table lacks, '' if nothing: one of the caption columns, and one for the picture."""
    names = entry.fields
    if not set(names.captions) & set(there):
        return f"no column for captions ({', '.join(names.captions)}) among {', '.join(there)}"
    if not set(names.image) & set(there) and not (fetches and names.url in there):
        hint = f" (there is {names.url!r}: set `fetch` to download it)" if names.url in there else ""
        return f"no column for pictures ({', '.join(names.image)}) among {', '.join(there)}{hint}"
    return ""
