"""Errors that a user can cause, each a `BnFinetuneError` and the fitting builtin.

A message is one line that names the layer, key or file, what was found, and the remedy.
"""

import sys
from collections.abc import Iterable
from difflib import get_close_matches


class BnFinetuneError(ValueError):
    """Base of every error that bnfinetune raises on purpose.

    Attributes:
        rank: The process that it happened in, where another one raises it too.
        told: Whether stderr has it already.
    """

    rank: int | None = None
    told: bool = False


class RecipeError(BnFinetuneError):
    """A recipe or override that cannot be used: unknown key, wrong type, out of bounds."""


class SelectionError(BnFinetuneError, LookupError):
    """A selector that matches nothing, or a model without a BatchNorm layer."""


class LayerError(BnFinetuneError, TypeError):
    """A layer that cannot be handled as asked."""


class PolicyError(BnFinetuneError):
    """Switches that contradict each other, or a model in a state that forbids the change."""


class StatisticsError(BnFinetuneError, RuntimeError):
    """Population statistics that could not be computed; the model is as it was before."""


class ShortDataError(StatisticsError, AssertionError):
    """Data that ended before the stated number of batches or samples (fvcore asserts here)."""


class DataError(BnFinetuneError, OSError):
    """A dataset, folder, column, split or image that cannot be used."""


class BackboneError(BnFinetuneError, LookupError):
    """A model that timm does not know, cannot reach, or whose weights do not fit."""


class CheckpointError(BnFinetuneError, OSError):
    """A checkpoint or run folder that is missing, damaged, foreign or in the way."""


class TrainingError(BnFinetuneError, RuntimeError):
    """Training that cannot go on, such as a loss that is not finite."""


class ExportError(BnFinetuneError, RuntimeError):
    """A network that cannot be written in another format, computes something else there, or cannot be sent."""


def error_line(text: str, rank: int | None = None) -> str:
    """How an error is told on stderr: one printable line, with the process that it happened in."""
    line = " ".join(text.splitlines())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return f"bnfinetune: error: {'' if rank is None else f'[rank {rank}] '}{shown}"


def say_on_stderr(line: str) -> None:
    """Write a line in one piece: `print` writes its end apart, so that lines of ranks on one terminal run together."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that somebody who wrote `name` most likely meant, if any is near."""
    return next(iter(get_close_matches(name, list(choices), n=1)), None)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean x?` for the nearest choice, or nothing: the end of a message."""
    near = nearest(name, choices)
    return f"; did you mean {near}?" if near else ""
