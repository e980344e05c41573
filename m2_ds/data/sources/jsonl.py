"""JSON lines with a folder of pictures: {"image": "a/1.jpg", "caption": "..."} on each line."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tyro.conf import Positional

from m2_ds.data.decode import MAX_PIXELS
from m2_ds.data.shards import Dataset
from m2_ds.data.sources.conversion import Candidate, Defaults, by_split, write


def read_jsonl(
    path: Path, split: str, images: Path, image_field: str, caption_field: str | None, seen: Counter[str]
) -> Iterator[Candidate]:
    """The records of one file. Lines about one picture are records of one group; `seen` counts them across files."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            candidate = Candidate(str(path), f"line {number}", split, "")
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                candidate.trouble = ("bad line", f"not a JSON object: {error}")
                yield candidate
                continue
            image = fields.get(image_field)
            names = [caption_field] if caption_field else ["captions", "caption", "text"]
            candidate.captions = next((fields[name] for name in names if fields.get(name)), None)
            candidate.fields = fields
            if not isinstance(image, str) or not image:
                candidate.trouble = ("missing picture", f"no picture's path in field {image_field!r}")
            else:
                candidate.image = images / image
                candidate.key = str(fields.get("key") or image)
                candidate.fields.setdefault("group", image)
                seen[candidate.key] += 1
                if seen[candidate.key] > 1:
                    candidate.key += f"#{seen[candidate.key]}"
            yield candidate


def convert(
    out: Positional[Path],
    files: Positional[tuple[str, ...]],
    *,
    images: Path | None = None,
    image_field: str = "image",
    caption_field: str | None = None,
    name: str | None = None,
    language: str | None = None,
    license: str = "unknown",
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """JSON lines and a picture folder to shards.

    A caption is a text, a list of texts, or a mapping from language to either; entries may be objects with text,
    language, weight and kind. Fields key, group, category, source, license and hard_negatives are taken over. Records
    that can't be used are counted by reason, and named in skipped.jsonl.

    Args:
        out: folder of the data set.
        files: JSONL files as PATH or SPLIT=PATH; without a split they are for train.
        images: folder that the pictures' paths start from; by default that of each JSONL file.
        image_field: field with the picture's path.
        caption_field: field with the caption or captions; by default captions, caption or text, whichever is there.
        name: the data set's name; by default the folder's.
        language: of captions that do not say theirs; by default zh or en, by script.
        license: of records that do not say theirs.
        max_pixels: larger pictures are left out.
        workers: processes that check pictures; by default one a core.
        overwrite: replace a data set that lies in the folder.

    Raises:
        ValueError: a file or folder that is not there, or not one usable record.
    """
    wanted = [(split, Path(path)) for split, path in by_split(files)]
    for _, path in wanted:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; nothing was converted")
    if images is not None and not images.is_dir():
        raise ValueError(f"{images}: no such folder; nothing was converted")
    seen: Counter[str] = Counter()
    candidates = (
        candidate
        for split, path in wanted
        for candidate in read_jsonl(path, split, images or path.parent, image_field, caption_field, seen)
    )
    defaults = Defaults(language, name or out.name, license, max_pixels)
    return write(out, candidates, "converting", name=name, defaults=defaults, workers=workers, overwrite=overwrite)
