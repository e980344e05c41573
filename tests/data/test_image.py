"""Pictures: decoding what people have, evaluation to the pixel, training transforms by their definition."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2_ds.data.config import AugmentConfig
from m2_ds.data.image import EvalTransform, PictureError, TrainTransform, decode, to_rgb
from tests.support.pairs import encoded


def photo(width: int = 96, height: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colours with a little grain, as a photograph has."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + k) * np.cos(5 * y - k) for k in range(3)]
    grain = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(50, 80), (16, 16), (9, 7)])
def test_eval_transform_is_pillows_bicubic_of_the_whole_picture(mode: str, size: tuple[int, int]) -> None:
    picture = Image.fromarray(photo(*size)).convert(mode)
    expected = picture.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    result = EvalTransform(32)(picture)
    assert result.dtype == torch.uint8
    assert torch.equal(result, channels_first(np.asarray(expected)))


def test_transparency_shows_white() -> None:
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[:2, :, 0], clear[:2, :, 3] = 200, 255
    for data in (encoded(clear), encoded(clear, "WEBP", lossless=True)):
        pixels = np.asarray(decode(data))
        assert pixels[0, 0].tolist() == [200, 0, 0]
        assert pixels[3, 0].tolist() == [255, 255, 255]
    half = np.full((2, 2, 4), 128, dtype=np.uint8)
    half[..., :3] = 0
    assert np.abs(np.asarray(decode(encoded(half))).astype(int) - 127).max() <= 1
    palette = Image.fromarray(clear).quantize(4)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=palette.getpixel((0, 3)))
    assert np.asarray(decode(out.getvalue()))[3, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(gray))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_also_when_decoded_small(orientation: int) -> None:
    pixels = photo(64, 48)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=95, exif=exif)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = picture.transpose(turns[orientation]) if orientation > 1 else picture
    assert np.abs(np.asarray(decode(out.getvalue())).astype(int) - np.asarray(upright)).mean() < 4
    seen = []
    small = decode(out.getvalue(), lambda width, height: seen.append((width, height)) or 0.5)
    assert seen == [upright.size]
    assert small.size == (upright.width // 2, upright.height // 2)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(upright.reduce(2))).mean() < 5


@pytest.mark.parametrize(("scale", "size"), [(1.0, 256), (0.51, 256), (0.5, 128), (0.3, 128), (0.25, 64), (0.1, 32)])
def test_a_jpeg_is_decoded_at_the_smallest_useful_scale(scale: float, size: int) -> None:
    data = encoded(photo(256, 256), "JPEG", quality=95)
    small = decode(data, lambda *_: scale)
    assert small.size == (size, size)
    whole = decode(data).resize((size, size), Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("size", [(640, 480), (333, 517)])
def test_training_pictures_hardly_differ_for_decoding_small(size: tuple[int, int]) -> None:
    data = encoded(photo(*size), "JPEG", quality=90)
    transform = TrainTransform(AugmentConfig(crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25)), 64, seed=0)
    for draw in transform.draws(np.arange(20)):
        small = decode(data, transform.scale(draw))
        assert small.width < size[0]
        fast = transform(np.array(small), draw)
        assert distance(fast, transform(np.array(decode(data)), draw)) < 2.5


def test_a_crop_is_never_decoded_below_the_target() -> None:
    transform = TrainTransform(AugmentConfig(crop_scale=(0.05, 1.0), scale=(0.5, 2.0), degrees=10), 32, seed=0)
    for draw in transform.draws(np.arange(200)):
        scale = transform.scale(draw)(640, 480)
        _, _, width, height = transform._crop(draw)
        assert min(640 * width * scale, 480 * height * scale) >= 2 * 32 - 1e-6 or scale == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture at all",
        encoded(photo(), "JPEG")[:300],
        encoded(photo(), "JPEG")[:-200],
        encoded(photo())[:400],
        encoded(photo(), "WEBP")[:200],
        b"GIF89a" + bytes(20),
    ],
    ids=["empty", "text", "jpeg-head", "jpeg-cut", "png-cut", "webp-cut", "gif"],
)
def test_broken_pictures_say_so(data: bytes) -> None:
    with pytest.raises(PictureError) as error:
        decode(data)
    assert error.value.reason == "broken picture"


def test_too_large_a_picture_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(PictureError, match="96 x 64") as error:
        decode(encoded(photo()), max_pixels=6000)
    assert error.value.reason == "picture too large"


EVERYTHING: dict[str, Any] = {
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (0.8, 1.25),
    "flip": 0.5,
    "degrees": 15.0,
    "translate": 0.1,
    "scale": (0.8, 1.2),
    "shear": 8.0,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "hue": 0.1,
    "grayscale": 0.2,
    "erase": 0.5,
}


def test_the_same_slot_gives_the_same_picture_in_any_company() -> None:
    transform = TrainTransform(AugmentConfig(**EVERYTHING), 24, seed=3)
    pictures = [photo(40 + k, 30 + k, seed=k) for k in range(40)]
    draws = transform.draws(np.arange(40))
    alone = torch.stack([transform(p, transform.draws(np.array([k]))[0]) for k, p in enumerate(pictures)])
    together = transform.finish(torch.stack([transform.geometry(p, d) for p, d in zip(pictures, draws)]), draws)
    assert torch.equal(alone, together)
    other = TrainTransform(AugmentConfig(**EVERYTHING), 24, seed=4)
    assert not torch.equal(other(pictures[0], other.draws(np.array([0]))[0]), alone[0])
    assert alone.float().std(0).mean() > 10


def one(pixels: np.ndarray, size: int, slot: int = 0, **options: Any) -> torch.Tensor:
    transform = TrainTransform(AugmentConfig(**{"crop_scale": (1.0, 1.0)} | options), size, seed=0)
    return transform(pixels, transform.draws(np.array([slot]))[0])


def test_without_variation_the_picture_is_the_evaluations() -> None:
    pixels = photo(90, 60)
    assert (one(pixels, 32).int() - EvalTransform(32)(Image.fromarray(pixels)).int()).abs().max() <= 2


def test_a_crop_is_the_crop_of_that_area() -> None:
    # A picture whose colours are its coordinates tells what was cut out.
    y, x = np.mgrid[:200, :200]
    pixels = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    areas = []
    for slot in range(50):
        out = one(pixels, 50, slot, crop_scale=(0.3, 0.8), crop_ratio=(0.7, 1.4)).float()
        width, height = (out[0, 25, -2] - out[0, 25, 1]) * 50 / 47, (out[1, -2, 25] - out[1, 1, 25]) * 50 / 47
        areas.append((width * height / 200**2).item())
        assert 0.65 < width / height < 1.5
    assert min(areas) > 0.27
    assert max(areas) < 0.83
    assert np.std(areas) > 0.08


def test_flip_mirrors() -> None:
    pixels = photo(40, 40)
    plain = one(pixels, 20)
    assert torch.equal(one(pixels, 20, flip=1.0), plain.flip(-1))
    turned = {"degrees": 1e-9, "scale": (1.0, 1.0)}
    assert distance(one(pixels, 20, flip=1.0, **turned), plain.flip(-1)) < 2


def test_rotation_turns_about_the_centre_by_the_angle() -> None:
    pixels = np.full((101, 101, 3), 255, dtype=np.uint8)
    pixels[46:55, 51:90] = 0  # a bar from the centre to the right
    angles = []
    for slot in range(30):
        out = one(pixels, 101, slot, degrees=60.0)[0].float()
        dark = (255 - out).clamp(min=0)
        y, x = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
        mean_x, mean_y = (dark * x).sum() / dark.sum() - 50, (dark * y).sum() / dark.sum() - 50
        assert torch.hypot(mean_x, mean_y).item() == pytest.approx(20, abs=1.5)
        angles.append(torch.atan2(mean_y, mean_x).rad2deg().item())
    assert max(map(abs, angles)) <= 61
    assert min(angles) < -30
    assert max(angles) > 30


def test_zoom_and_shift_move_by_their_shares_and_show_the_fill() -> None:
    pixels = np.zeros((80, 80, 3), dtype=np.uint8)
    half = one(pixels, 80, scale=(0.5, 0.5), fill=(10, 200, 30))
    assert half[:, 5, 5].tolist() == [10, 200, 30]
    inside = (half[1] < 100).float()
    assert inside.mean().item() == pytest.approx(0.25, abs=0.02)
    shifted = torch.stack([one(pixels, 80, slot, translate=0.25)[1] for slot in range(40)]) > 128
    columns = shifted.all(1).float().sum(-1)
    assert columns.max() <= 21
    assert columns.max() > 10


def test_the_centre_moves_by_the_shift_whatever_the_rotation() -> None:
    pixels = np.full((101, 101, 3), 255, dtype=np.uint8)
    pixels[47:54, 47:54] = 0
    options = {"degrees": 90.0, "translate": 0.25, "shear": 10.0, "scale": (0.8, 1.2)}
    transform = TrainTransform(AugmentConfig(**options), 101, seed=0)
    for slot in range(20):
        draw = transform.draws(np.array([slot]))[0]
        dark = 255 - one(pixels, 101, slot, **options)[0].float()
        y, x = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
        shift = [((dark * axis).sum() / dark.sum()).item() / 101 + 0.5 / 101 - 0.5 for axis in (x, y)]
        assert shift == pytest.approx([0.25 * (2 * draw[k] - 1) for k in (7, 8)], abs=0.01)


def test_warping_shrinks_without_aliasing() -> None:
    # Stripes too fine for the target must become grey, not patterns.
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    pixels[:, ::2] = 255
    out = one(pixels, 32, degrees=5.0)[:, 6:-6, 6:-6].float()
    assert (out - 127.5).abs().max() < 16


def test_colour_changes_are_the_textbooks() -> None:
    pixels = photo(32, 32).clip(60, 180)
    plain = one(pixels, 32).double()
    luma = (torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None] * plain).sum(0)
    transform = TrainTransform(AugmentConfig(), 32, seed=0)
    for slot in range(10):
        draw = transform.draws(np.array([slot]))[0]
        bright, contrast, saturation = (1 + 0.2 * (2 * draw[k] - 1) for k in (12, 13, 14))
        assert distance(one(pixels, 32, slot, brightness=0.2), (plain * bright).round()) < 0.05
        expected = (plain - luma.mean()) * contrast + luma.mean()
        assert distance(one(pixels, 32, slot, contrast=0.2), expected) < 0.6
        assert distance(one(pixels, 32, slot, saturation=0.2), luma + (plain - luma) * saturation) < 0.6
    grey = one(pixels, 32, grayscale=1.0)
    assert distance(grey, luma.expand(3, -1, -1)) < 0.6
    assert (grey[0].int() - grey[2].int()).abs().max() <= 1


def test_hue_turns_colours_and_keeps_brightness() -> None:
    pixels = photo(32, 32).clip(90, 160)
    plain, weights = one(pixels, 32).float(), torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    turned = one(pixels, 32, 1, hue=0.5).float()
    assert distance(turned, plain) > 5
    assert distance((turned * weights).sum(0), (plain * weights).sum(0)) < 1


def test_erasing_paints_one_rectangle_of_the_asked_area() -> None:
    pixels = photo(64, 64)
    plain = one(pixels, 64)
    for slot in range(20):
        changed = (one(pixels, 64, slot, erase=1.0, erase_scale=(0.1, 0.3)) != plain).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.07 < box.item() / 64**2 < 0.34
        assert changed.sum() > 0.95 * box


def test_ranges_that_make_no_sense_are_refused() -> None:
    for wrong in ({"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"scale": (0, 1)}, {"fill": (0, 0, 256)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AugmentConfig(**wrong)
