"""Paths as options."""

import os
from typing import Annotated

from pydantic import AfterValidator


def _expand_home(path: str) -> str:
    if not path:
        raise ValueError("an empty path; name a file or a folder")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: no user of this machine has this home folder; write the path out")
    return expanded


# a file or a folder; `~` is the home folder, as in a shell
PathText = Annotated[str, AfterValidator(_expand_home)]
