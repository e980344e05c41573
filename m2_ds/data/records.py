"""What a data set is made of: records, their Parquet columns, and the manifest that describes a folder of shards."""

from dataclasses import dataclass, field

import pyarrow as pa
from pydantic import Field

from m2_ds.schema import Settings

SCHEMA_VERSION = 2  # version 1 held its list of shards in manifest.json; it is read as well
_CAPTION = pa.struct(
    [("text", pa.string()), ("language", pa.string()), ("weight", pa.float32()), ("kind", pa.string())]
)
_NEGATIVE = pa.struct([("text", pa.string()), ("language", pa.string()), ("kind", pa.string())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(_CAPTION)),
        ("hard_negatives", pa.list_(_NEGATIVE)),
        ("group", pa.string()),
        ("category", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Caption:
    """One text that describes a picture. `weight` is its share when one caption of a language is drawn."""

    text: str
    language: str
    weight: float = 1.0
    kind: str = "caption"


@dataclass(frozen=True, slots=True)
class HardNegative:
    """One text that is certainly wrong for a picture although it is close to a right one; `kind` says what differs."""

    text: str
    language: str
    kind: str


@dataclass(slots=True)
class Record:
    """One picture with its captions. Pictures of equal `group` show the same thing: their captions fit each other."""

    key: str
    image: bytes
    captions: list[Caption]
    group: str
    source: str
    license: str
    width: int
    height: int
    hard_negatives: list[HardNegative] = field(default_factory=list)
    category: str | None = None


class ShardInfo(Settings):
    """One Parquet file of a split."""

    file: str = Field(description="path below the data set's folder")
    rows: int
    row_groups: list[int] = Field(description="rows of each row group, in file order")
    bytes: int = Field(description="size of the file, bytes")
    sha256: str
    footer: int = Field(0, description="bytes of the file's footer, its length and magic included; 0: not known")


class Count(Settings):
    """How much of a split comes from one source in one language."""

    source: str
    language: str
    pairs: int = Field(description="rows of the source with a caption in the language")
    captions: int


class IndexInfo(Settings):
    """The table of a split's shards, a Parquet file beside manifest.json (m2_ds.data.index)."""

    file: str
    shards: int
    row_groups: int
    bytes: int
    sha256: str


class _SplitFacts(Settings):
    rows: int
    languages: dict[str, int] = Field(description="captions by language")
    sources: dict[str, int] = Field(description="rows by source")


class SplitInfo(_SplitFacts):
    """One split: where its shards are listed, and what is in them."""

    counts: list[Count] = Field(description="pairs and captions by source and language together")
    index: IndexInfo


class Manifest(Settings):
    """The content of manifest.json."""

    schema_version: int
    name: str
    splits: dict[str, SplitInfo]


class SplitInfo1(_SplitFacts):
    """A split of schema version 1, with its list of shards."""

    shards: list[ShardInfo]


class Manifest1(Settings):
    """The content of manifest.json in schema version 1."""

    schema_version: int
    name: str
    splits: dict[str, SplitInfo1]
