"""Pictures: rules from the header, one decode, and signatures that near duplicates share.

Legend: B pictures, COLOURS bytes; a thumbnail is uint8 [32, 32, 3].
"""

import functools
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from m2_ds.data.decode import PictureError, decode
from m2_ds.prepare.config import PictureConfig
from m2_ds.prepare.pairs import Drop

SIDE = 32
COLOURS = 8 * 8 * 3  # bytes of a picture's mean colours
_ORIENTATION = 0x0112
_BROKEN = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError)
Array = np.ndarray


@dataclass
class Examined:
    """A picture that passed: its size upright, its bytes (encoded anew if it was too large), its thumbnail."""

    width: int
    height: int
    image: bytes
    thumbnail: Array


def examine(data: bytes, rules: PictureConfig) -> Examined | Drop:
    """One picture through all rules. Nothing is decoded that the header rules out."""
    if not data:
        return Drop("empty_picture", "0 bytes")
    if len(data) > rules.max_bytes:
        return Drop("too_many_bytes", f"{len(data):,} bytes")
    header = _header(data)
    if isinstance(header, Drop):
        return header
    width, height, kind, animated = header
    if (drop := _header_rules(width, height, kind, animated, rules)) is not None:
        return drop
    wanted = 2 * SIDE if rules.resize_to is None else max(2 * SIDE, rules.resize_to)
    try:
        picture = decode(data, lambda w, h: min(1.0, wanted / min(w, h)), max_pixels=rules.max_pixels)
    except PictureError as error:
        return Drop("broken_picture", str(error).removeprefix("broken picture: "))
    if rules.single_colour >= 0:
        spread = max(high - low for low, high in picture.getextrema())  # type: ignore[operator, misc]
        if spread <= rules.single_colour:
            return Drop("single_colour", f"no channel varies by more than {spread}")
    if rules.resize_to is not None and min(width, height) > rules.resize_to:
        scale = rules.resize_to / min(width, height)
        width, height = round(width * scale), round(height * scale)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=rules.resize_quality)
        data = out.getvalue()
    return Examined(width, height, data, thumbnail(picture))


def thumbnail(picture: Image.Image) -> Array:
    """uint8 [32, 32, 3]: the whole picture in an RGB square."""
    # Not BOX: with sides that 32 does not divide, its fields shift when a picture is copied at another size.
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _header(data: bytes) -> tuple[int, int, str, bool] | Drop:
    """(width, height, format, whether it is animated) upright, without decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, and sizes that have a rule here
            picture: ImageFile.ImageFile = Image.open(io.BytesIO(data))
            width, height = picture.size
            animated = bool(getattr(picture, "is_animated", False))
            if "exif" in picture.info and picture.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
            return width, height, str(picture.format), animated
    except Image.DecompressionBombError as error:
        return Drop("too_many_pixels", str(error))
    except _BROKEN as error:
        return Drop("broken_picture", str(error) or type(error).__name__)


def _header_rules(width: int, height: int, kind: str, animated: bool, rules: PictureConfig) -> Drop | None:
    if width < 1 or height < 1:
        return Drop("broken_picture", f"{width} x {height} pixels")
    if width * height > rules.max_pixels:
        return Drop("too_many_pixels", f"{width} x {height}")
    if kind not in rules.formats:
        return Drop("format", kind)
    if animated and not rules.animated:
        return Drop("animated", kind)
    if max(width, height) > rules.max_aspect_ratio * min(width, height):
        return Drop("aspect_ratio", f"{width} x {height}")
    if min(width, height) < rules.min_side:
        return Drop("too_small", f"{width} x {height}")
    return None


@functools.cache
def _cosines() -> Array:
    """float64 [8, 32]: the lowest 8 rows of the DCT-II over 32 samples, unscaled."""
    k, n = np.mgrid[:8, :SIDE]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


def perceptual_hashes(thumbnails: Array) -> Array:
    """uint64 [B] from uint8 [B, 32, 32, 3]: which of the 64 lowest DCT coefficients of the grey picture are above their
    median, the first one in the highest bit. The definition of ImageHash's phash, for a batch in three products."""
    # ITU-R 601 in Pillow's fixed point, so that the bits are those of its convert("L").
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    grey = ((thumbnails @ weights + 0x8000) >> 16).astype(np.float64)
    low = (_cosines() @ grey @ _cosines().T).reshape(len(grey), 64)
    # A few parts in 10^12 of rounding must not decide about coefficients that are 0 in exact arithmetic.
    bits = low > np.median(low, axis=1, keepdims=True) + 1e-6
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def mean_colours(thumbnails: Array) -> Array:
    """uint8 [B, COLOURS] from uint8 [B, 32, 32, 3]: mean RGB of 8 x 8 fields. Tells apart what a grey hash does not.

    With 4 x 4 fields a small shape of another colour was not seen.
    """
    sums = thumbnails.reshape(-1, 8, 4, 8, 4, 3).sum(axis=(2, 4), dtype=np.uint16)
    return ((sums + 8) // 16).astype(np.uint8).reshape(-1, COLOURS)


def preview(data: bytes, side: int = 112) -> bytes | None:
    """A small JPEG for the card; None where there is nothing to see. Never decodes what a bomb would be."""
    try:
        picture = decode(data, lambda w, h: min(1.0, side / max(w, h)), max_pixels=50_000_000)
        picture.thumbnail((side, side))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=72)
        return out.getvalue()
    except (PictureError, OSError, ValueError):
        return None
