"""Detections of prepared images: shared by `crosskd predict` and the pipeline, so that the two agree."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.postprocess import check_outputs


@torch.inference_mode()
def detect_images(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    inputs: Sequence[Mapping[str, Tensor]],
    target_sizes: Sequence[tuple[int, int]],
    threshold: float = 0.0,
) -> list[dict[str, Tensor]]:
    """Detections of images that the processor prepared one by one.

    Images of one padded size run through the model together, others one after another: padded to a larger neighbour,
    an image would get other predictions, since convolutions and GroupNorm see the padding. So each image gets what the
    model gives for it alone, up to the rounding of batched kernels.

    Args:
        model: in evaluation mode.
        processor: the model's.
        inputs: a dict per image with `pixel_values` (1, 3, H, W) and, if the processor makes one, `pixel_mask`
            (1, H, W).
        target_sizes: original (height, width) of each image.
        threshold: detections with a score up to this are left out.

    Returns:
        a dict per image, in order: `scores` (K,), best first, `labels` (K,), `boxes` (K, 4) xyxy in original pixels;
        on the CPU.
    """
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for index, image in enumerate(inputs):
        groups[image["pixel_values"].shape].append(index)
    detections: dict[int, dict[str, Tensor]] = {}
    for indices in groups.values():
        names = [name for name in ("pixel_values", "pixel_mask") if name in inputs[indices[0]]]
        batch = {name: torch.cat([inputs[index][name] for index in indices]).to(model.device) for name in names}
        sizes = [target_sizes[index] for index in indices]
        detected = processor.post_process_object_detection(check_outputs(model(**batch)), threshold, sizes)
        for index, one in zip(indices, detected, strict=True):
            detections[index] = {name: value.cpu() for name, value in one.items()}
    return [detections[index] for index in range(len(inputs))]
