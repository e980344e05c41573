"""Checkpoint folders of DeepSpeed's ``engine.save_checkpoint``: weights of ZeRO 0 to 3 and of pipelines.

  latest                                                       the newest tag
  TAG/mp_rank_00_model_states.pt                               `module`, and the order in which the optimizer has it
  TAG/zero_pp_rank_R_mp_rank_00_model_states.pt                ZeRO 3: a file a rank, without weights
  TAG/[bf16_]zero_pp_rank_R_mp_rank_SS_optim_states.pt         fp32 weights of data-parallel rank R (of stage SS)
  TAG/layer_LL-model_00-model_states.pt                        a pipeline's weights

DeepSpeed's own reader (deepspeed.utils.zero_to_fp32) runs what the pickles name, and holds the model in memory, twice
for ZeRO 1 and 2. This one finds the places of the same numbers: a weight is a few stretches of the ranks' files.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2_ds.convert.naming import Named
from m2_ds.convert.stored import Stored
from m2_ds.convert.torch_file import read_torch_file

LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt")
_ALLOWED = ("deepspeed.*",)  # its enumerations and loss scalers; nothing is made of them


@dataclass
class DeepSpeedFolder:
    """Where the weights lie, under canonical names. ``layout`` in words."""

    named: Named = field(default_factory=Named)
    layout: str = ""
    files: list[Path] = field(default_factory=list)
    inert: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def read(self, path: Path) -> dict[str, Any]:
        file = read_torch_file(path, _ALLOWED)
        self.files.append(path)
        self.inert.update(file.inert)
        if not isinstance(file.content, dict):
            raise ValueError(f"{path} holds a {type(file.content).__name__}, not what DeepSpeed writes")
        return file.content


def find_deepspeed(path: Path) -> Path | None:
    """The tag's folder in a folder that DeepSpeed wrote to, or this one itself; None: it is no such folder."""
    if (path / LATEST).is_file():
        tag = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag or not (path / tag).is_dir():
            raise ValueError(
                f"{path / LATEST} names {tag[:80]!r}, which is no folder beside it; give that folder itself"
            )
        return path / tag
    return path if any(path.glob("*_model_states.pt")) else None


