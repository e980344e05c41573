"""Pictures from bytes to square uint8 tensors, for training (varied) and evaluation (as they are).

Everything random about a picture comes from hashes of (seed, slot), so it is the same in any process. A training
picture is resampled once: crop, or crop with rotation, shift, zoom and shear, straight to the target size.

Shapes: H, W height and width of a picture; S side of the target square; N pictures; K random numbers a picture.
"""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from m2_ds.data import randomness
from m2_ds.data.config import AugmentConfig

MAX_PIXELS = 100_000_000
# Rec. 601 luma, and the colour plane of YIQ, in which hue is an angle.
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
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


def to_tensor(picture: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


class EvalTransform:
    """The release's evaluation transform: RGB, then bicubic resize to the square, aspect ratio not kept, no crop.

    As in the release, transparency is dropped, not shown on white; `decode` has dealt with it already.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture of any size and mode -> uint8 [3, S, S]."""
        return to_tensor(picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC))


# Which random number of a picture decides what.
(_AREA, _RATIO, _X, _Y, _FLIP, _AFFINE, _ANGLE, _SHIFT_X, _SHIFT_Y, _ZOOM, _SHEAR_X, _SHEAR_Y) = range(12)
(_BRIGHT, _CONTRAST, _SATURATION, _HUE, _GRAY) = range(12, 17)
(_ERASE, _ERASE_AREA, _ERASE_RATIO, _ERASE_X, _ERASE_Y, _RED, _GREEN, _BLUE) = range(17, 25)
_DRAWS = 25


