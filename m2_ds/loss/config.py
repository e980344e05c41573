"""What the training objective is made of."""

from typing import Literal

from pydantic import Field

from m2_ds.schema import Settings

Repeats = Literal["positive", "exclude", "negative"]


class LossConfig(Settings):
    """Weights of the contrastive (ITC) loss at the two levels, and what pairs of one group mean to each other."""

    unimodal_weight: float = Field(1.0, ge=0, description="weight of ITC on the backbone's class tokens")
    vl_weight: float = Field(1.0, ge=0, description="weight of ITC after the vision-language layers (the embeddings)")
    repeats: Repeats = Field(
        "positive",
        description="pairs of one group in a batch: positive (all are right answers, equally), exclude (neither right "
        "nor wrong), negative (only its own caption is right, as in CLIP)",
    )
