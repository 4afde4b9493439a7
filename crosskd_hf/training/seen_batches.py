"""What an evaluation keeps for a `compute_metrics` that a user gave, in the form in which transformers gives it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import ModelOutput

from ..models.targets import relative_boxes

Labels = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


def known_images(labels: Labels) -> tuple[Tensor, Tensor]:
    """Image ids (N,) and original sizes (N, 2), (height, width), of a batch's labels, padded or a dict per image."""
    if isinstance(labels, Mapping):
        return labels["image_id"], labels["orig_size"]
    image_ids, sizes = (torch.stack([label[name].squeeze() for label in labels]) for name in ("image_id", "orig_size"))
    return image_ids, sizes


class SeenBatches:
    """Outputs and labels of an evaluation's batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple, list[dict[str, Any]]]] = []

    def add(self, outputs: ModelOutput, labels: Labels) -> None:
        """Keep a batch on the CPU."""
        arrays = tuple(outputs[name].float().cpu().numpy() for name in ("logits", "pred_boxes"))
        listed = _listed(labels) if isinstance(labels, Mapping) else labels
        targets = [{name: value.cpu().numpy() for name, value in label.items()} for label in listed]
        self.batches.append((({}, *arrays), targets))

    def gathered(self) -> EvalPrediction:
        """Of all processes: as transformers' Trainer has it with `eval_do_concat_batches=False`.

        Returns:
            `predictions`, a tuple per batch of an empty dict (in the place of `loss_dict`), `logits` and `pred_boxes`;
            `label_ids`, a list per batch of a dict per image. Arrays of numpy.
        """
        batches = gather_object(self.batches)
        predictions, labels = ([batch[i] for batch in batches] for i in range(2))
        return EvalPrediction(predictions, labels)  # type: ignore[arg-type] # its types are those of joined batches


def _listed(labels: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A dict per image, as `DetectionCollator` makes them, of padded labels."""
    boxes = relative_boxes(labels["boxes_xyxy"], labels["size"])
    return [
        {
            "class_labels": labels["class_labels"][i][mask],
            "boxes": boxes[i][mask],
            "image_id": labels["image_id"][i].reshape(1),
            "size": labels["size"][i],
            "orig_size": labels["orig_size"][i],
        }
        for i, mask in enumerate(labels["mask"])
    ]
