"""``m2 convert``: any checkpoint of this network to the canonical folder, or to a file as the release has it."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from m2_ds.convert.canonical import CONFIG, INDEX, config_fields, cut_files, file_names, index_fields
from m2_ds.convert.fit import Entry, changed, fit
from m2_ds.convert.formats import Writer, in_file_order, safetensors_header, write_safetensors, write_torch_zip
from m2_ds.convert.output import Output, refuse_existing
from m2_ds.convert.progress import bytes_written
from m2_ds.convert.release import Layout, release_config, wrapped
from m2_ds.convert.report import Report
from m2_ds.convert.run_folder import CHECKSUMS
from m2_ds.convert.source import Source, open_source
from m2_ds.files import write_json
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.weights import MASKED_HEADS

Dtype = Literal["keep", "float32", "float16", "bfloat16"]
_UNITS = {"": 1}
_UNITS |= {f"{p}B": 1000**power for power, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**power for power, p in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class WeightFile:
    """A large file: the tensors in it, about how many bytes they come to, and how it is written."""

    name: str
    entries: Sequence[Entry]
    size: int
    write: Writer


@dataclass(frozen=True)
class Target:
    """What is written. ``words`` say what it is."""

    words: str
    weights: list[WeightFile]
    small: dict[str, bytes]


def convert(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    *,
    to: Literal["canonical", "release"] = "canonical",
    layout: Layout = "lightning",
    dtype: Dtype = "keep",
    image_size: int | None = None,
    patch_size: int | None = None,
    config: Path | None = None,
    shard_size: str = "4GB",
    allow: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    report: Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint to the folder OUT: docs/checkpoints.md.

    Tensors are read and written in pieces, so that memory stays small for any model. OUT appears as a whole; the same
    command goes on after a kill. No code in SOURCE is run. The optimizer's state is not converted.

    Args:
        source: released .ckpt, canonical folder, run folder, checkpoint, or a folder of DeepSpeed's save_checkpoint.
        out: folder that does not exist yet.
        to: canonical (safetensors; what everything here reads), or release (a .ckpt that the release's code loads).
        layout: of the release's .ckpt.
        dtype: of the written weights; keep: each as it is.
        image_size: side of the pictures, pixels; position tables are resized for it.
        patch_size: side of a patch, pixels; the patch kernel is resampled, position tables are resized.
        config: the network's JSON (config.json or the release's Encoder_*.json); by default the one beside the weights.
        shard_size: largest safetensors file, e.g. 500MB or 4GiB.
        allow: class, as module.Class, whose objects may lie in a .ckpt beside its tensors and are left out. Repeat it.
        report: write what was found and done to this JSON file, also where it is refused.
        dry_run: show what would be done, and write nothing but the report.
        overwrite: replace an earlier conversion at OUT once the new one is whole.
    """
    limit = parse_size(shard_size)
    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"--report {report}: there is no folder {report.parent}")
    found = open_source(source, config, allow)
    refuse_existing(out, overwrite, (found.path, *found.files))
    told = Report.of(found)
    try:
        network = changed(found.config, image_size, patch_size)
        cast = None if dtype == "keep" else getattr(torch, dtype)
        tensors = found.named.tensors
        if to == "release" and network != network.without_masked_heads():
            network = network.without_masked_heads()
            tensors = {name: stored for name, stored in tensors.items() if not name.startswith(MASKED_HEADS)}
            left = len(found.named.tensors) - len(tensors)
            told.notes.append(f"{left} tensors of masked objectives' heads are left out: the release has none")
        entries = fit(tensors, network, told, cast, resample=patch_size is not None)
        target = _release(entries, network, out, layout) if to == "release" else _canonical(entries, network, limit)
        target.small.update((path.name, path.read_bytes()) for path in found.tokenizer)
        told.plan(target.words, out, entries)
        told.files = [(file.name, file.size, len(file.entries)) for file in target.weights]
        told.files += [(name, len(content), 0) for name, content in target.small.items()]
    finally:
        told.show(Console(width=None if sys.stdout.isatty() else 160))
        if report is not None:
            write_json(report, told.as_json())
    if dry_run:
        print("nothing was written: --dry-run")
        return
    told.checksums = _write(found, target, out, overwrite)
    if report is not None:
        write_json(report, told.as_json())
    print(f"{out}: whole, checksums in {CHECKSUMS}")


def _canonical(entries: Sequence[Entry], config: M2EncoderConfig, limit: int) -> Target:
    by_name = {entry.name: entry for entry in entries}
    parts = cut_files({entry.name: entry.nbytes for entry in entries}, limit)
    names = file_names(len(parts))
    weights = []
    for name, part in zip(names, parts):
        members = in_file_order(by_name[each] for each in part)
        size = len(safetensors_header(members)) + sum(entry.nbytes for entry in members)
        weights.append(WeightFile(name, members, size, partial(write_safetensors, entries=members)))
    small = {CONFIG: _json(config_fields(config))}
    if len(parts) > 1:
        weight_map = {each: name for name, part in zip(names, parts) for each in part}
        total = sum(entry.nbytes for entry in entries)
        small[INDEX] = _json(index_fields(weight_map, total))
    return Target("canonical folder", weights, small)


def _release(entries: Sequence[Entry], config: M2EncoderConfig, out: Path, layout: Layout) -> Target:
    if out.suffix:
        raise ValueError(f"OUT is the folder that {out.stem}.ckpt and its JSON are written to: leave {out.suffix} out")
    name = out.resolve().name
    content = wrapped(layout, {entry.name: entry for entry in entries})
    size = sum(entry.nbytes for entry in entries)
    file = WeightFile(f"{name}.ckpt", entries, size, partial(write_torch_zip, content=content, root=name))
    return Target(f"release, {layout}", [file], {f"{name}.json": _json(release_config(config))})


def _write(source: Source, target: Target, out: Path, overwrite: bool) -> dict[str, str]:
    total = sum(file.size for file in target.weights)
    with (
        bytes_written(f"writing {out}", total) as tell,
        Output(out, _fingerprint(source, target), overwrite, tell) as output,
    ):
        if output.finished:
            print(f"going on: {len(output.finished)} of {len(target.weights)} files are finished", file=sys.stderr)
        output.reserve(total)
        for file in target.weights:
            output.weights(file.name, file.write)
        for name, content in target.small.items():
            output.put(name, content)
        return output.publish()


def _fingerprint(source: Source, target: Target) -> str:
    """Of the files read, as they are now, and of everything that is written."""
    read = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in source.files]
    weights = [(file.name, [(e.name, str(e.dtype), e.shape) for e in file.entries]) for file in target.weights]
    small = {name: hashlib.sha256(content).hexdigest() for name, content in target.small.items()}
    return hashlib.sha256(json.dumps([1, read, target.words, weights, small]).encode()).hexdigest()


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def parse_size(text: str) -> int:
    """Bytes: "4GB" is 4,000,000,000, "4GiB" is 4,294,967,296."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?B|)", text.strip().upper())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"--shard-size {text!r} is no size; write 500MB, 4GB or 4GiB")
    return size
