"""Classes of the images that a command line names, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bnfinetune.inference.predictor import OnError, load


def predict(
    checkpoint: str, paths: Sequence[str], top: int = 5, on_error: OnError = "skip"
) -> Iterator[dict[str, Any]]:
    """Predict the classes of images; `bnfinetune predict` calls this.

    Answers come from the first image on.

    Args:
        checkpoint: A folder that `load` takes.
        paths: Image files, and folders that are searched for images as those to train on are.
        top: Classes per image, the likeliest first.
        on_error: `skip` names images that cannot be read in notes and counts them in a last one; `raise` ends there.

    Yields:
        What `Prediction.record` gives of each image.

    Raises:
        CheckpointError: The folder holds no network.
        DataError: A path does not exist or holds no image, or no image at all can be read.
    """
    for found in load(checkpoint).stream(list(paths), on_error=on_error):
        yield found.record(top)