def open_deepspeed(folder: Path) -> DeepSpeedFolder:
    """Raises ValueError that names the folder or file: incomplete, damaged, or cut over tensor-parallel ranks."""
    found = DeepSpeedFolder()
    try:
        _open(found, _sort(folder), folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        last = found.files[-1] if found.files else folder
        raise ValueError(f"{last} is damaged, or of a DeepSpeed that writes other files: {error!r}") from None
    return found


@dataclass
class _Files:
    model: dict[int, list[Path]] = field(default_factory=dict)  # of each mp rank, by data-parallel rank
    optimizer: dict[int, list[Path]] = field(default_factory=dict)
    layers: list[Path] = field(default_factory=list)


def _sort(folder: Path) -> _Files:
    files, numbered = _Files(), []
    for path in folder.glob("*_states.pt"):
        if match := _LAYER.fullmatch(path.name):
            files.layers.append(path)
            if int(match["tp"] or 0):
                _refuse_tensor_parallel(folder)
        elif match := _MODEL.fullmatch(path.name) or _OPTIMIZER.fullmatch(path.name):
            numbered.append((int(match["mp"]), int(match["dp"] or 0), path))
        else:
            raise ValueError(f"{path} is of a kind that is not known here (experts, or another DeepSpeed)")
    for mp, dp, path in sorted(numbered):
        kind = files.optimizer if _OPTIMIZER.fullmatch(path.name) else files.model
        kind.setdefault(mp, []).append(path)
        if len(kind[mp]) != dp + 1:
            raise ValueError(f"{folder} is incomplete: a rank before {path.name} is missing, or given twice")
    files.layers.sort(key=lambda path: int(_LAYER.fullmatch(path.name)["layer"]))  # type: ignore[index]
    if sorted(files.model) != list(range(len(files.model))) or not files.model:
        raise ValueError(f"{folder} is incomplete: it lacks mp_rank_*_model_states.pt of a rank")
    if len(files.model) > 1 and not files.layers:
        _refuse_tensor_parallel(folder)
    if files.optimizer and files.optimizer.keys() != files.model.keys():
        raise ValueError(f"{folder} is incomplete: it lacks *_optim_states.pt of a rank")
    return files


def _refuse_tensor_parallel(folder: Path) -> None:
    raise ValueError(
        f"{folder} is cut over tensor-parallel ranks, and its files do not say how. Merge it in the program that wrote "
        "it (load it there, gather the weights, torch.save the whole state dict) and convert that file; checkpoints of "
        "`m2 train` are whole for every layout"
    )


def _open(found: DeepSpeedFolder, files: _Files, folder: Path) -> None:
    for path in files.layers:
        found.named.add(_tensors(found.read(path)), str(path))
    ranks = stage = 0
    for mp, paths in files.model.items():
        models = [found.read(path) for path in paths]
        optimizers = [found.read(path)["optimizer_state_dict"] for path in files.optimizer.get(mp, [])]
        dimensions = models[0].get("checkpoint_parallel_dimensions") or {}
        if dimensions.get("tp_degree", 1) != 1:
            _refuse_tensor_parallel(folder)
        ranks, where = len(optimizers), str(paths[0])
        if models[0].get("mp_world_size", len(files.model)) != len(files.model):
            raise ValueError(
                f"{folder} is incomplete: files of {len(files.model)} of {models[0]['mp_world_size']} stages"
            )
        if models[0].get("shared_params"):
            raise ValueError(f"{where} has weights that share memory ({list(models[0]['shared_params'])[:3]})")
        if optimizers:
            _check_partitions(optimizers, folder)
        if optimizers and "fp32_flat_groups" in optimizers[0]:
            stage = 3
            found.named.add(_stage_3(models, optimizers, where), where)
            continue
        if isinstance(models[0].get("module"), dict):
            found.named.add(_tensors(models[0]["module"]), where)
        if optimizers:
            stage = int(_argument(optimizers[0].get("zero_stage", 1)))
            found.named.add(_stage_1_and_2(models[0], optimizers, where), where, replace=True)
        elif len(paths) > 1:
            raise ValueError(f"{folder} is of ZeRO 3, whose weights lie in *_optim_states.pt; these are not there")
    if not ranks:
        found.notes.append("no *_optim_states.pt: weights are the ones that the forward used, in its precision")
    pipeline = f", pipeline of {len(files.model)} stages" if files.layers else ""
    found.layout = (f"ZeRO {stage}, {ranks} data-parallel rank(s)" if ranks else "no ZeRO partitions") + pipeline


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    return ((str(name), tensor) for name, tensor in state.items() if isinstance(tensor, Stored))


def _argument(value: Any) -> Any:
    """Of an enumeration's object, the number that it stands for."""
    return value.arguments[0] if hasattr(value, "arguments") else value


def _check_partitions(optimizers: list[dict[str, Any]], folder: Path) -> None:
    count = optimizers[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(optimizers):
        raise ValueError(
            f"{folder} holds *_optim_states.pt of {len(optimizers)} data-parallel ranks, and was written by {count}"
        )


def _joined(parts: list[Stored]) -> Stored:
    """Flat tensors one after another."""
    stretches = tuple(stretch for part in parts for stretch in part.stretches)
    if len({(part.dtype, part.swapped) for part in parts}) != 1 or any(part.strides is not None for part in parts):
        raise TypeError("partitions of several types")
    return Stored(parts[0].dtype, (sum(part.numel for part in parts),), stretches, swapped=parts[0].swapped)


def _stage_1_and_2(model: dict[str, Any], optimizers: list[dict[str, Any]], where: str) -> Iterator[tuple[str, Stored]]:
    """Of each group the ranks' partitions in a row are its weights in a row, some with filling behind them."""
    fillings = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(model["param_shapes"]):
        flat = _joined([rank["single_partition_of_fp32_groups"][number] for rank in optimizers])
        filling = fillings[number] if fillings else [0] * len(shapes)
        start = 0
        for (name, shape), filled in zip(shapes.items(), filling, strict=True):
            yield name, flat.part(start, tuple(shape))
            start += math.prod(shape) + filled
        aligned = 2 * len(optimizers)  # what DeepSpeed fills the end of a group up to
        if -(-start // aligned) != -(-flat.numel // aligned):
            raise ValueError(f"{where}: group {number} has {flat.numel} numbers for weights of {start}")


def _stage_3(
    models: list[dict[str, Any]], optimizers: list[dict[str, Any]], where: str
) -> Iterator[tuple[str, Stored]]:
    """Every weight is cut over the ranks by itself; a rank's groups in a row are its parts in a row."""
    flats = [_joined(rank["fp32_flat_groups"]) for rank in optimizers]
    start = 0
    for shapes in models[0]["param_shapes"]:
        for name, shape in shapes.items():
            each = -(-math.prod(shape) // len(flats))
            yield name, _joined([flat.part(start, (each,)) for flat in flats]).part(0, tuple(shape))
            start += each
    if start != flats[0].numel:
        raise ValueError(f"{where}: a rank has {flats[0].numel} numbers for weights of {start}")
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [rank["frozen_param_fragments"][name] for rank in models]
        yield name, _joined(fragments).part(0, tuple(shape))
