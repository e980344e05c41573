"""Pictures from bytes to RGB. Needs no torch, so that processes which only check or convert pictures start at once."""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
_ORIENTATION = 0x0112


class PictureError(ValueError):
    """Bytes that can't become a picture. `reason` is one of few words, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent shows white behind it."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() == (255, 255):
            return picture.convert("RGB")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        return white.convert("RGB")
    return picture.convert("RGB")


def decode(
    data: bytes, scale: Callable[[int, int], float] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An encoded picture as RGB, upright by its EXIF orientation, transparency on white.

    Args:
        data: JPEG, PNG, WebP or whatever else Pillow reads; of an animation, the first frame.
        scale: from (width, height) the smallest scale that is of use, in (0, 1]. A JPEG is then decoded at the
            smallest of 1/8, 1/4, 1/2, 1 that is no less: the decoder leaves out frequencies that would be lost anyway.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        PictureError: reason "broken picture" or "picture too large".
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own guard warns below our limit; damaged metadata is no reason to lose a picture.
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(io.BytesIO(data))
            width, height = picture.size
            if width * height > max_pixels:
                raise PictureError("picture too large", f"{width} x {height} is over {max_pixels} pixels")
            if scale is not None and picture.format == "JPEG":
                turned = "exif" in picture.info and picture.getexif().get(_ORIENTATION, 1) >= 5
                wanted = scale(height, width) if turned else scale(width, height)
                picture.draft(None, (math.ceil(width * wanted), math.ceil(height * wanted)))
            picture.load()
            if "exif" in picture.info or "XML:com.adobe.xmp" in picture.info:
                picture = ImageOps.exif_transpose(picture)
            return to_rgb(picture)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("picture too large", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError) as error:
        raise PictureError("broken picture", str(error) or type(error).__name__) from error
