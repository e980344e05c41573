"""What a path stands for (run folder, checkpoint, canonical folder, released file, DeepSpeed's folder) and holds.

`resolve` says which files are meant, `open_source` where their tensors lie.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m2_ds.convert.canonical import CONFIG, INDEX, SINGLE, read_config, weight_files
from m2_ds.convert.deepspeed_folder import find_deepspeed, open_deepspeed
from m2_ds.convert.naming import Named
from m2_ds.convert.release import find_release_config, open_release, read_release_config
from m2_ds.convert.run_folder import CHECKPOINTS, CHECKSUMS, MODEL, newest_good, verify
from m2_ds.convert.safetensors_file import read_safetensors
from m2_ds.model.config import M2EncoderConfig

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "sp.model")


@dataclass(frozen=True)
class Source:
    """Tensors under canonical names, where they lie, and what came with them."""

    path: Path
    kind: Literal["canonical", "release", "deepspeed"]
    layout: str
    named: Named
    config: M2EncoderConfig
    config_file: Path
    files: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    other: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def resolve(path: Path) -> Path:
    """The canonical folder or release file that a path stands for.

    Raises ValueError where there is none. Checksums of a checkpoint are compared here, those of other canonical folders
    by `verify_weights`.
    """
    found = locate(path)
    if found.is_dir():
        if (folder := find_deepspeed(found)) is not None:
            raise ValueError(f"{folder} is a checkpoint of DeepSpeed's: make a canonical folder of it with m2 convert")
        weight_files(found)
    return found


def verify_weights(folder: Path) -> None:
    """Compare a canonical folder's weights with the checksums in it, where a conversion wrote some.

    Raises ValueError that names the damaged file. The rest (configuration, tokenizer) may be changed.
    """
    if (folder / CHECKSUMS).exists():
        verify(folder, part="model.safetensors", holds="model")
        verify(folder, part="model-", holds="model")


def locate(path: Path) -> Path:
    """As `resolve`, without looking into a canonical or a DeepSpeed folder."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        return path
    if (path / CHECKPOINTS).is_dir():
        newest = newest_good(path / CHECKPOINTS, part=f"{MODEL}/")
        if newest is None:
            raise ValueError(f"{path} is a run folder without a good checkpoint")
        return newest / MODEL
    if (path / MODEL).is_dir():
        if (path / CHECKSUMS).exists():
            verify(path, part=f"{MODEL}/")
        return path / MODEL
    released = sorted(path.glob("*.ckpt"))
    if len(released) == 1 and not (path / SINGLE).exists() and not (path / INDEX).exists():
        return released[0]
    return path


def open_source(path: Path, config: Path | None = None, allow: Collection[str] = ()) -> Source:
    """Any checkpoint that can be converted. ``config``: the network's JSON where it does not lie beside the weights.

    ``allow``: see `open_release`. Raises ValueError that names the file, or the folder, and what is wrong with it.
    """
    found = locate(path)
    if found.is_file() and found.suffix == ".safetensors":
        raise ValueError(f"{found} is one file of a canonical folder: give the folder {found.parent}")
    if found.is_file():
        release = open_release(found, allow)
        where, network = (config, read_any_config(config)) if config else find_release_config(found)
        layout = f"{release.layout}, {release.container} file"
        return Source(
            found, "release", layout, release.named, network, where, (found,), _tokenizer(found.parent),
            release.other, release.inert,
        )  # fmt: skip
    if (folder := find_deepspeed(found)) is not None:
        content = open_deepspeed(folder)
        where = config or _config_beside(folder, found)
        other = ("optimizer's state",) if any("optim_states" in file.name for file in content.files) else ()
        return Source(
            folder, "deepspeed", content.layout, content.named, read_any_config(where), where, tuple(content.files),
            _tokenizer(where.parent), other, tuple(sorted(content.inert)), tuple(content.notes),
        )  # fmt: skip
    files = weight_files(found)
    verify_weights(found)
    named = Named()
    for file in files:
        named.add(read_safetensors(file).items(), str(file))
    network = read_config(found) if config is None else read_any_config(config)
    layout = f"safetensors, {len(files)} file(s)"
    return Source(
        found, "canonical", layout, named, network, config or found / CONFIG, tuple(files), _tokenizer(found)
    )  # fmt: skip


def read_any_config(path: Path) -> M2EncoderConfig:
    """A canonical ``config.json`` or a release's ``Encoder_*.json``. Raises ValueError that names the file."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        ours = "hidden_size" in fields
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a model configuration: {error}") from None
    return read_config(path.parent, path.name) if ours else read_release_config(path)


def _config_beside(*folders: Path) -> Path:
    for folder in folders:
        if (folder / CONFIG).exists():
            return folder / CONFIG
    raise ValueError(
        f"{folders[0]} does not say which network it is of: give its {CONFIG}, or the release's Encoder_*.json, with "
        "--config FILE"
    )


def _tokenizer(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
