"""The emoji set: one concept, seven drawing styles, two languages; all of it from the npm registry.

Pictures are SVG icon sets rasterised on white, and one set of 3D renderings. Captions are the names and keywords that
Unicode CLDR gives every emoji in English and Chinese. The splits ask for different things:

    train                          four styles, 88% of the concept families
    val_new_concept                the same styles, concept families never trained on
    val_new_vendor                 a style never seen, concepts trained on (choose settings on this one)
    test_new_vendor                another style never seen
    test_3d                        3D renderings, far from every drawing; no flags (the package's are drawings)
    *_new_vendor_new_concept, test_3d_new_concept     a new style and new concepts together

Variants of one concept (gender, age, hour, direction) form a family and stay on one side of the split. Pictures that
are equal to the last pixel appear once a style. The flat form of the 3D set is left out: it repeats its compositions.
"""

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tyro.conf import Positional

from m2_ds.data.shards import Caption, Dataset, Record, ShardWriter, open_dataset
from m2_ds.data.sources.inspect import show_counts
from m2_ds.data.sources.npm import Package, fetch
from m2_ds.data.sources.spread import spread

LANGUAGES = ("en", "zh")
KEYWORDS_WEIGHT = 0.25
HELD_OUT_SHARE = 0.12
# Chosen so that the sizes of all splits equal those of the set's specification; any odd number is as fair.
HELD_OUT_SALT = 16431139

_CLDR = {"cldr-annotations-full": "annotations", "cldr-annotations-derived-full": "annotationsDerived"}
_CLDR_VERSION = "48.2.0"
_EMOJIBASE = ("emojibase-data", "17.0.0")
_THREE_D = ("@lobehub/fluent-emoji-3d", "1.1.0")


@dataclass(frozen=True)
class IconSet:
    """An SVG set in Iconify's form, and the split that its pictures of known concepts go to."""

    source: str
    package: str
    version: str
    split: str


ICON_SETS = (
    IconSet("noto", "@iconify-json/noto", "1.2.9", "train"),
    IconSet("noto_v1", "@iconify-json/noto-v1", "1.2.5", "train"),
    IconSet("openmoji", "@iconify-json/openmoji", "1.2.29", "train"),
    IconSet("emojione", "@iconify-json/emojione", "1.2.3", "train"),
    IconSet("fxemoji", "@iconify-json/fxemoji", "1.2.2", "val_new_vendor"),
    IconSet("twemoji", "@iconify-json/twemoji", "1.2.5", "test_new_vendor"),
)
_NEW_CONCEPT = {
    "train": "val_new_concept",
    "val_new_vendor": "val_new_vendor_new_concept",
    "test_new_vendor": "test_new_vendor_new_concept",
    "test_3d": "test_3d_new_concept",
}

_HOUR = re.compile(r"(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)(-thirty| o.clock)")
_PERSON = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|boys|girls|child|children|adult|older|old|male|female"
    r"|santa|mrs|mx)\b|facing right"
)


@dataclass(frozen=True)
class Concept:
    """One emoji without its skin tones. `code` is its hexadecimal code points without FE0F, joined by dashes."""

    code: str
    label: str
    category: str
    names: dict[str, str]
    keywords: dict[str, str]

    @property
    def held_out(self) -> bool:
        """Whether the concept's whole family is kept from training."""
        digest = int.from_bytes(hashlib.blake2b(family(self.names["en"]).encode(), digest_size=8).digest())
        return digest * (HELD_OUT_SALT * 0x9E3779B97F4A7C15) % 2**64 < int(HELD_OUT_SHARE * 2**64)


def family(name: str) -> str:
    """An English name without what tells its variants apart: gender, age, hour, direction."""
    name = name.lower()
    if _HOUR.fullmatch(name):
        return "clock"
    name = re.sub(r"\bmer(man|maid|person)\b", "mer", name)
    name = re.sub(r"\bprincess\b", "prince", name)
    return " ".join(re.findall(r"[^\W_]+", _PERSON.sub(" ", name))) or "person"


