"""The base of every configuration block: typed, frozen, and refusing names that it does not know."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A configuration block. Unknown names and wrong types raise pydantic's ValidationError, which names the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
