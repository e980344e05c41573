"""What a preparation reads, which rules it applies and what it writes, as one typed tree from a YAML file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from m2_ds.data.decode import MAX_PIXELS
from m2_ds.schema import Settings, load_settings

Kind = Literal["tar", "img2dataset", "parquet", "jsonl", "csv", "shards"]
# Rules that the program itself counts under; a user's own must not be mixed up with them.
RULES = (
    *("bad_line", "bad_fields", "not_downloaded", "not_fetched"),
    *("no_caption", "short_caption", "long_caption", "no_letters", "repetition", "boilerplate", "language"),
    *("missing_picture", "empty_picture", "too_many_bytes", "broken_picture", "too_many_pixels"),
    *("format", "animated", "aspect_ratio", "too_small", "single_colour"),
    *("evaluation_picture", "evaluation_near_picture", "evaluation_caption"),
    *("duplicate_key", "duplicate_picture", "near_duplicate_picture", "repeated_caption"),
    *("low_similarity", "not_rewritten", "balance"),
)


class FieldNames(Settings):
    """Which field (column, JSON member) of the input holds what; of a list, the first that has a value."""

    captions: list[str] = Field(
        ["captions", "caption", "text", "TEXT"],
        description="a text, a list of texts, or a mapping from language to either",
    )
    image: list[str] = Field(
        ["image", "jpg", "png", "webp", "jpeg"], description="picture: bytes, or a path below `images`"
    )
    url: str = Field("url", description="address of the picture, used where there is no picture and `fetch` is set")
    key: str = Field("key", description="the record's name; without one it is made of the file's name and the row")
    language: str = Field("language", description="language of the captions; without one it is identified")
    group: str = Field("group", description="records of one group show the same thing; without one, the key")
    category: str = "category"
    source: str = Field("source", description="overrides the input's name")
    license: str = "license"


class InputConfig(Settings):
    """Files of one kind and origin. Inputs that come first win over later ones where records are duplicates."""

    name: str = Field(min_length=1, description="the source that records are counted under")
    kind: Kind = Field(
        description="tar: webdataset; img2dataset: its tars, Parquet files or folders with their sidecars; parquet, "
        "jsonl, csv: pictures as bytes (Parquet), paths or URLs; shards: a data set of this project"
    )
    files: list[str] = Field(
        min_length=1,
        description="paths or URLs (any that fsspec opens) with {0000..0099}, * and ?; shards: the data set's folder",
    )
    images: Path | None = Field(None, description="folder that pictures' paths start from; None: the file's own folder")
    split: str = Field("train", description="shards: split that is read")
    delimiter: str = Field(",", min_length=1, max_length=1, description="csv: between fields")
    license: str = Field("unknown", description="of records that do not say theirs")
    language: str | None = Field(None, description="of captions that do not say theirs; None: identified")
    fields: FieldNames = FieldNames()

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _one_word(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{name!r} begins the records' keys; use letters, digits, '_', '-' and '.'")
        return name


class LengthConfig(Settings):
    """How long captions of one language may be, in characters without white space; a Chinese character is one."""

    min_characters: int = Field(5, ge=0)
    max_characters: int = Field(1000, ge=1)


class TextConfig(Settings):
    """Cleaning of captions and the rules that they have to pass."""

    languages: list[str] = Field(["zh", "en"], description="languages that are kept (ISO 639-1); []: all")
    length: LengthConfig = Field(
        LengthConfig(), description="the paper's rule: captions under 5 characters are left out (arXiv 2401.15896)"
    )
    lengths: dict[str, LengthConfig] = Field(default_factory=dict, description="instead of `length`, by language")
    max_run: int = Field(
        8,
        ge=0,
        description="a character more often than this in a row: repetition; 0: no such rule (digits are exempt)",
    )
    min_distinct: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of distinct words, or Chinese characters, in a caption of 8 or more: below, repetition",
    )
    boilerplate: list[str] = Field(
        [
            r"(img|dsc|dscn|dscf|pict?|image|photo|screenshot|微信图片|图片|照片)?[\W_]*\d[\d\W_]*(\.\w{3,4})?",
            r"[\w-]+\.(jpe?g|png|gif|webp|bmp|tiff?)",
            r"(click|tap) (here )?(to|for) .{0,40}",
            r"(image|photo|picture|no image|图片|暂无图片)( (not|un)\s?available| 加载中)?",
            r"点击.{0,6}(查看|放大|下载|进入).{0,12}",
            r"https?://\S+",
        ],
        description="regular expressions; a caption that one matches as a whole, in any case, is left out",
    )
    strip_html: bool = Field(True, description="resolve entities (&amp;) and take tags (<b>) away")
    foreign_confidence: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Latin script counts as English unless py3langid is at least this sure of another language; "
        "with letters such as é or ß, half of it is enough",
    )

    @field_validator("boilerplate")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class PictureConfig(Settings):
    """Rules for pictures. Sizes are read from the header; what fails there is never decoded."""

    formats: list[str] = Field(["JPEG", "PNG", "WEBP", "GIF", "BMP"], description="Pillow's names of accepted formats")
    animated: bool = Field(False, description="keep animations (their first frame is what training sees)")
    max_aspect_ratio: float = Field(3.0, ge=1, description="longer over shorter side (arXiv 2401.15896: 3)")
    min_side: int = Field(32, ge=1, description="shorter side, pixels")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="width x height; decompression bombs end here")
    max_bytes: int = Field(32 << 20, ge=1, description="of the encoded picture")
    single_colour: int = Field(
        4, ge=-1, le=255, description="largest difference within every channel of a single-coloured picture; -1: off"
    )
    resize_to: int | None = Field(
        None, ge=16, description="pictures of a longer shorter side are encoded anew (JPEG) with this one, pixels"
    )
    resize_quality: int = Field(92, ge=1, le=100, description="of the JPEG that resize_to makes")


class ColumnRule(Settings):
    """A number that the input already has for each record, with bounds: NSFW, watermark or aesthetic scores."""

    field: str = Field(description="column or JSON member")
    rule: str = Field(description="what records outside the bounds are counted under")
    min: float | None = None
    max: float | None = None
    missing: Literal["keep", "drop"] = Field("drop", description="records without this number")


class FetchConfig(Settings):
    """Download of pictures that are given by URL only."""

    protocols: list[str] = Field(["http", "https"], description="others are refused; s3, gs ... are opened by fsspec")
    seconds: float = Field(20.0, gt=0, description="time limit of one attempt")
    retries: int = Field(2, ge=0)
    threads: int = Field(16, ge=1, description="downloads at a time, each worker")
    user_agent: str = "m2_ds"


class DuplicateConfig(Settings):
    """Which records repeat others. Of duplicates one remains: see `representative`."""

    exact: bool = Field(True, description="pictures of equal bytes (SHA-256)")
    near_distance: int | None = Field(
        4, ge=0, le=7, description="perceptual hashes of 64 bits that differ in at most this many; None: not compared"
    )
    near_colour: int = Field(
        16, ge=0, le=255, description="and whose mean colours in 8 x 8 fields differ by at most this in every channel"
    )
    representative: Literal["first", "largest"] = Field(
        "first", description="of duplicates, the first of the input, or the one of most pixels, then the first"
    )
    caption_repeats: int | None = Field(
        None, ge=1, description="equal or similar captions (MinHash) beyond this many are left out; None: all stay"
    )
    caption_similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of character trigrams; 1: equal")


class EvaluationSets(Settings):
    """Pictures and captions that must not be trained on."""

    paths: list[Path] = Field(default_factory=list, description="data sets of this project, or folders of pictures")
    near_distance: int | None = Field(4, ge=0, le=7, description="as in duplicates; None: equal bytes only")
    near_colour: int = Field(16, ge=0, le=255)
    captions: bool = Field(False, description="leave out captions that equal one of the sets', letter for letter")


class SimilarityConfig(Settings):
    """Cosine similarity of picture and caption by a CLIP-like model."""

    model: str = Field(description="run folder, checkpoint or release file; hugging_face: folder or name")
    kind: Literal["m2", "hugging_face"] = "m2"
    min: float = Field(ge=-1, le=1, description="captions below it are treated as `below` says")
    below: Literal["drop", "mark", "rewrite"] = Field(
        "drop", description="mark: keep with kind `weak`; rewrite: hand the record to `rewrite`"
    )
    batch_size: int = Field(64, ge=1)
    device: str = Field("cpu", description="cuda: every worker takes a GPU")


class ScoreConfig(Settings):
    """A user's function that gives each record of a batch a number, with bounds."""

    function: str = Field(description="module:name or file.py:name; a class is made once a worker, then called")
    rule: str
    min: float | None = None
    max: float | None = None
    batch_size: int = Field(64, ge=1)


