"""Pictures from bytes to square uint8 tensors, for training (varied) and evaluation (as they are).

Everything random about a picture comes from hashes of (seed, slot), so it is the same in any process. A training
picture is resampled once: crop, or crop with rotation, shift, zoom and shear, straight to the target size.

Shapes: H, W height and width of a picture; S side of the target square; N pictures; K random numbers a picture.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from m2_ds.data import randomness
from m2_ds.data.config import AugmentConfig
from m2_ds.data.decode import PictureError, decode, to_rgb

__all__ = ["EvalTransform", "PictureError", "TrainTransform", "decode", "to_rgb", "to_tensor"]

# Rec. 601 luma, and the colour plane of YIQ, in which hue is an angle.
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)


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
# Numbers that colour arithmetic works on at a time: few enough to stay in the processor's cache.
_CHUNK = 1 << 16


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
        """One picture, pixels uint8 [H, W, 3] with its draw [K], to the end: uint8 [3, S, S]."""
        return self.finish(self.geometry(pixels, draw)[None], draw[None])[0]

    def geometry(self, pixels: np.ndarray, draw: np.ndarray) -> Tensor:
        """Crop, warp and flip of one picture, pixels uint8 [H, W, 3] with its draw [K] -> uint8 [3, S, S]."""
        box = self._crop(draw)
        flip = draw[_FLIP] < self.config.flip
        if self._affine and draw[_AFFINE] < self.config.affine:
            return self._warp(pixels, box, flip, draw)
        out = self._resize(pixels, box)
        return out.flip(-1) if flip else out

    def finish(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Colour and erasing of a batch uint8 [N, 3, S, S] with draws [N, K], in place.

        Only elementwise arithmetic and whole-number sums: a picture comes out the same in any batch.
        """
        if self._colour:
            chunk = max(1, _CHUNK // images[0].numel())
            for first in range(0, len(images), chunk):
                self._recolour(images[first : first + chunk], draws[first : first + chunk])
        for number in np.flatnonzero(draws[:, _ERASE] < self.config.erase).tolist():
            self._erase(images[number], draws[number])
        return images

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
        left, top, crop_width, crop_height = box
        zoom = _between_log(draw[_ZOOM], config.scale)
        angle = math.radians(_between(draw[_ANGLE], (-config.degrees, config.degrees)))
        shear_x = math.tan(math.radians(_between(draw[_SHEAR_X], (-config.shear, config.shear))))
        shear_y = math.tan(math.radians(_between(draw[_SHEAR_Y], (-config.shear, config.shear))))
        shift_x = _between(draw[_SHIFT_X], (-config.translate, config.translate))
        shift_y = _between(draw[_SHIFT_Y], (-config.translate, config.translate))
        # Forward, points of the crop in [-1/2, 1/2]^2 to the target's: rotation x shear x mirror, times zoom, + shift.
        cos, sin, mirror = zoom * math.cos(angle), zoom * math.sin(angle), -1.0 if flip else 1.0
        a, b = mirror * (cos - sin * shear_y), cos * shear_x - sin
        c, d = mirror * (sin + cos * shear_y), sin * shear_x + cos
        det = a * d - b * c
        a, b, c, d = d / det, -b / det, -c / det, a / det
        picture = Image.fromarray(pixels)
        # An affine transform does not low-pass: shrink by whole factors first, as far as no detail is lost.
        shrink = min(crop_width * picture.width, crop_height * picture.height) / (size * zoom)
        if shrink >= 2:
            picture = picture.reduce(int(shrink))
        width, height = crop_width * picture.width, crop_height * picture.height
        matrix = (
            width * a / size,
            width * b / size,
            left * picture.width + width * (0.5 - a * (0.5 + shift_x) - b * (0.5 + shift_y)),
            height * c / size,
            height * d / size,
            top * picture.height + height * (0.5 - c * (0.5 + shift_x) - d * (0.5 + shift_y)),
        )
        # What is left of the shrinking suits bilinear weights, which take half the time; enlarging wants bicubic ones.
        how = Image.Resampling.BILINEAR if shrink >= 1 else Image.Resampling.BICUBIC
        return to_tensor(picture.transform((size, size), Image.Transform.AFFINE, matrix, how, fillcolor=config.fill))

    def _recolour(self, images: Tensor, draws: np.ndarray) -> None:
        """Brightness, contrast, saturation, hue and loss of colour: one 3 x 3 matrix and one offset a picture."""
        config = self.config
        brightness = 1 + config.brightness * (2 * draws[:, _BRIGHT] - 1)
        contrast = 1 + config.contrast * (2 * draws[:, _CONTRAST] - 1)
        saturation = 1 + config.saturation * (2 * draws[:, _SATURATION] - 1)
        saturation[draws[:, _GRAY] < config.grayscale] = 0.0
        turn = 2 * math.pi * config.hue * (2 * draws[:, _HUE] - 1)
        plane = np.zeros((len(draws), 3, 3))
        plane[:, 0, 0] = 1
        plane[:, 1, 1] = plane[:, 2, 2] = saturation * np.cos(turn)
        plane[:, 2, 1] = saturation * np.sin(turn)
        plane[:, 1, 2] = -plane[:, 2, 1]
        matrices = (contrast * brightness)[:, None, None] * (_RGB @ plane @ _YIQ)
        # Saturation and hue leave grey as it is, so the offset of contrast is the same in every channel.
        means = images.sum((2, 3)).numpy() / images[0, 0].numel()
        offsets = (1 - contrast) * brightness * (means * _LUMA).sum(1)
        weights = torch.from_numpy(matrices.astype(np.float32))[..., None, None]
        red, green, blue = images.float().unbind(1)
        # Half more, because conversion to whole numbers cuts off.
        rounding = torch.from_numpy((offsets + 0.5).astype(np.float32))[:, None, None]
        for channel in range(3):
            value = red * weights[:, channel, 0]
            value.add_(green * weights[:, channel, 1]).add_(blue * weights[:, channel, 2]).add_(rounding)
            images[:, channel] = value.clamp_(0, 255)

    def _erase(self, picture: Tensor, draw: np.ndarray) -> None:
        area = _between(draw[_ERASE_AREA], self.config.erase_scale)
        ratio = _between_log(draw[_ERASE_RATIO], self.config.erase_ratio)
        width = min(self.size, max(1, round(self.size * math.sqrt(area * ratio))))
        height = min(self.size, max(1, round(self.size * math.sqrt(area / ratio))))
        left = int(draw[_ERASE_X] * (self.size - width + 1))
        top = int(draw[_ERASE_Y] * (self.size - height + 1))
        colour = torch.tensor([int(256 * draw[k]) for k in (_RED, _GREEN, _BLUE)], dtype=torch.uint8)
        picture[:, top : top + height, left : left + width] = colour[:, None, None]
