"""Where pictures and captions come from: a split of shards, a public JSONL list, or a folder of pictures by class.

All three are read through `Source`. Rows of a list are its different pictures, in the order in which they first appear;
rows of a folder are its pictures, in the order of their paths.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, UnidentifiedImageError

from m2_ds.data.decode import PictureError
from m2_ds.data.shards import Split, open_dataset
from m2_ds.evaluation.config import RetrievalTask, Task, ZeroShotTask
from m2_ds.evaluation.release import clean, open_as_release

Decode = Callable[[bytes], Image.Image]


class Picture(Protocol):
    """A picture as it was found, under the name that messages call it by."""

    @property
    def key(self) -> str: ...

    @property
    def image(self) -> bytes: ...


class Source(Protocol):
    """What evaluation reads: `m2_ds.data.reader.Split`, `ListSource` and `FolderSource`."""

    name: str

    def __len__(self) -> int: ...

    @property
    def folder(self) -> Path | str:
        """Where it is, for messages."""

    @property
    def languages(self) -> dict[str, int]:
        """Captions by language."""

    def iter(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows in order without their pictures: key, group, category, captions, hard_negatives."""

    def read(self, rows: Sequence[int]) -> Sequence[Picture]:
        """Pictures at row numbers, in the order asked for; threads may share a source."""


class FoundPicture(NamedTuple):
    key: str
    image: bytes


class Line(NamedTuple):
    """A line of a list: the row of its picture, and its captions."""

    row: int
    captions: list[str]


class _Files:
    """A source whose pictures are files. `keys` are their paths below `root`."""

    def __init__(self, name: str, folder: Path, root: Path, keys: list[str]) -> None:
        self.name, self.folder, self.root, self.keys = name, folder, root, keys

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, rows: Sequence[int]) -> Sequence[FoundPicture]:
        found = []
        for row in rows:
            try:
                found.append(FoundPicture(self.keys[row], (self.root / self.keys[row]).read_bytes()))
            except OSError as error:
                raise ValueError(
                    f"picture {self.root / self.keys[row]} of {self.folder} can't be read: {error}"
                ) from error
        return found

    def check(self, count: int) -> None:
        """Raises ValueError if one of the first `count` pictures is not there."""
        missing = [key for key in self.keys[:count] if not (self.root / key).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {min(count, len(self))} pictures of {self.folder} are not below {self.root}, "
                f"the first one {missing[0]!r}: name the folder that these paths start from"
            )

    def digest(self, count: int) -> str:
        """Changes when one of the first `count` pictures is another, renamed, or written again."""
        state = hashlib.sha256()
        for key in self.keys[:count]:
            found = os.stat(self.root / key)
            # The time of the last change of the file's entry can't be set back, unlike that of its content.
            state.update(f"{key}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\n".encode())
        return state.hexdigest()


