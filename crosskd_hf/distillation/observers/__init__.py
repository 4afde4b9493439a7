"""Observers, one file a family of detectors."""

from collections.abc import Sequence

from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ...models.base import DenseDetector
from ..observation import Observer
from .dense import DenseObserver
from .query import QueryObserver


def observe(
    model: PreTrainedModel,
    levels: Sequence[int] | None = None,
    classes: Tensor | None = None,
    processor: BaseImageProcessor | None = None,
) -> Observer:
    """The observer of a detector.

    Args:
        model: any detector.
        levels: which of its levels the other model has, too; None: all.
        classes: (S,) its labels that the other model knows, in the student's order; None: all, in this order.
        processor: its image processor; None: the one that goes with it.

    Raises:
        PairError: nothing can be distilled from or to it.
    """
    if isinstance(model, DenseDetector):
        return DenseObserver(model, levels, classes, processor)
    return QueryObserver(model, levels, classes, processor)
