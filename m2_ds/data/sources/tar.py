"""Tars in webdataset's form: files of one name belong together, as 0001.jpg, 0001.txt, 0001.json."""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tyro.conf import Positional
from webdataset import tariterators
from webdataset.shardlists import expand_urls

from m2_ds.data.decode import MAX_PIXELS
from m2_ds.data.shards import Dataset
from m2_ds.data.sources.conversion import Candidate, Defaults, by_split, write

PICTURES = ("jpg", "jpeg", "png", "webp")
_CAPTION_FIELDS = ("captions", "caption", "text")


def expand(pattern: str) -> list[Path]:
    """Files of a pattern: braces as in {0000..0099}, then * and ?.

    Raises:
        ValueError: a name for which there is no file.
    """
    files = []
    for name in expand_urls(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found or not Path(found[0]).is_file():
            raise ValueError(f"{name}: no such file (of pattern {pattern!r}); nothing was converted")
        files += [Path(file) for file in found]
    return files


def read_tar(path: Path, split: str, prefix: str) -> Iterator[Candidate]:
    """The records of one tar. What follows a damaged place can't be read: that is one candidate with its trouble."""
    troubles: list[str] = []

    def note(error: Exception) -> bool:
        troubles.append(str(error.args[0] if error.args else error))
        return True

    # The library's steps, one tar at a time, so that a message can name it.
    with open(path, "rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}], handler=note)
        for sample in tariterators.group_by_keys(files, handler=note):
            if "__key__" in sample:
                yield _candidate(sample, path, split, prefix)
            while troubles:
                yield Candidate(str(path), sample.get("__key__", ""), split, "", trouble=("broken tar", troubles.pop()))
    if not troubles and not _ends_well(path):
        troubles.append("the end marker is missing: the file was cut short, or its writer did not finish")
    while troubles:
        yield Candidate(str(path), "", split, "", trouble=("broken tar", troubles.pop()))


def _ends_well(path: Path) -> bool:
    """Whether an uncompressed tar has its end marker; a reader takes a cut between two files for the end."""
    with open(path, "rb") as file:
        if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
            return True  # the decompressor has complained already if it was cut
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 1024))
        return not file.read().strip(b"\0")


def _candidate(sample: dict[str, Any], path: Path, split: str, prefix: str) -> Candidate:
    name = sample["__key__"]
    candidate = Candidate(str(path), name, split, f"{prefix}/{name}")
    candidate.image = next((sample[kind] for kind in PICTURES if kind in sample), None)
    try:
        if "json" in sample:
            candidate.fields = json.loads(sample["json"])
            if not isinstance(candidate.fields, dict):
                raise ValueError("not an object")
        candidate.captions = next(
            (candidate.fields[field] for field in _CAPTION_FIELDS if candidate.fields.get(field)), None
        )
        if candidate.captions is None and "txt" in sample:
            candidate.captions = sample["txt"].decode("utf-8")
    except ValueError as error:
        candidate.trouble = ("bad fields", f"txt or json can't be read: {error}")
    return candidate


def convert(
    out: Positional[Path],
    tars: Positional[tuple[str, ...]],
    *,
    name: str | None = None,
    language: str | None = None,
    license: str = "unknown",
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Webdataset tars to shards. Captions come from .json (captions, caption or text) or else from .txt.

    In .json a caption is a text, a list of texts, or a mapping from language to either; group, category, source,
    license and hard_negatives are taken over too. Records that can't be used are counted by reason, and named in
    skipped.jsonl.

    Args:
        out: folder of the data set.
        tars: patterns such as 'data/{0000..0099}.tar' or 'val=data/val-*.tar'; without a split they are for train.
        name: the data set's name; by default the folder's.
        language: of captions that do not say theirs; by default zh or en, by script.
        license: of records that do not say theirs.
        max_pixels: larger pictures are left out.
        workers: processes that check pictures; by default one a core.
        overwrite: replace a data set that lies in the folder.

    Raises:
        ValueError: a pattern without files, or not one usable record.
    """
    files = [(file, split) for split, pattern in by_split(tars) for file in expand(pattern)]
    names = [file.stem for file, _ in files]
    # Names of tars tell their records apart; where two are equal, their folder helps.
    prefixes = [file.stem if names.count(file.stem) == 1 else str(file.with_suffix("")) for file, _ in files]
    candidates = (
        candidate for (file, split), prefix in zip(files, prefixes) for candidate in read_tar(file, split, prefix)
    )
    defaults = Defaults(language, name or out.name, license, max_pixels)
    return write(out, candidates, "converting", name=name, defaults=defaults, workers=workers, overwrite=overwrite)
