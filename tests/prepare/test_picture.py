"""Every rule for pictures; hashes against ImageHash; neighbours against comparing all with all."""

import io
import zlib

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_ds.prepare import picture
from m2_ds.prepare.config import PictureConfig
from m2_ds.prepare.neighbours import Index, bands, earlier_twins
from m2_ds.prepare.pairs import Drop
from tests.prepare.raw import encoded, image, pixels

GREY = np.full((40, 40, 3), 90, np.uint8)


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes of PNG whose header says any size."""
    chunk = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    return start + (100).to_bytes(4) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "empty_picture"),
        (b"no picture at all", "broken_picture"),
        (encoded(pixels(1), "JPEG")[:300], "broken_picture"),
        (image(1)[:-200], "broken_picture"),
        (png_that_claims(60_000, 60_000), "too_many_pixels"),
        (png_that_claims(11_000, 10_000), "too_many_pixels"),
        (png_that_claims(0, 10), "broken_picture"),
        (encoded(pixels(1), "TIFF"), "format"),
        (encoded(pixels(1), "GIF", save_all=True, append_images=[Image.fromarray(pixels(2))]), "animated"),
        (encoded(pixels(1, 200, 60)), "aspect_ratio"),
        (encoded(pixels(1, 60, 181)), "aspect_ratio"),
        (encoded(pixels(1, 180, 60)), None),
        (encoded(pixels(1, 31, 40)), "too_small"),
        (encoded(GREY), "single_colour"),
        (encoded(GREY, "JPEG"), "single_colour"),
        (encoded(Image.fromarray(GREY).convert("L")), "single_colour"),
        (b"x" * (32 << 20) + b"x", "too_many_bytes"),
        (image(1), None),
        (encoded(pixels(1), "JPEG"), None),
        (encoded(pixels(1), "WEBP"), None),
        (encoded(Image.fromarray(pixels(1)), "GIF"), None),
    ],
)  # fmt: skip
def test_rules(data: bytes, rule: str | None) -> None:
    found = picture.examine(data, PictureConfig())
    assert (found.rule if isinstance(found, Drop) else None) == rule


def test_a_thin_line_is_not_one_colour() -> None:
    lined = GREY.copy()
    lined[20] = 200
    assert not isinstance(picture.examine(encoded(lined), PictureConfig()), Drop)


def test_exif_turns_the_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = picture.examine(encoded(pixels(3, 90, 60), "JPEG", exif=exif), PictureConfig())
    assert not isinstance(found, Drop) and (found.width, found.height) == (60, 90)


def test_resize_to() -> None:
    rules = PictureConfig(resize_to=48)
    large = picture.examine(encoded(pixels(4, 200, 100)), rules)
    assert not isinstance(large, Drop) and (large.width, large.height) == (96, 48)
    assert Image.open(io.BytesIO(large.image)).size == (96, 48)
    same = picture.examine(encoded(pixels(4, 48, 60)), rules)
    assert not isinstance(same, Drop) and same.image == encoded(pixels(4, 48, 60))


def test_hashes_are_imagehashs() -> None:
    thumbnails = np.stack([pixels(number, 32, 32) for number in range(200)])
    expected = [int(str(imagehash.phash(Image.fromarray(thumbnail))), 16) for thumbnail in thumbnails]
    assert picture.perceptual_hashes(thumbnails).tolist() == expected


def test_a_copy_in_another_size_and_format_is_near_and_others_are_not() -> None:
    config = PictureConfig(min_side=16)

    def signed(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        found = picture.examine(data, config)
        assert not isinstance(found, Drop)
        return picture.perceptual_hashes(found.thumbnail[None]), picture.mean_colours(found.thumbnail[None])

    pictures = [Image.fromarray(pixels(number, 120, 90)) for number in range(40)]
    hashes, colours = (np.concatenate(part) for part in zip(*(signed(encoded(p)) for p in pictures)))
    index = Index(np.array([], dtype=object), hashes, colours, 4, 16)
    copies = [signed(encoded(p.resize((84, 63)), "JPEG", quality=80)) for p in pictures]
    assert index.near(*(np.concatenate(part) for part in zip(*copies))).tolist() == list(range(40))
    others = [signed(image(number)) for number in range(100, 140)]
    assert set(index.near(*(np.concatenate(part) for part in zip(*others))).tolist()) == {-1}


def planted(seed: int, count: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes and colours with many near and equal ones, in any order."""
    draw = np.random.default_rng(seed)
    bases = draw.integers(0, 2**64, 12, dtype=np.uint64)
    hashes = bases[draw.integers(0, 12, count)]
    for _ in range(5):
        flip = draw.random(count) < 0.4
        hashes = hashes ^ np.where(flip, np.uint64(1) << draw.integers(0, 64, count).astype(np.uint64), np.uint64(0))
    colours = (draw.integers(0, 3, (count, 1)) * draw.integers(5, 20) + np.zeros((1, 192))).astype(np.uint8)
    return hashes, colours, draw.permutation(count)


def brute(hashes: np.ndarray, colours: np.ndarray, order: np.ndarray, distance: int, colour: int) -> list[int]:
    """For each the earliest that looks alike, by comparing all with all."""
    twins = []
    for b in range(len(hashes)):
        alike = [
            (order[a], a)
            for a in range(len(hashes))
            if order[a] < order[b]
            and bin(int(hashes[a]) ^ int(hashes[b])).count("1") <= distance
            and np.abs(colours[a].astype(int) - colours[b]).max() <= colour
        ]
        twins.append(min(alike)[1] if alike else -1)
    return twins


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=12, deadline=None)
def test_twins_are_those_of_comparing_all_with_all(seed: int, distance: int) -> None:
    hashes, colours, order = planted(seed)
    expected = brute(hashes, colours, order, distance, 12)
    best = np.full(len(hashes), -1)
    for band in bands(hashes, distance):
        twins = earlier_twins(band, hashes, colours, order, distance, 12)
        better = (twins >= 0) & ((best < 0) | (order[twins] < order[best]))
        best[better] = twins[better]
    assert best.tolist() == expected
    index = Index(np.array([], dtype=object), hashes[:40], colours[:40], distance, 12)
    near = [
        next((a for a in range(40) if bin(int(hashes[a]) ^ int(h)).count("1") <= distance
              and np.abs(colours[a].astype(int) - c).max() <= 12), -1)
        for h, c in zip(hashes[40:], colours[40:])
    ]  # fmt: skip
    assert index.near(hashes[40:], colours[40:]).tolist() == near
