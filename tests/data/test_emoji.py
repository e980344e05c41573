"""The emoji builder: its leak rules on a small set of made-up packages, and the real set where npm can be reached."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2_ds.data.shards import Dataset, Record, open_dataset
from m2_ds.data.sources import emoji, npm
from m2_ds.data.sources.emoji import Concept, family
from tests.support.pairs import encoded

# code points, English, Chinese, keywords, group (emojibase's number)
EMOJI = [
    ("1f600", "grinning face", "嘿嘿", ["happy", "grinning face"], 0),
    ("1f436", "dog face", "狗脸", ["pet"], 3),
    ("1f431", "cat face", "猫脸", ["pet"], 3),
    ("1f3c3", "person running", "跑步的人", ["marathon"], 1),
    ("1f3c3-200d-2642", "man running", "跑步的男人", ["marathon", "man"], 1),
    ("1f3c3-200d-2640", "woman running", "跑步的女人", ["marathon", "woman"], 1),
    ("1f550", "one o’clock", "一点钟", ["one"], 5),
    ("1f55c", "one-thirty", "一点半", ["1:30"], 5),
    ("2764", "red heart", "红心", ["love"], 0),
    ("1f1eb-1f1f7", "flag: France", "旗: 法国", ["flag"], 9),
    ("1f1e7-1f1fb", "flag: Bouvet Island", "旗: 布韦岛", ["flag"], 9),
    ("1f3fb", "light skin tone", "较浅肤色", ["skin"], 2),
]
GROUPS = ["smileys-emotion", "people-body", "component", "animals-nature", "food-drink", "travel-places"]
GROUPS += ["activities", "objects", "symbols", "flags"]
NO_CHARS = {"noto_v1", "emojione", "fxemoji"}


def _text(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def _svg(code: str, source: str) -> str:
    colour = f"#{abs(hash_of(code + source)) % 0xFFFFFF:06x}"
    # noto draws two flags alike, as real sets do.
    if source == "noto" and code.startswith("1f1"):
        colour = "#000080"
    return f'<rect x="4" y="8" width="24" height="16" fill="{colour}"/>'


def hash_of(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


def _pack(folder: Path, name: str, version: str, files: dict[str, Any]) -> None:
    with tarfile.open(folder / npm.archive_name(name, version), "w:gz") as archive:
        for path, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of the real layout with a dozen emoji."""
    folder = tmp_path_factory.mktemp("packages")
    for number, (package, key) in enumerate(emoji._CLDR.items()):
        files = {}
        for column, language in enumerate(("en", "zh")):
            # Sequences stand in the derived file, the others in the main one, the heart with its FE0F.
            annotations = {
                _text(code).replace("❤", "❤\ufe0f"): {"tts": [row[column]], "default": row[2]}
                for code, *row, _ in EMOJI
                if ("-" in code) == bool(number)
            }
            files[f"{key}/{language}/annotations.json"] = {key: {"annotations": annotations}}
        _pack(folder, package, emoji._CLDR_VERSION, files)
    data = [
        {"hexcode": code.upper().replace("2764", "2764-FE0F"), "label": name, "group": group}
        for code, name, _, _, group in EMOJI
    ]
    data.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    messages = {"groups": [{"key": key, "order": order} for order, key in enumerate(GROUPS)]}
    _pack(folder, *emoji._EMOJIBASE, {"en/data.json": data, "en/messages.json": messages})
    for icon_set in emoji.ICON_SETS:
        icons, chars = {}, {}
        for code, name, *_ in EMOJI:
            slug = name.lower().replace("’", "").replace(": ", "-for-" if icon_set.source == "emojione" else "-")
            slug = slug.replace(" ", "" if icon_set.source == "fxemoji" else "-")
            if icon_set.source == "fxemoji" and code not in ("1f436", "1f431", "1f3c3"):
                continue
            icons[slug] = {"body": _svg(code, icon_set.source)}
            if icon_set.source not in NO_CHARS:
                chars[code.replace("2764", "2764-fe0f")] = slug
        # twemoji knows flags under emojione's names too; a turned alias is another picture.
        aliases = {"flag-for-france": {"parent": "flag-france"}} if icon_set.source == "twemoji" else {}
        if icon_set.source == "emojione":
            icons["some-cat"] = icons.pop("cat-face")
            aliases = {"cat-face": {"parent": "some-cat", "rotate": 1}}
        if icon_set.source == "fxemoji":
            icons["runner"] = icons.pop("personrunning")  # Unicode's own name
        _pack(
            folder,
            icon_set.package,
            icon_set.version,
            {
                "icons.json": {"icons": icons, "aliases": aliases, "width": 32, "height": 32},
                "chars.json": chars,
                "info.json": {"license": {"spdx": f"license of {icon_set.source}"}},
            },
        )
    three_d = {"package.json": {"license": "MIT"}}
    for code, *_ in EMOJI:
        pixels = np.zeros((64, 64, 4), dtype=np.uint8)
        pixels[16:48, 16:48] = (*hash_of(code).to_bytes(4)[:3], 255)
        name = "2764-fe0f" if code == "2764" else code
        three_d[f"assets/{name}.webp"] = encoded(pixels, "WEBP", lossless=True)  # type: ignore[assignment]
    _pack(folder, *emoji._THREE_D, three_d)
    return folder


