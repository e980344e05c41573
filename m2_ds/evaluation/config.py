"""What to evaluate: a list of tasks, each of one kind, each over splits of a shard dataset."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from m2_ds.schema import Settings


class _Task(Settings):
    name: str | None = Field(None, description="first part of the metrics' names; None: the dataset folder's name")
    dataset: Path = Field(description="folder of a shard dataset")
    splits: list[str] = Field(min_length=1, description="splits, each measured on its own")
    languages: list[str] = Field(["en", "zh"], min_length=1, description="languages, each measured on its own")
    limit: int | None = Field(None, ge=1, description="pictures of a split at most, the first ones; None: all")

    @property
    def title(self) -> str:
        return self.name or self.dataset.resolve().name


class RetrievalTask(_Task):
    """Recall of captions by pictures and of pictures by captions."""

    kind: Literal["retrieval"] = "retrieval"
    caption_kinds: list[str] | None = Field(None, description="kinds of captions that count, e.g. [tts]; None: all")
    match_groups: bool = Field(True, description="captions of one picture of a group are right for all of its pictures")


class ZeroShotTask(_Task):
    """Classification of pictures by the text of class names. A picture's class is its `category`."""

    kind: Literal["zeroshot"] = "zeroshot"
    classes: str = Field(description="file of class names (JSON, YAML or CSV), or one that ships: 'emoji_groups'")
    templates: dict[str, Path] = Field(
        default_factory=dict,
        description="prompt templates by language (YAML list); a missing one takes what ships",
    )


class HardNegativesTask(_Task):
    """How often a true caption scores above one that is wrong in a known way."""

    kind: Literal["hard_negatives"] = "hard_negatives"
    caption_kinds: list[str] | None = Field(None, description="kinds of true captions that count; None: all")


Task = Annotated[RetrievalTask | ZeroShotTask | HardNegativesTask, Field(discriminator="kind")]


class EvaluationConfig(Settings):
    """What is measured while training and by `m2 evaluate`."""

    tasks: list[Task] = Field(default_factory=list, description="none: nothing is measured")
    every: int = Field(0, ge=0, description="steps between evaluations while training; 0: only at the end")
    batch_size: int = Field(256, ge=1, description="pictures, or texts, in one forward pass")
    threads: int = Field(2, ge=1, description="threads that decode pictures")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen = set()
        for task in self.tasks:
            for split in task.splits:
                if (place := (task.kind, task.title, split)) in seen:
                    raise ValueError(f"two {task.kind} tasks write {task.title}/{split}: give one of them another name")
                seen.add(place)
        return self
