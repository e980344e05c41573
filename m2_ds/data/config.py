"""What a training run reads, and how pictures and captions are drawn from it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from m2_ds.data.store import location
from m2_ds.schema import Settings

Range = tuple[float, float]
Location = Annotated[
    Path | str, BeforeValidator(lambda value: location(value) if isinstance(value, str | Path) else value)
]


def _positive(shares: dict[str, float]) -> dict[str, float]:
    if wrong := {language: share for language, share in shares.items() if share <= 0}:
        raise ValueError(f"languages: shares must be positive, got {wrong}; leave a language out instead")
    return shares


class SourceConfig(Settings):
    """One data set and its part in the mixture."""

    path: Location = Field(description="folder of shards with its manifest.json, or its URL (s3://bucket/set, ...)")
    split: str = Field("train", description="split of the data set")
    weight: float | None = Field(
        None, gt=0, description="share in the mixture, relative to the other sources; all None: by number of rows"
    )
    caption_kinds: dict[str, float] = Field(
        default_factory=dict, description="factors on caption weights by kind, 0 leaves a kind out; others keep theirs"
    )

    languages: dict[str, float] = Field(
        default_factory=dict,
        description="languages taken from this source and their shares; none: those of data.languages that it has",
    )

    @field_validator("languages")
    @classmethod
    def _shares(cls, languages: dict[str, float]) -> dict[str, float]:
        return _positive(languages)

    @field_validator("caption_kinds")
    @classmethod
    def _factors(cls, kinds: dict[str, float]) -> dict[str, float]:
        if negative := [kind for kind, factor in kinds.items() if factor < 0]:
            raise ValueError(f"factors of {negative} are negative; 0 leaves a kind out")
        return kinds


class AugmentConfig(Settings):
    """How a training picture is varied. Ranges are (low, high). The defaults suit photographs with captions."""

    crop_scale: Range = Field((0.9, 1.0), description="share of the picture's area that a crop keeps")
    crop_ratio: Range = Field(
        (1.0, 1.0),
        description="crop's aspect ratio relative to the picture's own; 1: squeezed to the square as a whole",
    )
    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring; captions may speak of left and right")
    affine: float = Field(1.0, ge=0, le=1, description="probability of the four following together")
    degrees: float = Field(0.0, ge=0, le=180, description="rotation of up to this either way, degrees")
    translate: float = Field(0.0, ge=0, le=1, description="shift of up to this share of the side, each direction")
    scale: Range = Field((1.0, 1.0), description="zoom about the centre; under 1 shows the fill colour around")
    shear: float = Field(0.0, ge=0, le=60, description="slant of up to this either way, degrees")
    fill: tuple[int, int, int] = Field((255, 255, 255), description="colour beyond the edges, RGB 0-255")
    brightness: float = Field(0.0, ge=0, le=1, description="factor drawn from 1 - this to 1 + this")
    contrast: float = Field(0.0, ge=0, le=1, description="factor drawn likewise, about the mean brightness")
    saturation: float = Field(0.0, ge=0, le=1, description="factor drawn likewise, about grey")
    hue: float = Field(0.0, ge=0, le=0.5, description="turn of the colour circle of up to this share either way")
    grayscale: float = Field(0.0, ge=0, le=1, description="probability of losing all colour")
    erase: float = Field(0.0, ge=0, le=1, description="probability of painting over one rectangle in a random colour")
    erase_scale: Range = Field((0.02, 0.2), description="share of the area that is painted over")
    erase_ratio: Range = Field((0.3, 3.3), description="aspect ratio of the rectangle")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, low, high in (
            ("crop_scale", 0.0, 1.0),
            ("crop_ratio", 0.0, 100.0),
            ("scale", 0.0, 10.0),
            ("erase_scale", 0.0, 1.0),
            ("erase_ratio", 0.0, 100.0),
        ):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise ValueError(f"{name} is ({first}, {last}); it must be a range above {low:g} and up to {high:g}")
        if not all(0 <= channel <= 255 for channel in self.fill):
            raise ValueError(f"fill is {self.fill}; channels go from 0 to 255")
        return self


class DataConfig(Settings):
    """The stream of training pairs."""

    sources: list[SourceConfig] = Field(min_length=1)
    languages: dict[str, float] = Field(
        default_factory=lambda: {"en": 1.0, "zh": 1.0}, description="languages in use and their shares"
    )
    captions: Literal["one", "each"] = Field(
        "one", description="one caption a picture in a drawn language, or one in each language"
    )
    sort_by_length: bool = Field(
        True,
        description="with several micro-batches a step: a rank's pairs are cut into them by the length of their "
        "captions, so that less padding is computed; the step's pairs stay the same",
    )
    image_size: int = Field(224, ge=8, description="side of the square that pictures become, pixels")
    augment: AugmentConfig = AugmentConfig()
    mixing_window: int = Field(4096, ge=1, description="pairs in which the mixture's shares hold exactly")
    shuffle_groups: int = Field(32, ge=1, description="row groups whose rows are shuffled together")
    workers: int = Field(0, ge=0, description="loader processes a rank; 0: a thread of the training process")
    prefetch: int = Field(4, ge=1, description="micro-batches made ahead, each worker")
    row_group_cache_mb: int = Field(256, ge=1, description="encoded row groups kept in memory, MB a source and process")
    cache_folder: Path | None = Field(
        None, description="folder on a local disk for row groups of object stores, shared by the machine's processes"
    )
    cache_gb: float = Field(50.0, gt=0, description="bound of cache_folder, GB; what was used longest ago leaves first")
    read_ahead: int = Field(
        4,
        ge=0,
        description="threads a process and source that fetch row groups of object stores before they are needed",
    )
    picture_cache_mb: int = Field(
        0, ge=0, description="decoded pictures kept for good, MB a process; for sets that fit, of small pictures"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="a larger picture counts as broken")
    max_attempts: int = Field(10, ge=1, description="substitutes tried for one pair before the run stops")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.languages:
            raise ValueError("languages is empty; name at least one, as in {en: 1, zh: 1}")
        _positive(self.languages)
        for number, source in enumerate(self.sources):
            if unknown := source.languages.keys() - self.languages.keys():
                raise ValueError(
                    f"sources.{number}.languages: {sorted(unknown)} are not among data.languages {list(self.languages)}"
                )
            if source.languages and self.captions == "each":
                raise ValueError(
                    f"sources.{number}.languages is set, and captions: each takes a caption in every language; unset it"
                )
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("sources: give every source a weight, or none (then they mix by number of rows)")
        return self
