"""What a conversion found and does: for people (rich) and as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from m2_ds.convert.fit import Entry
    from m2_ds.convert.source import Source

_SHOWN = 12  # names of a list on the screen; the JSON has all


@dataclass
class Report:
    """The key report. Bytes are those of the tensors, ``files`` what is written: (name, bytes, tensors)."""

    source: str
    kind: str
    layout: str
    config_file: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    inert: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    resized: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    target: str = ""
    out: str = ""
    written_dtypes: dict[str, int] = field(default_factory=dict)
    files: list[tuple[str, int, int]] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: "Source") -> "Report":
        """Of what a source holds."""
        found = list(source.named.tensors.values())
        dtypes: dict[str, dict[str, int]] = {}
        for tensor in found:
            row = dtypes.setdefault(
                str(tensor.dtype).removeprefix("torch."), {"tensors": 0, "parameters": 0, "bytes": 0}
            )
            row["tensors"] += 1
            row["parameters"] += tensor.numel
            row["bytes"] += tensor.nbytes
        return cls(
            source=str(source.path),
            kind=source.kind,
            layout=source.layout,
            config_file=str(source.config_file),
            tensors=len(found),
            parameters=sum(tensor.numel for tensor in found),
            bytes=sum(tensor.nbytes for tensor in found),
            dtypes=dtypes,
            prefixes=source.named.prefixes,
            dropped=source.named.dropped,
            other=list(source.other),
            inert=list(source.inert),
            notes=list(source.notes),
        )

    def plan(self, target: str, out: Path, entries: Sequence["Entry"]) -> None:
        """What will be written."""
        self.target, self.out = target, str(out)
        self.written_dtypes = dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in entries))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, console: Console) -> None:
        """As a table of what was found, then one of the files."""
        console.print(_facts(self._rows()))
        if self.files:
            table = Table(title=Text(f"{self.target} -> {self.out}"), title_justify="left", box=None, pad_edge=False)
            table.add_column("file", overflow="fold")
            table.add_column("tensors", justify="right")
            table.add_column("size", justify="right")
            for name, size, tensors in self.files:
                table.add_row(Text(name), str(tensors or ""), decimal(size))
            table.add_row("", "", decimal(sum(size for _, size, _ in self.files)))
            console.print(table)

    def _rows(self) -> Iterable[tuple[str, str]]:
        yield "source", f"{self.source}  ({self.kind}: {self.layout})"
        yield "network", self.config_file
        yield "tensors", f"{self.tensors:,}, {self.parameters:,} numbers, {decimal(self.bytes)}"
        for name, row in self.dtypes.items():
            yield f"  {name}", f"{row['tensors']:,} tensors, {decimal(row['bytes'])}"
        for title, names in (
            ("prefix stripped", [f"{prefix} ({count})" for prefix, count in self.prefixes.items()]),
            ("not of this network", self.dropped),
            ("left out", self.other),
            ("inert objects", self.inert),
            ("note", self.notes),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong", self.wrong),
        ):
            if names:
                yield title, some(names)
        for name, (old, new) in self.resized.items():
            yield "resized", f"{name} {old} -> {new}"
        if self.written_dtypes:
            yield "written as", ", ".join(f"{name} ({count})" for name, count in self.written_dtypes.items())


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, text in rows:
        table.add_row(title, Text(text))  # names may hold what is markup to rich
    return table


def some(names: Sequence[str], limit: int = _SHOWN) -> str:
    """The first names of a list, and how many more there are; "none" of an empty one."""
    more = f", ... {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "none"
