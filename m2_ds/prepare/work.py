"""The folder in which a preparation works: files of every step, whole or absent, so that a killed run goes on.

    OUT/.prepare/run.json            settings; a preparation with others is refused
    OUT/.prepare/units.jsonl         input files with sizes and times, and units of work
    OUT/.prepare/STEP/NUMBER.*       what a step made of a unit; NUMBER.json comes last and says that it is finished

On a cluster every machine must see the folder.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2_ds.data.records import SCHEMA
from m2_ds.files import publish, write_atomically
from m2_ds.prepare.config import PrepareConfig

FOLDER, RUN, UNITS = ".prepare", "run.json", "units.jsonl"
COUNTS = "counts.json"  # in the output folder: it is a preparation's own
_PLAIN = ("image", "sha256", "colours")


@dataclass(frozen=True)
class Unit:
    """One piece of the input that one task works through."""

    number: int
    input: int  # of config.inputs
    file: str
    prefix: str  # of the records' keys
    start: int = 0  # JSONL, CSV: byte; Parquet: row group
    stop: int = -1  # exclusive; -1: to the end
    first: int = 0  # records of the file before this unit


@dataclass(frozen=True)
class Job:
    """What a task knows besides its own item."""

    folder: Path
    run: str  # stands for settings and input, so that workers know whether what they hold is of this run
    units: int
    config: PrepareConfig = field(compare=False)
    home: Path = field(compare=False)  # where users' functions lie

    def samples_of(self, number: int) -> int:
        """How many records of a rule a unit keeps for the card: of many units, a thousand keep one each."""
        most = self.config.output.samples
        if self.units <= 1000:
            return most
        return min(1, most) if number % (self.units // 1000) == 0 else 0

    def path(self, step: str, number: int, suffix: str) -> Path:
        return self.folder / step / f"{number:06d}.{suffix}"

    def finished(self, step: str, number: int) -> dict[str, Any] | None:
        """What the step said when it finished the unit; None: it has not."""
        path = self.path(step, number, "json")
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, step: str, number: int, content: dict[str, Any]) -> None:
        """The unit's last file. Everything else that the step made of it is on disk already."""
        path = self.path(step, number, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())


class TableFile:
    """A Parquet file written batch by batch, there under its name when it is whole. Use as a context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.schema = path, schema
        # The process's number: after a lost connection a cluster may run one task twice.
        self.aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        compression = {name: "none" if name in _PLAIN else "zstd" for name in schema.names}
        self.writer = pq.ParquetWriter(self.aside, schema, compression=compression, write_page_checksum=True)

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            self.writer.write_table(table, row_group_size=table.num_rows)

    def __enter__(self) -> "TableFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.writer.close()
        if kind is None:
            publish(self.aside, self.path)
        else:
            self.aside.unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table) -> None:
    with TableFile(path, table.schema) as file:
        file.write(table)


def open_table(path: Path) -> pq.ParquetFile:
    """A file of this folder. Raises ValueError that names it when it can't be read."""
    try:
        # A buffer: without it a row group's pictures would be read in one piece.
        return pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} can't be read ({error}); start again with --restart") from error


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    return open_table(path).read(columns=columns, use_threads=False)


def begin(config: PrepareConfig, settings: dict[str, Any], *, restart: bool) -> Path:
    """The work folder, new or going on.

    Raises:
        ValueError: it belongs to a preparation with other settings, or the output folder holds another data set.
    """
    folder = config.out / FOLDER
    if restart:
        clear(config.out)
    path = folder / RUN
    planned = (folder / UNITS).exists()  # before that nothing was done, and settings may still be corrected
    if planned:
        refuse_changes(config, differences(json.loads(path.read_text()), settings))
    elif (config.out / "manifest.json").exists() or (config.out / "mixture.yaml").exists():
        remedy = ", or replace it with --restart" if (config.out / COUNTS).exists() else ""
        raise ValueError(f"{config.out} holds a data set already; choose another `out`{remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    if not planned:
        write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return folder


def refuse_changes(config: PrepareConfig, changed: list[str]) -> None:
    """ValueError that names what is not as it was when the preparation began, if anything is."""
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{config.out} was begun with other settings or input files ({'; '.join(changed[:5])}{more}). Put them "
            "back to go on, choose another `out`, or begin anew with --restart, which takes away what is there"
        )


def clear(out: Path) -> None:
    """Take a preparation away, finished or not; nothing that it did not write."""
    names = ["manifest.json", "mixture.yaml", "card.html", COUNTS, "timing.json"]
    run = out / FOLDER / RUN
    splits = ["train"]
    if run.exists():
        splits += list(json.loads(run.read_text())["output"]["splits"])
    elif not (out / COUNTS).exists():
        return  # nothing of ours
    for name in names:
        (out / name).unlink(missing_ok=True)
    for name in splits:
        (out / f"manifest.{name}.parquet").unlink(missing_ok=True)
    for name in [*splits, "dropped", "sets", FOLDER]:
        shutil.rmtree(out / name, ignore_errors=True)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and name:
        return [line for n, pair in enumerate(zip(before, now)) for line in differences(*pair, f"{name}.{n}")]
    if before == now:
        return []
    return [f"{name}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# The columns of a record in a table of candidates.
RECORD_COLUMNS = list(SCHEMA.names)
