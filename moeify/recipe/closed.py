"""What all parts of a recipe are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticKnownError

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""A name that is also safe as one path component."""
MEAN = "mean"
"""Stands beside the categories for their mean."""
ROOT = "core"
"""The expert that all categories share."""
RESERVED = {MEAN: "the mean over categories", ROOT: "the core that all categories share"}
"""Names that no category may have, and what has them."""


def reserved(category: str) -> str | None:
    """Return what is wrong with a category's name where something else has it, else None."""
    if category not in RESERVED:
        return None
    return f"the category name {category!r} is reserved for {RESERVED[category]}; rename the category"


class Closed(BaseModel):
    """Refuses unknown keys and changes; a string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class AtHand(Closed):
    """What Python has at hand and no text can say: of kind ``given``, which recipes and their schema do not know."""

    @model_validator(mode="before")
    @classmethod
    def _unknown_to_recipes(cls, value: Any, info: ValidationInfo) -> Any:
        if info.mode == "json":
            raise PydanticKnownError(
                "union_tag_invalid", {"discriminator": "'kind'", "tag": "given", "expected_tags": "those of the schema"}
            )
        return value
