"""What every section of the config is made of, the types that many options share, and code that an option names."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take true for 1
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


Int = Annotated[int, BeforeValidator(_no_flag)]
Float = Annotated[float, BeforeValidator(_no_flag)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
UnitFloat = Annotated[Float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys, NaN and infinity. The text under an option describes it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


def load_named(name: str, known: Iterable[str], example: str) -> Any:
    """Return what an option names as `module:attribute`, a user's own; `known`: the names that the option has itself.

    Raises: ValueError when the module or the attribute is missing.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"expected one of {', '.join(known)}, or {example}{_near(name, known)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"importing {module_name} failed with {type(error).__name__}: {error}; put the folder of that module on "
            "PYTHONPATH, and see that it imports in this environment"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"module {module_name} has no {attribute!r}{_near(attribute, dir(module))}")
    return getattr(module, attribute)


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
