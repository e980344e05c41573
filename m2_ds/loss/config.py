"""What the training objective is made of."""

from typing import Literal, Self

from pydantic import Field, model_validator

from m2_ds.schema import Settings

Repeats = Literal["positive", "exclude", "negative"]
Form = Literal["softmax", "sigmoid"]
Precision = Literal["fp32", "bf16"]


class LossConfig(Settings):
    """Weights of the contrastive (ITC) loss at the two levels, its form, and what pairs of one group mean."""

    unimodal_weight: float = Field(1.0, ge=0, description="weight of ITC on the backbone's class tokens")
    vl_weight: float = Field(1.0, ge=0, description="weight of ITC after the vision-language layers (the embeddings)")
    form: Form = Field(
        "softmax",
        description="softmax: cross entropy over the contrastive batch in both directions (CLIP); sigmoid: every pair "
        "judged by itself (SigLIP), needs model.logit_bias",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread evenly; softmax only")
    repeats: Repeats = Field(
        "positive",
        description="pairs of one group in a batch: positive (all are right answers, equally), exclude (neither right "
        "nor wrong), negative (only its own caption is right, as in CLIP)",
    )
    exchange: Precision = Field(
        "fp32", description="of the features that ranks send each other; logits, sums and loss are fp32 always"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.form == "sigmoid" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to form softmax; with sigmoid set it to 0")
        return self