@pytest.fixture(scope="module")
def dataset(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    patch = pytest.MonkeyPatch()
    # With eight families a share of an eighth may hold out none: name the dog.
    patch.setattr(Concept, "held_out", property(lambda self: family(self.names["en"]) == "dog face"))
    built = emoji.build(tmp_path_factory.mktemp("emoji"), size=32, packages=packages, workers=1)
    patch.undo()
    return built


def _records(dataset: Dataset, split: str) -> dict[str, Record]:
    there = dataset.split(split)
    return {record.key: record for record in there.read(range(len(there)))}


def test_splits_hold_what_they_say(dataset: Dataset) -> None:
    counts = {name: info.rows for name, info in dataset.manifest.splits.items()}
    # 11 concepts: the dog is held out, one noto flag repeats the other. Of emojione, one flag has a name that no other
    # set knows, and the cat is there only turned.
    assert counts == {
        "train": 9 + 10 + 10 + 8,
        "val_new_concept": 4,
        "val_new_vendor": 2,
        "val_new_vendor_new_concept": 1,
        "test_new_vendor": 10,
        "test_new_vendor_new_concept": 1,
        "test_3d": 8,
        "test_3d_new_concept": 1,
    }
    assert set(dataset.manifest.splits["train"].sources) == {"noto", "noto_v1", "openmoji", "emojione"}
    assert dataset.manifest.splits["val_new_vendor"].sources == {"fxemoji": 2}
    assert dataset.manifest.splits["test_new_vendor"].sources == {"twemoji": 10}


def test_no_held_out_family_is_trained_on(dataset: Dataset) -> None:
    families = {
        split: {family(record.captions[0].text) for record in _records(dataset, split).values()}
        for split in dataset.splits
    }
    for split, there in families.items():
        if split.endswith("new_concept"):
            assert there == {"dog face"}
            assert not there & families["train"]


def test_records(dataset: Dataset) -> None:
    train = _records(dataset, "train")
    heart = train["noto/2764"]
    assert [(c.text, c.language, c.kind, c.weight) for c in heart.captions] == [
        ("red heart", "en", "tts", 1.0),
        ("红心", "zh", "tts", 1.0),
        ("love", "en", "keywords", 0.25),
        ("love", "zh", "keywords", 0.25),
    ]
    assert (heart.group, heart.category, heart.license) == ("2764", "smileys-emotion", "license of noto")
    assert train["openmoji/2764"].group == heart.group
    # Keywords that repeat the name or are shared by several concepts are no captions.
    assert [c.text for c in train["noto/1f600"].captions if c.kind == "keywords"][0] == "happy"
    assert not [c for c in train["noto/1f431"].captions if c.kind == "keywords"]
    assert not [c for c in train["noto/1f1eb-1f1f7"].captions if c.kind == "keywords"]
    assert {record.license for record in _records(dataset, "test_3d").values()} == {"MIT"}
    assert not [record for record in _records(dataset, "test_3d").values() if record.category == "flags"]
    assert not [
        key for split in dataset.splits for key in _records(dataset, split) if "1f3fb" in key or "1f1e6" in key[-5:]
    ]


def test_pictures_are_drawn_centred_on_white(dataset: Dataset) -> None:
    for split, key in (("train", "openmoji/2764"), ("test_3d", "fluent_3d/2764")):
        record = _records(dataset, split)[key]
        picture = Image.open(io.BytesIO(record.image))
        pixels = np.asarray(picture)
        assert (picture.mode, picture.size, record.width) == ("RGB", (32, 32), 32)
        assert pixels[0, 0].tolist() == [255] * 3
        assert pixels[16, 16].tolist() != [255] * 3
    assert pixels[16, 16].tolist() == list(hash_of("2764").to_bytes(4)[:3])


def test_a_drawing_that_is_not_square_is_centred() -> None:
    concept = Concept("1f600", "x", "y", {"en": "x", "zh": "x"}, {})
    icons = {"icons": {"a": {"body": "<g/>", "width": 36, "height": 26}}, "width": 36, "height": 36}
    svg = emoji.drawings({"1f600": concept}, icons, {"1F600": "a"}, {})["1f600"]
    assert 'viewBox="0.0 -5.0 36 36"' in svg


def test_variants_are_one_family() -> None:
    for names in (
        ("person running", "man running", "woman running: facing right"),
        ("one o’clock", "twelve-thirty"),
        ("family: man, woman, girl, boy", "family"),
        ("child", "old man", "older person"),
        ("mermaid", "merman", "merperson"),
        ("prince", "princess"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("kiss: woman, man", "kiss"),
        ("person: red hair", "woman: red hair"),
    ):
        assert len({family(name) for name in names}) == 1, names
    for one, other in (("dog face", "cat face"), ("flag: Chad", "flag: Romania"), ("woman: bald", "woman: red hair")):
        assert family(one) != family(other)
    # A word is taken out whole, never out of another word.
    assert family("mango") == "mango"
    assert family("manual wheelchair") != family("ual wheelchair")


def test_held_out_share_and_stability() -> None:
    def held_out(name: str) -> bool:
        return Concept("0", name, "", {"en": name}, {}).held_out

    share = np.mean([held_out(f"thing {k}") for k in range(4000)])
    assert share == pytest.approx(emoji.HELD_OUT_SHARE, abs=0.02)
    # Fixed for good: data sets built anywhere agree.
    assert [held_out(name) for name in ("grinning face", "bank", "chestnut", "man mechanic", "mechanic")] == [
        *(True, False, True, True, True)
    ]


def test_what_is_built_is_kept(dataset: Dataset, packages: Path) -> None:
    before = (dataset.folder / "manifest.json").stat().st_mtime_ns
    emoji.build(dataset.folder, size=32, packages=packages)
    assert (dataset.folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="size 4"):
        emoji.build(dataset.folder, size=4)


def test_packages_are_fetched_once_and_failures_say_what_npm_said(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, version = "@iconify-json/noto", "1.2.9"
    archive = (packages / npm.archive_name(name, version)).read_bytes()
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "npm"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        '[ "$2" = "@iconify-json/noto@1.2.9" ] || { echo "E404 no such package" >&2; exit 1; }\n'
        f"base64 -d > $4/{npm.archive_name(name, version)} <<END\n{base64.b64encode(archive).decode()}\nEND\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for _ in range(2):
        found = npm.fetch([(name, version)], tmp_path / "cache")
        assert found[name].json("info.json")[0]["license"]["spdx"] == "license of noto"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="npm pack nothing@1.0.0 failed.*--packages.*E404 no such package"):
        npm.fetch([("nothing", "1.0.0")], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"has no other\.json"):
        found[name].json("other.json")
    found[name].path.write_bytes(archive[:500])
    with pytest.raises(ValueError, match="not a readable package"):
        found[name].json("icons.json")


@pytest.mark.slow
def test_the_real_set_has_the_documented_counts(tmp_path: Path) -> None:
    emoji.build(tmp_path)
    dataset = open_dataset(tmp_path)
    assert {name: info.rows for name, info in dataset.manifest.splits.items()} == {
        "train": 5219,
        "val_new_concept": 714,
        "val_new_vendor": 530,
        "val_new_vendor_new_concept": 75,
        "test_new_vendor": 1660,
        "test_new_vendor_new_concept": 221,
        "test_3d": 1403,
        "test_3d_new_concept": 195,
    }
    groups = {name: {row["group"] for row in dataset.split(name).iter(["group"])} for name in dataset.splits}
    assert len(groups["train"]) == 1687
    for name, there in groups.items():
        assert name.endswith("new_concept") == (not there & groups["train"])


@pytest.mark.slow
def test_npm_comes_from_a_wheel_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    found = npm.fetch([("@iconify-json/fxemoji", "1.2.2")], tmp_path)
    assert len(found["@iconify-json/fxemoji"].json("icons.json")[0]["icons"]) > 1000
