#!/usr/bin/env python
"""Writes an open_clip model folder: a config and no weights, for ``--model local-dir:FOLDER``.

The defaults are the widths of the side-by-side runs: 48 px, patch 8, width 192, 3 heads, 8 layers in both towers,
embedding 192. The text tower keeps open_clip's own byte-pair tokenizer (49,408 entries, shipped inside its package).
"""

import json
from pathlib import Path

import tyro

CONFIG_NAME = "open_clip_config.json"  # the file that open_clip looks for in a local folder


def model_config(
    image_size: int = 48,
    patch_size: int = 8,
    width: int = 192,
    head_width: int = 64,
    layers: int = 8,
    context_length: int = 32,
    embed_dim: int = 192,
    vocab_size: int = 49408,
) -> dict[str, object]:
    """The peer's model config as open_clip spells it. Raises ValueError where the sizes do not divide."""
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: change one of them")
    if width % head_width:
        raise ValueError(f"width {width} is not a multiple of head_width {head_width}: change one of them")
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "head_width": head_width,
            "layers": layers,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": width,
            "heads": width // head_width,
            "layers": layers,
        },
    }


def write(
    out: Path,
    image_size: int = 48,
    patch_size: int = 8,
    width: int = 192,
    head_width: int = 64,
    layers: int = 8,
    context_length: int = 32,
    embed_dim: int = 192,
) -> Path:
    """Writes the folder and returns it.

    Args:
        out: The folder to make.
        image_size: Side of the square picture in pixels.
        patch_size: Side of a patch in pixels.
        width: Width of both towers.
        head_width: Width of one attention head.
        layers: Layers of each tower.
        context_length: Tokens of a caption; shorter ones are padded to it.
        embed_dim: Width of the shared embedding.
    """
    config = model_config(image_size, patch_size, width, head_width, layers, context_length, embed_dim)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_NAME).write_text(json.dumps({"model_cfg": config}, indent=2) + "\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    print(tyro.cli(write, description=__doc__))
