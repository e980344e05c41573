"""What the training objective is made of."""

from typing import Literal, Self

from pydantic import Field, model_validator

from m2_ds.schema import Settings

Repeats = Literal["positive", "exclude", "negative"]
Form = Literal["softmax", "sigmoid"]
Precision = Literal["fp32", "bf16"]


class _MaskedConfig(Settings):
    weight: float = Field(0.0, ge=0, description="weight in the loss; 0: nothing is built or computed for it")
    warmup_steps: int = Field(0, ge=0, description="steps over which the weight rises from 0")
    final_weight: float | None = Field(
        None, ge=0, description="the weight goes to this, linearly, from the warm-up to the last step; None: it stays"
    )

    def weight_at(self, step: int, steps: int) -> float:
        """At ``step`` (from 0) of ``steps``."""
        if step < self.warmup_steps:
            return self.weight * (step + 1) / self.warmup_steps
        if self.final_weight is None:
            return self.weight
        done = (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps)
        return self.weight + (self.final_weight - self.weight) * min(1.0, done)

    @model_validator(mode="after")
    def _asked_for(self) -> Self:
        if self.weight == 0 and (self.warmup_steps or self.final_weight):
            raise ValueError("weight is 0, so this objective is left out whatever its schedule says; give it a weight")
        return self


class CmlmConfig(_MaskedConfig):
    """Cross-modal masked language modelling: hidden words are told from the picture and the words around them."""

    share: float = Field(0.5, gt=0, le=1, description="share of a caption's words that are hidden; one at least")


class CmimConfig(_MaskedConfig):
    """Cross-modal masked image modelling: hidden patches are told from the caption and the patches around them."""

    share: float = Field(0.4, gt=0, le=1, description="share of the patches that are hidden")
    choose: Literal["attentive", "random"] = Field(
        "attentive",
        description="which patches: those nearest to the caption's embedding (SyCoCa, arXiv 2401.02137), or any",
    )
    targets: Literal["pixels", "codes"] = Field(
        "pixels", description="pixels: normalised by patch (MAE, arXiv 2111.06377); codes: of visual_tokenizer"
    )
    visual_tokenizer: str | None = Field(
        None,
        description="package.module:function that gets a torch device and gives a m2_ds.model.masked.VisualTokenizer",
    )
    codes: int = Field(8192, gt=1, description="different codes of visual_tokenizer")

    @model_validator(mode="after")
    def _has_its_targets(self) -> Self:
        if (self.targets == "codes") != (self.visual_tokenizer is not None):
            raise ValueError(
                f"targets is {self.targets} and visual_tokenizer is {self.visual_tokenizer}: codes come from one, and "
                "pixels need none"
            )
        return self


class LossConfig(Settings):
    """The contrastive (ITC) loss: weights of two levels, form, what pairs of a group mean; masked losses beside it."""

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
    cmlm: CmlmConfig = CmlmConfig()
    cmim: CmimConfig = CmimConfig()

    @property
    def masked(self) -> bool:
        """Whether pairs run jointly, for one masked objective or both."""
        return self.cmlm.weight > 0 or self.cmim.weight > 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.form == "sigmoid" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to form softmax; with sigmoid set it to 0")
        if self.cmim.weight and self.cmim.choose == "attentive" and self.unimodal_weight == 0:
            raise ValueError(
                "cmim.choose attentive compares patches with captions by the unimodal heads, and unimodal_weight is 0: "
                "give it a weight, or set cmim.choose: random"
            )
        return self
