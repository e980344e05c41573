"""Which tensor of a source becomes which of the target: names and shapes compared, positions and patches resized.

Legend: D width, P side of the source's patches, Q of the target's, pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from m2_ds.convert.report import Report, some
from m2_ds.convert.stored import FLOATS, Stored
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import canonical_shapes
from m2_ds.model.loading import resize_positions
from m2_ds.model.weights import VISION_POSITIONS

PATCH_KERNEL = "backbone.vision_embed.proj.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. ``content`` of the same number of numbers, in any type."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Stored | Tensor

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunks(self) -> Iterator[Tensor]:
        """Flat tensors of ``dtype``. Raises ValueError where numbers do not fit into it."""
        chunks = self.content.chunks() if isinstance(self.content, Stored) else iter([self.content.reshape(-1)])
        for chunk in chunks:
            if chunk.dtype == self.dtype:
                yield chunk
                continue
            cast = chunk.to(self.dtype)
            lost = int((chunk.isfinite() & ~cast.isfinite()).sum())
            if lost:
                largest = chunk[chunk.isfinite()].abs().max().item()
                raise ValueError(
                    f"{self.name} holds numbers up to {largest:.6g}, which {name_of(self.dtype)} does not reach: take "
                    "--dtype bfloat16 or float32"
                )
            yield cast


def fit(
    tensors: Mapping[str, Stored],
    config: M2EncoderConfig,
    report: Report,
    dtype: torch.dtype | None = None,
    resample: bool = False,
) -> list[Entry]:
    """The target's tensors, in the source's order, for the network ``config``; ``dtype`` None: as they are stored.

    ``resample``: patches of another size are meant. Only what is resized is read. Raises ValueError with every missing
    and unexpected name, or every wrong shape, which ``report`` then holds, too.
    """
    expected = shapes_of(config, report.config_file, len(tensors))
    report.missing = sorted(expected.keys() - tensors.keys())
    report.unexpected = sorted(tensors.keys() - expected.keys())
    if report.missing or report.unexpected:
        raise ValueError(
            f"{report.source} does not hold the weights of the network in {report.config_file}.\n"
            f"  missing ({len(report.missing)}): {some(report.missing, 40)}\n"
            f"  unexpected ({len(report.unexpected)}): {some(report.unexpected, 40)}\n"
            "Check that the configuration belongs to the checkpoint (layers, stem), or name another with --config"
        )
    entries = []
    for name, stored in tensors.items():
        target, shape = dtype or stored.dtype, expected[name]
        if stored.dtype not in FLOATS:
            report.wrong.append(f"{name} is {name_of(stored.dtype)}, not floating point")
        elif stored.shape == shape or stored.numel == torch.Size(shape).numel() == 1:
            entries.append(Entry(name, target, shape, stored))
        elif name == VISION_POSITIONS and stored.shape[1:] == shape[1:]:
            try:
                table = resize_positions(stored.read().to(target), config.num_patches)
            except ValueError as error:
                raise ValueError(f"{report.source}: {error}") from None
            report.resized[name] = (list(stored.shape), list(shape))
            entries.append(Entry(name, target, shape, table))
        elif name == PATCH_KERNEL and resample and _is_patch_kernel(stored.shape, shape):
            report.resized[name] = (list(stored.shape), list(shape))
            entries.append(Entry(name, target, shape, resample_patches(stored.read().to(target), shape[-1])))
        else:
            report.wrong.append(f"{name} is {list(stored.shape)}, not {list(shape)}")
    if report.wrong:
        raise ValueError(
            f"{report.source}: {len(report.wrong)} tensors are not the ones of the network in {report.config_file}: "
            f"{some(report.wrong, 40)}.\nCheck its hidden_size, embed_dim, vocab_size, text_positions and patch_size"
        )
    return entries


def shapes_of(config: M2EncoderConfig, where: Path | str, tensors: int) -> dict[str, tuple[int, ...]]:
    """`canonical_shapes`, refusing at once networks that are far too large for that many ``tensors``."""
    layers = config.num_layers + config.num_vl_layers + config.stem_depth
    if layers > tensors:
        raise ValueError(f"{where} describes a network of {layers} layers; the checkpoint has {tensors} tensors")
    try:
        return canonical_shapes(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what torch counts
        raise ValueError(f"{where} describes a network that cannot be built: {error}") from None


def changed(config: M2EncoderConfig, image_size: int | None, patch_size: int | None) -> M2EncoderConfig:
    """The network for pictures of another size, or in other patches. Raises ValueError where it cannot be."""
    changes = {"image_size": image_size or config.image_size, "patch_size": patch_size or config.patch_size}
    if config.stem == "conv" and changes["patch_size"] != config.patch_size:
        raise ValueError(
            f"this network has a convolutional stem for patches of {config.patch_size} px: it cannot be resampled to "
            f"--patch-size {patch_size}"
        )
    try:
        return M2EncoderConfig.model_validate({**config.model_dump(), **changes})
    except ValueError as error:
        raise ValueError(
            f"--image-size {changes['image_size']} --patch-size {changes['patch_size']}: {error}"
        ) from None


def _is_patch_kernel(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[:2] == wanted[:2] and shape[2] == shape[3] > 0


def resample_patches(kernel: Tensor, side: int) -> Tensor:
    """A patch kernel [D, 3, P, P] for patches of ``side`` Q: [D, 3, Q, Q], in the kernel's type.

    With B the matrix [Q Q, P P] that resizes a patch bilinearly, the kernel w becomes the pseudo-inverse of B^T times
    w, which answers to resized patches as w did to the patches: exactly where Q >= P, else in the least-squares sense
    over patches of white noise (FlexiViT, arXiv 2212.08013, equations 3 and 4).
    """
    old = kernel.shape[-1]
    units = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    resized = F.interpolate(units, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    matrix = resized.reshape(old * old, side * side).T  # B
    flat = kernel.double().reshape(-1, old * old)
    return (flat @ torch.linalg.pinv(matrix)).reshape(*kernel.shape[:2], side, side).to(kernel.dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