def _code(text: str) -> str:
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def read_concepts(packages: dict[str, Package]) -> dict[str, Concept]:
    """All concepts by code, in Unicode's order: emoji of a group that have a name in every language.

    Keywords are joined into one caption. One that several concepts share (258 flags are just "flag") is left out: it
    would call right pairs wrong.
    """
    names: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    keywords: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for package, key in _CLDR.items():
        for language, content in zip(
            LANGUAGES, packages[package].json(*(f"{key}/{language}/annotations.json" for language in LANGUAGES))
        ):
            for text, entry in content[key]["annotations"].items():
                code = "-".join(f"{ord(c):04x}" for c in text if c != "\ufe0f")
                if "tts" not in entry:
                    continue
                name = names[language][code] = entry["tts"][0]
                others = [word for word in entry.get("default", ()) if word.lower() != name.lower()]
                keywords[language][code] = (", " if language == "en" else "、").join(others)
    data, messages = packages[_EMOJIBASE[0]].json("en/data.json", "en/messages.json")
    groups = {group["order"]: group["key"] for group in messages["groups"] if group["key"] != "component"}
    entries = {_code(entry["hexcode"]): entry for entry in data if entry.get("group") in groups}
    uses = {language: Counter(keywords[language].get(code) for code in entries) for language in LANGUAGES}
    return {
        code: Concept(
            code=code,
            label=entry["label"],
            category=groups[entry["group"]],
            names={language: names[language][code] for language in LANGUAGES},
            keywords={
                language: keywords[language][code]
                for language in LANGUAGES
                if keywords[language][code] and uses[language][keywords[language][code]] == 1
            },
        )
        for code, entry in entries.items()
        if all(code in names[language] for language in LANGUAGES)
    }


def _aliases(icons: dict[str, Any]) -> dict[str, str]:
    """Other names of an icon set's icons; aliases that turn or flip the picture are left out."""
    return {alias: entry["parent"] for alias, entry in icons.get("aliases", {}).items() if set(entry) == {"parent"}}


def name_table(concepts: dict[str, Concept], coded: list[tuple[dict[str, Any], dict[str, str]]]) -> dict[str, str]:
    """Squeezed names to codes, for sets without code points: CLDR's names, those of the other sets, Unicode's.

    Args:
        coded: (icons.json, chars.json) of every set that names code points.
    """
    table: dict[str, str] = {}
    for concept in concepts.values():
        table.setdefault(_squeeze(concept.names["en"]), concept.code)
    for concept in concepts.values():
        table.setdefault(_squeeze(concept.label), concept.code)
    named = [{name: _code(code) for code, name in chars.items() if _code(code) in concepts} for _, chars in coded]
    for names in named:
        for name, code in names.items():
            table.setdefault(_squeeze(name), code)
    for (icons, _), names in zip(coded, named):
        for alias, parent in _aliases(icons).items():
            if parent in names:
                table.setdefault(_squeeze(alias), names[parent])
    for code in concepts:
        if "-" not in code:
            table.setdefault(_squeeze(unicodedata.name(chr(int(code, 16)), "")), code)
    table.pop("", None)
    return table


def drawings(
    concepts: dict[str, Concept], icons: dict[str, Any], chars: dict[str, str], table: dict[str, str]
) -> dict[str, str]:
    """SVG texts by code, in the concepts' order, each drawing centred on a square."""
    aliases = _aliases(icons)
    chosen: dict[str, str] = {}
    if chars:
        for code, name in chars.items():
            chosen.setdefault(_code(code), name)
    else:
        for name in [*icons["icons"], *aliases]:
            if (known := table.get(_squeeze(name))) is not None:
                chosen.setdefault(known, name)
    svgs = {}
    for code in concepts:
        name = chosen.get(code, "")
        icon = icons["icons"].get(aliases.get(name, name))
        if icon is None:
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        side = max(width, height)
        svgs[code] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}" '
            f'width="{side}" height="{side}">{icon["body"]}</svg>'
        )
    return svgs


def _png(picture: Image.Image) -> tuple[bytes, bytes]:
    """(PNG bytes, digest of the pixels)."""
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=False)
    return out.getvalue(), hashlib.sha256(picture.tobytes()).digest()


