"""Arithmetic of a training step, counted on a model without weights (the meta device). Legend: L text tokens."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder, kept_patches
from m2_ds.model.random import Noise

# Dense bf16 peak of one device, TFLOP/s, from the makers' data sheets.
_PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "V100": 125.0}


class StepFlops:
    """Floating point operations of forward and backward (twice the forward), recomputation not counted."""

    def __init__(self, config: M2EncoderConfig) -> None:
        with torch.device("meta"):
            self._model = M2Encoder(config.model_copy(update={"recompute": "none"}))
        self._noise = Noise(torch.zeros(1, dtype=torch.int64, device="meta"))
        self.image = cache(self._image)
        self.text = cache(self._text)
        self.joint = cache(self._joint)

    def __call__(self, images: int, texts: int, length: int) -> float:
        """Of ``images`` pictures and ``texts`` captions padded to ``length`` tokens."""
        return 3.0 * (images * self.image() + texts * self.text(length))

    def _image(self) -> int:
        size = self._model.config.image_size
        images = torch.zeros(1, 3, size, size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._model.image_features(images, self._noise)
        return counter.get_total_flops()

    def _text(self, length: int) -> int:
        ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._model.text_features(ids, ids)
        return counter.get_total_flops()

    def _joint(self, length: int, share: float) -> float:
        """Forward and backward of a caption's joint sequences for masked objectives, ``share`` of its tokens hidden."""
        model, config = self._model, self._model.config
        size, split = config.image_size, config.num_patches + 1
        objectives = config.masked_text_head + (config.masked_image_head > 0)
        images = torch.zeros(1, 3, size, size, device="meta")
        ids = torch.zeros(objectives, length, dtype=torch.int64, device="meta")
        valid = torch.ones(objectives, split + length, dtype=torch.bool, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = model.enter_jointly(model.backbone.vision_embed(images), ids, None)
            x = model.backbone_vl(model.backbone.encoder(x, split, valid), split, valid)
        outputs = share * length * config.vocab_size if config.masked_text_head else 0.0
        return 3.0 * (counter.get_total_flops() + 2 * config.hidden_size * outputs)


def layer_flops(config: M2EncoderConfig, captions: int = 2) -> list[float]:
    """Of each layer's forward for a picture and its ``captions`` at half their largest length: a pipeline's balance.

    The first has the patches' product, the last computes class tokens alone.
    """
    width, text = config.hidden_size, config.max_text_length // 2
    picture = kept_patches(config.num_patches, config.patch_drop) + 1
    products = 8 * width**2 + 4 * width * config.ffn_size
    each = [(picture, 1), (text, captions)]
    layer = sum(n * (t * products + 4 * t * t * width) for t, n in each)
    found = [float(layer)] * (config.num_layers + config.num_vl_layers)
    if config.num_vl_layers:
        found[-1] = sum(n * (t * 4 * width**2 + products + 4 * t * width) for t, n in each)
    found[0] += 6 * config.num_patches * config.patch_size**2 * width
    return found


def peak_tflops(device: torch.device) -> float | None:
    """The dense bf16 peak of a known GPU; None for a CPU or an unknown device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_TFLOPS.items() if all(word in name for word in key.split())), None)
