"""Errors that are the user's to mend."""


class UserError(Exception):
    """Something outside the code is wrong (config, data, environment). Its message stands alone: no traceback."""


class ConfigError(ValueError, UserError):
    """The config cannot work. Raised before any process starts."""


class DataError(ValueError, UserError):
    """The problems, or the tokenizer, cannot be used as configured."""