class RewriteConfig(Settings):
    """A user's function that writes captions for a batch of records: recaptioning, or translation."""

    function: str = Field(description="module:name or file.py:name; records -> a list of captions, or None, each")
    when: Literal["low_similarity", "missing_language", "all"] = "low_similarity"
    kind: str = Field("rewritten", description="kind of the new captions")
    original_kind: str = Field("original", description="kind that replaced captions keep on under")
    batch_size: int = Field(32, ge=1)


class BalanceConfig(Settings):
    """Target shares. Records are left out by the hash of their key until the shares hold exactly."""

    sources: dict[str, float] = Field(default_factory=dict, description="shares of records by source; {}: as they are")
    languages: dict[str, float] = Field(
        default_factory=dict, description="shares by languages of a record's captions: en, zh, en+zh; {}: as they are"
    )
    how: Literal["drop", "weights"] = Field(
        "drop", description="weights: nothing is left out; shares go to mixture.yaml, one data set a source"
    )
    max_records: int | None = Field(None, ge=1, description="at most this many records in all")

    @field_validator("sources", "languages")
    @classmethod
    def _shares(cls, shares: dict[str, float]) -> dict[str, float]:
        if wrong := {name: share for name, share in shares.items() if share < 0}:
            raise ValueError(f"shares must not be negative, got {wrong}")
        if shares and sum(shares.values()) <= 0:
            raise ValueError("all shares are 0: nothing would remain")
        return shares


