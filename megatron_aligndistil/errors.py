"""What users are told when an input is wrong: one sentence with the values and the remedy."""

from __future__ import annotations


class AlignDistilError(Exception):
    """Base of the errors that are the user's to mend; printed without a traceback."""


class ConfigError(AlignDistilError, ValueError):
    """A configuration key or value, or a parallel layout, that cannot work."""


class DataError(AlignDistilError, ValueError):
    """A record or file of data that cannot be used; names the file and line where it can."""


class RecordError(DataError):
    """One record that cannot be used, where others may be: what `data.on_error: skip` leaves out."""


class CheckpointError(AlignDistilError, RuntimeError):
    """A checkpoint folder that is missing, incomplete, or does not fit the model asked for."""
