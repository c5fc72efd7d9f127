"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong (config, data, environment). Its message stands alone: no traceback."""
