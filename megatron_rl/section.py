"""What every section of the config is made of, and the types that many options share."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take true for 1
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def _expand_home(path: str) -> str:
    if not path:
        raise ValueError("an empty path; name a file or a folder")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: no user of this machine has this home folder; write the path out")
    return expanded


Int = Annotated[int, BeforeValidator(_no_flag)]
Float = Annotated[float, BeforeValidator(_no_flag)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
# a file or a folder; `~` is the home folder, as in a shell
PathText = Annotated[str, AfterValidator(_expand_home)]


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys, NaN and infinity. The text under an option describes it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )
