#!/usr/bin/env python
"""Writes a split of a shards dataset as webdataset tars for the peer, the same picture bytes and captions.

The peer's format holds one caption a sample, so every picture is written once in each language; which of its captions
of that language is taken, and into which tar the sample goes, is a hash of its key. Both depend on nothing else, so
the same dataset always gives the same tars.
"""

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tyro
import webdataset
from PIL import Image

from m2_ds.data.shards import open_dataset

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # what open_clip's loader picks up
ABOUT_NAME = "about.json"


def hashed(*parts: object) -> int:
    """A stable non-negative 64-bit integer of the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def choose_caption(key: str, captions: Sequence[Mapping[str, Any]], language: str, seed: int) -> str | None:
    """One caption of the language, drawn by weight with a hash of the key; None where the picture has none."""
    usable = [c for c in captions if c["language"] == language and c["text"].strip()]
    if not usable:
        return None
    point = hashed(seed, key, language) / 2**64 * sum(c["weight"] for c in usable)
    for caption in usable:
        point -= caption["weight"]
        if point < 0:
            return str(caption["text"])
    return str(usable[-1]["text"])  # the sum of the weights was rounded up


def write(
    dataset: Path,
    out: Path,
    split: str = "train",
    shards: int = 8,
    languages: Sequence[str] = ("en", "zh"),
    seed: int = 0,
) -> Path:
    """Writes ``out/00000.tar ...``, sizes.json (read by open_clip) and about.json; reuses tars of the same content.

    Args:
        dataset: Folder of a shards dataset (manifest.json).
        out: Folder of the tars; one that holds another content is refused.
        split: The split to write.
        shards: Number of tars; open_clip needs at least data workers x processes.
        languages: One sample is written for each of these in which a picture has a caption.
        seed: Changes which captions are drawn and how the samples are spread.
    """
    manifest = hashlib.sha256((dataset / "manifest.json").read_bytes()).hexdigest()
    about: dict[str, object] = {
        "manifest": manifest,
        "split": split,
        "shards": shards,
        "languages": list(languages),
        "seed": seed,
    }
    if (out / ABOUT_NAME).is_file():
        found = json.loads((out / ABOUT_NAME).read_text(encoding="utf-8"))
        if {name: found.get(name) for name in about} == about:
            return out
    if out.exists():
        raise ValueError(f"{out} exists and holds other tars than asked for: remove it or give another folder")
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    names = [f"{index:05d}.tar" for index in range(shards)]
    sizes = Counter(dict.fromkeys(names, 0))
    with ExitStack() as stack:
        tars = {name: stack.enter_context(webdataset.TarWriter(str(aside / name))) for name in names}
        for number, row in enumerate(open_dataset(dataset).split(split).iter(["key", "image", "captions"])):
            key, image = row["key"], row["image"]
            image_format = Image.open(io.BytesIO(image)).format
            if image_format not in EXTENSIONS:
                raise ValueError(f"{dataset}, {key}: the peer reads PNG, JPEG and WebP, not {image_format}")
            for language in languages:
                text = choose_caption(key, row["captions"], language, seed)
                if text is None:
                    continue
                name = names[hashed(seed, key, language, "tar") % shards]
                # Keys of ours may hold dots, at which webdataset would split: a running number cannot.
                sample = {"__key__": f"{number:08d}_{language}", EXTENSIONS[image_format]: image, "txt": text}
                tars[name].write(sample)
                sizes[name] += 1
    if not all(sizes.values()):
        raise ValueError(f"{dataset}, {split}: too few samples for {shards} tars ({dict(sizes)}): ask for fewer shards")
    (aside / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    about["samples"] = sizes.total()
    (aside / ABOUT_NAME).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    aside.rename(out)
    return out


if __name__ == "__main__":
    print(tyro.cli(write, description=__doc__))
