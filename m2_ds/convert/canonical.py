"""The canonical folder: safetensors of whole tensors under the release's names, config.json, tokenizer files beside it.

model.safetensors                        or  model-00001-of-00004.safetensors ... + model.safetensors.index.json
config.json                              fields of M2EncoderConfig
tokenizer_config.json, tokenizer.model   where the run had a tokenizer
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from m2_ds.files import sync, write_json
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.weights import Piece, pieces
from m2_ds.parallel.collectives import all_gather_objects, gather
from m2_ds.parallel.mesh import Group, Mesh

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


class WeightWriter:
    """Writes fp32 tensors of a model that lies on the ranks of ``mesh`` into safetensors files; every rank calls it.

    The data-parallel ranks of a pipeline stage, who all have the same, take its files in turn: each gathers the tensors
    of one from the tensor-parallel ranks, then all write at once. So none holds more than a file. Files are synced to
    disk; making a folder appear atomically is the caller's part.
    """

    def __init__(
        self, mesh: Mesh, max_file_bytes: int = 2 << 30, guard: AbstractContextManager[Any] | None = None
    ) -> None:
        """``guard``: entered around every write; one that keeps errors lets the ranks' collectives go on."""
        self.mesh, self.max_file_bytes = mesh, max_file_bytes
        self.guard = nullcontext() if guard is None else guard
        self._number = 0
        self._held: dict[Path, dict[str, Tensor]] = {}

    def write(self, folder: Path, announced: Iterable[Piece], entries: Iterable[Piece]) -> None:
        """``entries``: what this rank has of its stage's tensors, one after another, as `outlines` ``announced`` it.

        The last files are written by `finish`.
        """
        data, sizes = self.mesh.data_parallel, {p.name: math.prod(p.whole_shape) * 4 for p in announced}
        stages = all_gather_objects(sizes, self.mesh.pipeline)
        files = _plan(stages, self.max_file_bytes)
        stream = iter(entries)
        for file, members in files[self.mesh.pipeline.rank].items():
            held = {}
            for expected in members:
                piece = next(stream)
                assert piece.name == expected, f"{piece.name} came where {expected} was announced"
                if self._number % data.size == data.rank:
                    whole = _whole(piece, self.mesh.tensor)
                    if whole is not None:
                        held[piece.name] = whole.cpu().contiguous().clone()
            if held:
                self._held[folder / file] = held
            self._number += 1
            if self._number % data.size == 0:
                self.finish()
        weight_map = {name: file for stage in files for file, members in stage.items() for name in members}
        if self.mesh.is_first and SINGLE not in weight_map.values():
            total = sum(size for stage in stages for size in stage.values())
            with self.guard:
                write_json(folder / INDEX, index_fields(weight_map, total))

    def finish(self) -> None:
        """Write what this rank still holds."""
        for path, tensors in self._held.items():
            with self.guard:
                save_file(tensors, path, metadata={"format": "pt"})
                sync(path)
        self._held.clear()


def _plan(stages: Sequence[Mapping[str, int]], max_bytes: int) -> list[dict[str, list[str]]]:
    """Files of each stage, numbered through, and the names of the tensors in them."""
    cut = [cut_files(sizes, max_bytes) for sizes in stages]
    names = iter(file_names(sum(map(len, cut))))
    return [{next(names): part for part in parts} for parts in cut]


def file_names(count: int) -> list[str]:
    """Of a folder's safetensors files."""
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def index_fields(weight_map: Mapping[str, str], total_bytes: int) -> dict[str, Any]:
    """Which file each tensor is in; for a folder of several files."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def config_fields(config: M2EncoderConfig) -> dict[str, Any]:
    return {"model_type": "m2_encoder", **config.model_dump(mode="json")}


def cut_files(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, which has at most ``max_bytes`` of them, or one tensor."""
    parts: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not parts or used + size > max_bytes:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _whole(piece: Piece, group: Group) -> Tensor | None:
    """The tensor that the ranks of a tensor-parallel group hold pieces of, on the first of them."""
    if piece.split is None:
        return piece.tensor if group.is_first else None
    parts = gather(piece.tensor, group, "checkpoint")
    if parts is None:
        return None
    return torch.cat(parts, piece.split.dim).narrow(piece.split.dim, 0, piece.split.whole)  # without the filling


def write_config(folder: Path, config: M2EncoderConfig) -> None:
    write_json(folder / CONFIG, config_fields(config))


def read_config(folder: Path, name: str = CONFIG) -> M2EncoderConfig:
    """Raises ValueError that names the file."""
    path = folder / name
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("model_type", None)
        if "transformers_version" in fields:  # written by transformers, whose own fields lie beside ours
            fields = {name: value for name, value in fields.items() if name in M2EncoderConfig.model_fields}
        return M2EncoderConfig.model_validate(fields)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # pydantic's is a ValueError, too
        raise ValueError(f"{path} does not hold a model configuration: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a canonical folder. Raises ValueError where there are none or one is missing."""
    files = [folder / SINGLE]
    if (folder / INDEX).exists():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("it has to name files beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / INDEX} is damaged or no index of weights: {error!r}") from None
        files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder} holds no {file.name}: not a canonical weight folder, or an incomplete copy")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, memory-mapped. Raises ValueError that names a file which cannot be read."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                state.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
    return state


def outlines(name: str, parameter: nn.Parameter) -> Iterator[Piece]:
    """The pieces of an inner parameter without their numbers; of a partitioned one (ZeRO 3), as if it were gathered."""
    return pieces(name, parameter, torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta"))


def read_stretch(name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor], start: int, length: int) -> Tensor:
    """Numbers ``start`` to ``start + length`` of an inner parameter, flat, in fp32, from canonical tensors.

    Of memory-mapped ones next to nothing else is read. What the whole weight does not have is zero: the filling of a
    piece, numbers beyond its end.
    """
    out = torch.zeros(length)
    offset = 0
    for piece in outlines(name, parameter):
        whole = tensors[piece.name]
        source = whole if piece.split is None else piece.split.of(whole)
        assert source.shape[1:] == piece.tensor.shape[1:], "filling lies behind a piece's rows"
        first, last = max(start, offset), min(start + length, offset + source.numel())
        if first < last:
            out[first - start : last - start] = source.flatten()[first - offset : last - offset]
        offset += piece.tensor.numel()
    return out
