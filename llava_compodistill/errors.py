"""Every error that explains itself: what is wrong, where, and the way out. The command line shows them without a
traceback; all else is a bug.
"""

from __future__ import annotations


class CompoDistillError(Exception):
    """The base of the family. Its members are also what Python would call them (ValueError, ImportError, …)."""


class HostError(CompoDistillError, ImportError):
    """LLaVA is missing, broken, or not one of the supported revisions."""


class CheckoutError(CompoDistillError, RuntimeError):
    """A folder is not a LLaVA checkout, or the plugin does not fit it."""


class RepositoryError(CompoDistillError, FileNotFoundError):
    """Something that only a checkout of this project's repository holds is asked for elsewhere."""


class PatchError(CompoDistillError, RuntimeError):
    """A patch file is malformed, or does not fit the file it is meant for."""


class RunnerError(CompoDistillError, RuntimeError):
    """The module cannot be run."""


class CheckpointError(CompoDistillError, ValueError):
    """A checkpoint folder is missing something or is of another kind than asked for."""


class TemplateError(CompoDistillError, ValueError):
    """There is no such conversation template."""


class FlagError(CompoDistillError, ValueError):
    """A flag has a value that it cannot have, or two contradict each other; the message names them and the way out."""


class DiskError(CompoDistillError, OSError):
    """The disk has no room for what a run will write, or refuses to take it."""


class OutputError(CompoDistillError, OSError):
    """An output folder cannot be written to, or another run is writing to it."""


class SampleError(CompoDistillError, ValueError):
    """A training sample cannot be used; the message names it and says why."""


class DataError(CompoDistillError, ValueError):
    """The files of a data set or benchmark are missing or wrong; the message names file, place and field."""


class ImageError(DataError):
    """An image cannot be used; the message names its file and says why."""


class CacheError(DataError):
    """A teacher cache cannot be used: it is not finished, damaged, or of something else; the message says what
    differs and the way out."""


class MissingData(DataError):
    """A benchmark's files are not there at all: nobody has got them yet."""


class RecordError(CompoDistillError, ValueError):
    """A record that a scorer cannot read; names the record and the field."""


class RecordsError(CompoDistillError, ValueError):
    """A file of records cannot be gone on with; the message names file and line."""


class NonFiniteLossError(CompoDistillError, RuntimeError):
    """A loss term, a gradient or a weight became NaN or infinite."""


class NonFiniteModelError(CompoDistillError, RuntimeError):
    """What a model gives is NaN or infinite, so that it has no answers to score."""


class BlindError(CompoDistillError, RuntimeError):
    """The loss of a run does not depend on its images."""


class PlanError(CompoDistillError, ValueError):
    """A plan cannot be made of what is given; the message names the flag, or the file and its field."""
