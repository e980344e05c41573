"""What to evaluate: a list of tasks, each of one kind, over splits of a shard dataset, a JSONL list or a folder."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from m2_ds.data.config import Location
from m2_ds.schema import Settings

Names = list[str]  # inside a task `list` is a field
Way = Literal["fair", "release"]
_PROTOCOL = "fair: docs/evaluation.md; release: pictures and texts prepared, and answers counted, as the release does"


def _folder_name(place: Path | str) -> str:
    return place.resolve().name if isinstance(place, Path) else place.rstrip("/").rpartition("/")[2]


class _Task(Settings):
    name: str | None = Field(None, description="first part of the metrics' names; None: the data set's folder's name")
    dataset: Location | None = Field(None, description="folder of a shard dataset, or its URL")
    splits: Names = Field(default_factory=Names, description="splits of `dataset`, each measured on its own")
    languages: Annotated[Names, Field(min_length=1)] = Field(
        ["en", "zh"], description="languages, each measured on its own"
    )
    limit: int | None = Field(None, ge=1, description="pictures of a split at most, the first ones; None: all")

    @property
    def place(self) -> Path | str:
        """The data set's folder or URL, JSONL file, or folder of pictures."""
        assert self.dataset is not None
        return self.dataset

    @property
    def parts(self) -> Names:
        """What is measured on its own: splits, or the one part that a list or folder is."""
        return self.splits

    @property
    def title(self) -> str:
        return self.name or _folder_name(self.place)

    def _reads_one_of(self, **others: Path | str | None) -> None:
        places: dict[str, Path | str | None] = {"dataset": self.dataset, **others}
        given = [name for name, value in places.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"a task reads one of {', '.join(places)}; set are {', '.join(given) or 'none of them'}")
        if self.dataset is not None and not self.splits:
            raise ValueError("splits: name at least one split of `dataset`")
        if self.dataset is None and self.splits:
            raise ValueError(f"splits belong to `dataset`; `{given[0]}` has none, leave them out")


class RetrievalTask(_Task):
    """Recall of captions by pictures and of pictures by captions."""

    kind: Literal["retrieval"] = "retrieval"
    list: Path | None = Field(None, description='JSONL, a line a picture: {"image": path, "caption": [texts]}')
    images: Path | None = Field(None, description="folder that the list's paths start from; None: that of the list")
    language: str | None = Field(None, description="the list's language")
    protocol: Way = Field("fair", description=f"{_PROTOCOL}; for `list`")
    caption_kinds: Names | None = Field(None, description="kinds of captions that count, e.g. [tts]; None: all")
    match_groups: bool = Field(True, description="captions of one picture of a group are right for all of its pictures")

    @model_validator(mode="before")
    @classmethod
    def _a_list_has_one_language(cls, fields: Any) -> Any:
        language = fields.get("language") if isinstance(fields, dict) and fields.get("list") is not None else None
        if isinstance(language, str):
            if (given := fields.get("languages", [language])) != [language]:
                raise ValueError(f"languages: a list is of one language, {language!r} by `language`, not {given}")
            return {**fields, "languages": [language]}
        return fields

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._reads_one_of(list=self.list)
        if self.list is not None and self.language is None:
            raise ValueError("language: say which language the list's captions are in, e.g. zh")
        if self.list is not None and (self.caption_kinds is not None or not self.match_groups):
            raise ValueError("caption_kinds and match_groups belong to `dataset`; a list has neither kinds nor groups")
        if self.list is None and (self.images is not None or self.language is not None or self.protocol != "fair"):
            raise ValueError("images, language and protocol belong to `list`, which is not set")
        return self

    @property
    def place(self) -> Path | str:
        return self.list if self.list is not None else super().place

    @property
    def parts(self) -> Names:
        return [self.list.stem] if self.list is not None else self.splits

    @property
    def title(self) -> str:
        return self.name or (_folder_name(self.list.parent) if self.list is not None else super().title)


class ZeroShotTask(_Task):
    """Classification of pictures by the text of class names. A picture's class is its `category`, or its folder."""

    kind: Literal["zeroshot"] = "zeroshot"
    folder: Path | None = Field(None, description="pictures in a folder a class, or, with `labels`, all in one")
    labels: Path | None = Field(None, description="text file, a line a picture below `folder`: path and class")
    protocol: Way = Field("fair", description="release: pictures are read as the release reads them; for `folder`")
    classes: str | dict[str, Path] = Field(
        description="file of class names (JSON, YAML, CSV or text), one a language, or one that ships: 'emoji_groups'"
    )
    templates: dict[str, Path] = Field(
        default_factory=dict,
        description="prompt templates by language (YAML list); a missing one takes what ships",
    )
    predictions: bool = Field(False, description="write each picture's five likeliest classes to a Parquet file")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._reads_one_of(folder=self.folder)
        if self.folder is None and (self.labels is not None or self.protocol != "fair"):
            raise ValueError("labels and protocol belong to `folder`, which is not set")
        if isinstance(self.classes, dict) and (missing := sorted({*self.languages} - {*self.classes})):
            raise ValueError(f"classes: no file for language {missing[0]!r}; give one, or set languages")
        return self

    @property
    def place(self) -> Path | str:
        return self.folder if self.folder is not None else super().place

    @property
    def parts(self) -> Names:
        return [_folder_name(self.folder)] if self.folder is not None else self.splits

    @property
    def title(self) -> str:
        return self.name or (_folder_name(self.folder.resolve().parent) if self.folder is not None else super().title)


class HardNegativesTask(_Task):
    """How often a true caption scores above one that is wrong in a known way."""

    kind: Literal["hard_negatives"] = "hard_negatives"
    caption_kinds: Names | None = Field(None, description="kinds of true captions that count; None: all")
    score: Literal["cosine", "words"] = Field(
        "cosine",
        description="cosine of the embeddings, or words: how well the caption's words are told from the picture and "
        "each other (a model trained with loss.cmlm)",
    )
    rounds: int = Field(4, ge=1, description="of score words: forwards a pair, in each of which other words are hidden")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._reads_one_of()
        return self


class HiddenWordsTask(_Task):
    """How often hidden words of true captions are told, given the picture, and given a grey one."""

    kind: Literal["hidden_words"] = "hidden_words"
    caption_kinds: Names | None = Field(None, description="kinds of captions that count; None: all")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._reads_one_of()
        return self


Task = Annotated[RetrievalTask | ZeroShotTask | HardNegativesTask | HiddenWordsTask, Field(discriminator="kind")]


def _measured(task: Task) -> tuple[str, ...]:
    return (task.kind, task.score) if task.kind == "hard_negatives" else (task.kind,)


class EvaluationConfig(Settings):
    """What is measured while training and by `m2 evaluate`."""

    tasks: list[Task] = Field(default_factory=list, description="none: nothing is measured")
    every: int = Field(0, ge=0, description="steps between evaluations while training; 0: only at the end")
    batch_size: int | None = Field(
        None, ge=1, description="pictures in one forward pass, four times as many texts; None: 16 on a CPU, else 256"
    )
    threads: int = Field(2, ge=1, description="threads that decode pictures")
    skip_broken: bool = Field(False, description="leave out pictures that can't be decoded, and count them")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen = set()
        for task in self.tasks:
            for part in task.parts:
                if (place := (*_measured(task), task.title, part)) in seen:
                    raise ValueError(f"two {task.kind} tasks write {task.title}/{part}: give one of them another name")
                seen.add(place)
        return self