def _between(u: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _between_log(u: float, bounds: tuple[float, float]) -> float:
    return math.exp(_between(u, (math.log(bounds[0]), math.log(bounds[1]))))


class TrainTransform:
    """Random crop, geometry, colour and erasing, decided by (seed, slot).

    `draws(slots)` gives each picture its random numbers; `scale(draw)` tells the decoder how small it may decode;
    calling it with pixels and the picture's draw gives the tensor.
    """

    def __init__(self, config: AugmentConfig, size: int, seed: int) -> None:
        self.config, self.size, self.seed = config, size, seed
        self._affine = config.affine > 0 and bool(
            config.degrees or config.translate or config.shear or config.scale != (1.0, 1.0)
        )
        self._colour = bool(config.brightness or config.contrast or config.saturation or config.hue or config.grayscale)

    def draws(self, slots: np.ndarray) -> np.ndarray:
        """float64 [N, K] in [0, 1) for slots int64 [N]."""
        return randomness.uniform(self.seed, randomness.IMAGE, slots[:, None], np.arange(_DRAWS)[None])

    def _crop(self, draw: np.ndarray) -> tuple[float, float, float, float]:
        """(left, top, width, height) as shares of the picture's sides."""
        area = _between(draw[_AREA], self.config.crop_scale)
        ratio = _between_log(draw[_RATIO], self.config.crop_ratio)
        width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
        return draw[_X] * (1 - width), draw[_Y] * (1 - height), width, height

    def scale(self, draw: np.ndarray) -> Callable[[int, int], float]:
        """For `decode`: the crop must not have fewer pixels than the target asks for."""
        _, _, crop_width, crop_height = self._crop(draw)
        zoom = max(1.0, self.config.scale[1]) if self._affine else 1.0
        side = self.size * zoom
        return lambda width, height: min(1.0, max(side / (width * crop_width), side / (height * crop_height)))

    def __call__(self, pixels: np.ndarray, draw: np.ndarray) -> Tensor:
        """Pixels uint8 [H, W, 3] and the draw of one picture [K] -> uint8 [3, S, S]."""
        config = self.config
        box = self._crop(draw)
        flip = draw[_FLIP] < config.flip
        if self._affine and draw[_AFFINE] < config.affine:
            out = self._warp(pixels, box, flip, draw)
        else:
            out = self._resize(pixels, box)
            if flip:
                out = out.flip(-1)
        if self._colour:
            out = self._recolour(out, draw)
        if draw[_ERASE] < config.erase:
            out = self._erased(out, draw)
        return out

    def _resize(self, pixels: np.ndarray, box: tuple[float, float, float, float]) -> Tensor:
        height, width = pixels.shape[:2]
        left, top = round(box[0] * width), round(box[1] * height)
        right = max(left + 1, round((box[0] + box[2]) * width))
        bottom = max(top + 1, round((box[1] + box[3]) * height))
        view = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
        # torch's antialiased bicubic on uint8 is four times as fast as Pillow's and within 2 of 255 of it.
        return F.interpolate(view, size=(self.size, self.size), mode="bicubic", antialias=True)[0]

    def _warp(self, pixels: np.ndarray, box: tuple[float, float, float, float], flip: bool, draw: np.ndarray) -> Tensor:
        config, size = self.config, self.size
        height, width = pixels.shape[:2]
        zoom = _between_log(draw[_ZOOM], config.scale)
        angle = math.radians(_between(draw[_ANGLE], (-config.degrees, config.degrees)))
        shear_x = math.tan(math.radians(_between(draw[_SHEAR_X], (-config.shear, config.shear))))
        shear_y = math.tan(math.radians(_between(draw[_SHEAR_Y], (-config.shear, config.shear))))
        cos, sin = math.cos(angle), math.sin(angle)
        forward = zoom * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear_x], [shear_y, 1.0]])
        if flip:
            forward = forward @ np.diag([-1.0, 1.0])
        shift = np.array([_between(draw[k], (-config.translate, config.translate)) for k in (_SHIFT_X, _SHIFT_Y)])
        # Target point t in [-1/2, 1/2]^2 shows crop point inverse (t - shift); then to pixels of the source.
        inverse = np.linalg.inv(forward)
        picture = Image.fromarray(pixels)
        # An affine transform does not low-pass: shrink by whole factors first, as far as nothing is lost.
        coarse = int(min(box[2] * width, box[3] * height) / (size * max(zoom, 1e-6)))
        if coarse >= 2:
            picture = picture.reduce(coarse)
        sides = np.array([box[2] * picture.width, box[3] * picture.height])
        corner = np.array([box[0] * picture.width, box[1] * picture.height])
        matrix = sides[:, None] * inverse / size
        offset = corner + sides * (0.5 - inverse @ (0.5 + shift))
        picture = picture.transform(
            (size, size),
            Image.Transform.AFFINE,
            (*matrix[0], offset[0], *matrix[1], offset[1]),
            Image.Resampling.BICUBIC,
            fillcolor=config.fill,
        )
        return to_tensor(picture)

    def _recolour(self, picture: Tensor, draw: np.ndarray) -> Tensor:
        """Brightness, contrast, saturation, hue and loss of colour as one 3 x 3 matrix and one offset."""
        config = self.config
        brightness = 1 + config.brightness * (2 * draw[_BRIGHT] - 1)
        contrast = 1 + config.contrast * (2 * draw[_CONTRAST] - 1)
        saturation = 1 + config.saturation * (2 * draw[_SATURATION] - 1)
        if draw[_GRAY] < config.grayscale:
            saturation = 0.0
        turn = 2 * math.pi * config.hue * (2 * draw[_HUE] - 1)
        colour = saturation * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        matrix = np.eye(3)
        matrix[1:, 1:] = colour
        matrix = contrast * brightness * (_RGB @ matrix @ _YIQ)
        values = picture.flatten(1).float()
        # Saturation and hue leave grey as it is, so the offset of contrast is the same in every channel.
        mean = float(_LUMA @ values.mean(1).numpy().astype(np.float64))
        values = torch.from_numpy(matrix.astype(np.float32)) @ values
        return values.add_((1 - contrast) * brightness * mean + 0.5).clamp_(0, 255).byte().view_as(picture)

    def _erased(self, picture: Tensor, draw: np.ndarray) -> Tensor:
        area = _between(draw[_ERASE_AREA], self.config.erase_scale)
        ratio = _between_log(draw[_ERASE_RATIO], self.config.erase_ratio)
        width = min(self.size, max(1, round(self.size * math.sqrt(area * ratio))))
        height = min(self.size, max(1, round(self.size * math.sqrt(area / ratio))))
        left = int(draw[_ERASE_X] * (self.size - width + 1))
        top = int(draw[_ERASE_Y] * (self.size - height + 1))
        colour = torch.tensor([int(256 * draw[k]) for k in (_RED, _GREEN, _BLUE)], dtype=torch.uint8)
        picture = picture.clone()
        picture[:, top : top + height, left : left + width] = colour[:, None, None]
        return picture