def _draw(svg: str, size: int) -> tuple[bytes, bytes]:
    import resvg_py

    raster = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return _png(Image.open(io.BytesIO(bytes(raster))).convert("RGB"))


def _shrink(image: bytes, size: int) -> tuple[bytes, bytes]:
    picture = Image.open(io.BytesIO(image)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return _png(white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def _captions(concept: Concept) -> list[Caption]:
    captions = [Caption(concept.names[language], language, 1.0, "tts") for language in LANGUAGES]
    captions += [Caption(text, language, KEYWORDS_WEIGHT, "keywords") for language, text in concept.keywords.items()]
    return captions


def _three_d(package: Package, concepts: dict[str, Concept]) -> tuple[dict[str, bytes], str]:
    files = package.read(lambda name: name.startswith("assets/") or name == "package.json")
    license_name = json.loads(files.pop("package.json"))["license"]
    # The fully qualified file (with FE0F) comes first where there are two.
    by_code: dict[str, bytes] = {}
    for name in sorted(files, key=lambda name: ("fe0f" not in name, name)):
        by_code.setdefault(_code(Path(name).stem), files[name])
    wanted = [code for code, concept in concepts.items() if code in by_code and concept.category != "flags"]
    return {code: by_code[code] for code in wanted}, license_name


def build(
    out: Positional[Path],
    *,
    size: int = 128,
    packages: Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Fetch the packages (into OUT/packages, 42 MB), rasterise, and write the shards.

    A folder that holds a finished set is left as it is, unless `overwrite`.

    Args:
        out: folder of the data set.
        size: side of the pictures, pixels.
        packages: folder with archives made by `npm pack`, used before the network is asked.
        workers: processes that rasterise; by default one a core.
        overwrite: build again although the folder holds a finished set.

    Raises:
        ValueError: a package that can't be fetched or read, or a size below 8 pixels.
    """
    if size < 8:
        raise ValueError(f"size {size}: pictures need at least 8 pixels a side")
    if (out / "manifest.json").exists() and not overwrite:
        dataset = open_dataset(out)
        show_counts(dataset)
        return dataset
    wanted = [(icon_set.package, icon_set.version) for icon_set in ICON_SETS]
    wanted += [(name, _CLDR_VERSION) for name in _CLDR] + [_EMOJIBASE, _THREE_D]
    have = fetch(wanted, out / "packages", packages)
    concepts = read_concepts(have)
    content = {}
    for icon_set in ICON_SETS:
        icons, chars, info = have[icon_set.package].json("icons.json", "chars.json", "info.json")
        content[icon_set.source] = (icons, chars, info["license"]["spdx"])
    table = name_table(concepts, [(icons, chars) for icons, chars, _ in content.values() if chars])
    three_d, three_d_license = _three_d(have[_THREE_D[0]], concepts)

    dropped: Counter[str] = Counter()
    jobs: list[tuple[str, str, str, Callable[[Any], tuple[bytes, bytes]], dict[str, Any]]] = []
    for icon_set in ICON_SETS:
        icons, chars, license_name = content[icon_set.source]
        svgs = drawings(concepts, icons, chars, table)
        jobs.append((icon_set.source, icon_set.split, license_name, partial(_draw, size=size), svgs))
    jobs.append(("fluent_3d", "test_3d", three_d_license, partial(_shrink, size=size), three_d))
    with ShardWriter(out, "emoji", overwrite=overwrite) as writer:
        for source, split, license_name, render, originals in jobs:
            seen: set[bytes] = set()
            rendered = spread(render, list(originals.values()), f"drawing {source}", workers=workers)
            for code, (image, digest) in zip(originals, rendered):
                concept = concepts[code]
                if digest in seen:
                    dropped[source] += 1
                    continue
                seen.add(digest)
                record = Record(
                    key=f"{source}/{code}",
                    image=image,
                    captions=_captions(concept),
                    group=code,
                    source=source,
                    license=license_name,
                    width=size,
                    height=size,
                    category=concept.category,
                )
                writer.add(_NEW_CONCEPT[split] if concept.held_out else split, record)
    dataset = open_dataset(out)
    show_counts(dataset)
    print(f"left out as exact repetitions: {sum(dropped.values())} pictures ({dict(dropped)})")
    return dataset