class ListSource(_Files):
    """A JSONL list of a public retrieval benchmark, `{"image": path, "caption": [texts]}`, a line a picture.

    Lines that name the same picture are one row with the captions of all, which is embedded once. `lines` are the
    file's own, for the release's way of counting. `prepare` is applied to every caption.
    """

    def __init__(
        self, path: Path, images: Path | None, language: str, prepare: Callable[[str], str] | None = None
    ) -> None:
        """Reads the list alone. Raises ValueError that names the file, line and field."""
        if not path.is_file():
            raise ValueError(f"{path}: no such list; give a JSONL file with a line a picture")
        rows: dict[str, int] = {}
        self.lines: list[Line] = []
        for number, text in enumerate(_lines(path), 1):
            if text.strip():
                image, captions = _list_line(text, f"{path}, line {number}")
                captions = captions if prepare is None else [prepare(caption) for caption in captions]
                self.lines.append(Line(rows.setdefault(image, len(rows)), captions))
        if not rows:
            raise ValueError(f"{path} holds no pictures: give a JSONL file with a line a picture")
        super().__init__(path.stem, path, images or path.parent, list(rows))
        self.language = language

    @property
    def languages(self) -> dict[str, int]:
        return {self.language: sum(len(line.captions) for line in self.lines)}

    def iter(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        captions: list[list[dict[str, Any]]] = [[] for _ in self.keys]
        for line in self.lines:
            captions[line.row] += [
                {"text": text, "language": self.language, "weight": 1.0, "kind": "caption"} for text in line.captions
            ]
        for key, own in zip(self.keys, captions):
            row = {"key": key, "group": key, "category": None, "captions": own, "hard_negatives": None}
            yield {column: row[column] for column in columns}


class FolderSource(_Files):
    """Pictures by class: `root/<class>/<picture>`, or with `labels` (lines "path class") anywhere below `root`.

    Raises ValueError that names the folder, or the file and line.
    """

    def __init__(self, root: Path, labels: Path | None = None) -> None:
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder of pictures")
        found = _by_folder(root) if labels is None else _by_labels(labels)
        self.classes = [label for _, label in found]
        name = root.resolve().name
        super().__init__(name, root if labels is None else labels, root, [key for key, _ in found])

    @property
    def languages(self) -> dict[str, int]:
        return {}

    def iter(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for key, label in zip(self.keys, self.classes):
            row = {"key": key, "group": key, "category": label, "captions": None, "hard_negatives": None}
            yield {column: row[column] for column in columns}


def open_source(task: Task, part: str) -> Source:
    """The data of one of a task's parts. Raises ValueError for what is missing, pictures of a list included."""
    if isinstance(task, RetrievalTask) and task.list is not None:
        assert task.language is not None
        prepare = clean if task.protocol == "release" else None
        source: ListSource | FolderSource = ListSource(task.list, task.images, task.language, prepare)
    elif isinstance(task, ZeroShotTask) and task.folder is not None:
        source = FolderSource(task.folder, task.labels)
    else:
        assert task.dataset is not None
        return open_dataset(task.dataset).split(part)
    source.check(len(source) if task.limit is None else task.limit)
    return source


def decode_as_release(data: bytes) -> Image.Image:
    """As `m2_ds.data.decode.decode`, but neither turned by EXIF nor put on white. Raises PictureError."""
    try:
        return open_as_release(data)
    except UnidentifiedImageError as error:
        raise PictureError("broken picture", "in no format that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise PictureError("broken picture", str(error) or type(error).__name__) from error


def identity(source: Source, count: int) -> str:
    """Tells apart the pictures of a source's first `count` rows from any others, without reading them."""
    if isinstance(source, Split):
        shards = ",".join(shard.sha256 for shard in source.index)
        return hashlib.sha256(f"shards {shards} {count}".encode()).hexdigest()
    assert isinstance(source, _Files)
    return source.digest(count)


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines: a caption may hold one of the other characters that end a line for it.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): write it in that encoding") from None


def _list_line(text: str, where: str) -> tuple[str, list[str]]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str) or not fields["image"]:
        raise ValueError(f"{where}: field 'image' must be the path of a picture")
    captions = fields.get("caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(f"{where}: field 'caption' must be a list of texts that are not empty, found {captions!r}")
    return fields["image"], captions


def _by_folder(root: Path) -> list[tuple[str, str]]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, others = [], Counter[str]()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            if path.name.startswith(".") or path.is_dir():
                continue
            if path.suffix.lower() in suffixes:
                found.append((str(path.relative_to(root)), folder.name))
            else:
                others[path.suffix] += 1
    if others:
        raise ValueError(
            f"{root}: files that are no pictures by their endings ({dict(others)}) lie in the classes' folders: "
            "take them out, so that nothing is left out of the numbers"
        )
    if not found:
        raise ValueError(f"{root} holds no folders with pictures; for a flat folder name the file of labels")
    return found


def _by_labels(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of labels; give a text file with a line a picture: path and class")
    found: dict[str, str] = {}
    for number, text in enumerate(_lines(path), 1):
        if text.strip():
            key, _, label = text.strip().rpartition(" ")
            if not key:
                raise ValueError(f"{path}, line {number}: expected a picture's path and its class, found {text!r}")
            if key.strip() in found:
                raise ValueError(f"{path}, line {number}: picture {key.strip()!r} was named before")
            found[key.strip()] = label
    if not found:
        raise ValueError(f"{path} names no pictures; give a line a picture: path and class")
    return list(found.items())