class OutputConfig(Settings):
    """Shards that are written."""

    shard_mb: int = Field(256, ge=1, description="a shard ends at about this size, MB")
    group_rows: int = Field(256, ge=1, description="largest row group, the unit of random reading, in records")
    group_mb: float = Field(4.0, gt=0, description="and in MB")
    splits: dict[str, float] = Field(
        default_factory=dict, description="shares of groups, by hash, that go to other splits than train: {val: 0.01}"
    )
    samples: int = Field(12, ge=0, description="pictures shown in the card for each rule")

    @field_validator("splits")
    @classmethod
    def _part(cls, splits: dict[str, float]) -> dict[str, float]:
        if any(share <= 0 for share in splits.values()) or sum(splits.values()) >= 1 or "train" in splits:
            raise ValueError(f"shares of splits besides train are above 0 and below 1 in all, got {splits}")
        return splits


class WorkConfig(Settings):
    """How the work is carried out. Nothing here changes the result."""

    workers: int | None = Field(None, ge=0, description="processes; None: one a core; 0: this process, without Ray")
    address: str | None = Field(None, description="of a Ray cluster, or auto; None: Ray is started on this machine")
    retries: int = Field(2, ge=0, description="a shard whose reading fails (not: whose content is damaged)")
    progress: bool = True


class PrepareConfig(Settings):
    """One preparation, from raw files to a data set."""

    out: Path = Field(description="folder of the data set; on a cluster every machine must see it")
    name: str | None = Field(None, description="the data set's name; None: the folder's")
    inputs: list[InputConfig] = Field(min_length=1)
    unit_records: int = Field(10_000, ge=1, description="records of a JSONL, CSV or Parquet file in one unit of work")
    exchange_rows: int = Field(
        500_000, ge=1, description="rows in a worker's memory where records are compared; about 300 bytes each"
    )
    skip_broken_shards: bool = Field(
        False, description="go on without files that are missing or can't be opened; they are named in the card"
    )
    columns: list[ColumnRule] = Field(default_factory=list)
    fetch: FetchConfig | None = Field(None, description="None: nothing is downloaded")
    text: TextConfig = TextConfig()
    picture: PictureConfig = PictureConfig()
    evaluation_sets: EvaluationSets = EvaluationSets()
    duplicates: DuplicateConfig = DuplicateConfig()
    similarity: SimilarityConfig | None = None
    scores: list[ScoreConfig] = Field(default_factory=list)
    rewrite: RewriteConfig | None = None
    balance: BalanceConfig = BalanceConfig()
    output: OutputConfig = OutputConfig()
    work: WorkConfig = WorkConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [entry.name for entry in self.inputs]
        if len(set(names)) < len(names):
            raise ValueError(f"inputs: names must differ, got {names}")
        bounded: list[ColumnRule | ScoreConfig] = [*self.columns, *self.scores]
        own = [block.rule for block in bounded]
        if wrong := sorted({rule for rule in own if rule in RULES or own.count(rule) > 1 or not rule}):
            raise ValueError(f"rules {wrong} are used twice, or are the program's own; choose other names")
        for block in bounded:
            if block.min is None and block.max is None:
                raise ValueError(f"rule {block.rule!r} has neither min nor max; give it a bound")
        rewrites = self.similarity is not None and self.similarity.below == "rewrite"
        if rewrites and self.rewrite is None:
            raise ValueError("similarity.below is rewrite: give a `rewrite` block with the function that does it")
        if self.rewrite is not None and self.rewrite.when == "low_similarity" and not rewrites:
            raise ValueError("rewrite.when is low_similarity: it needs similarity.below: rewrite")
        if self.balance.how == "weights" and set(self.balance.sources) != set(names):
            raise ValueError(f"balance.how is weights: balance.sources must name the inputs {names}, each once")
        return self

    def decides(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON."""
        return self.model_dump(mode="json", exclude={"out", "work", "skip_broken_shards"})


def load_config(path: Path, overrides: Sequence[str] = ()) -> PrepareConfig:
    """Read a preparation's YAML file. ``overrides``: ``text.length.min_characters=3``, ``inputs.0.name=web``.

    Raises ValueError that names the file, the field and what is wrong with its value.
    """
    return load_settings(PrepareConfig, path, overrides, "preparation")
