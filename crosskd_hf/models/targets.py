"""From labels and masks to what the losses learn: padded ground truth, image sizes, box and class targets."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from .assigners import Assignment, gather_boxes
from .box_coding import boxes_to_distances
from .outputs import GroundTruth, Priors

Labels = Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor]


def unpadded_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(N, 2) float height and width of each image, from a mask (N, H, W) of 1 on the image and 0 on padding."""
    if pixel_mask is None:
        batch, _, height, width = pixel_values.shape
        sides = [pixel_values.new_full((batch, 1), side, dtype=torch.float32) for side in (height, width)]
        return torch.cat(sides, dim=1)
    # Padding is at the bottom and right only, so that the first column and row tell.
    column, row = pixel_mask.select(2, 0).bool(), pixel_mask.select(1, 0).bool()  # bfloat16 counts to 256 only
    return torch.stack([column.sum(dim=1), row.sum(dim=1)], dim=1).float()


def box_frames(labels: Labels | None) -> Tensor | None:
    """(N, 2) float height and width of what the boxes of each image are relative to: `size` of its label, as the image
    processors of DETR and of this package give it. None: no label has it, or they are padded.

    Raises:
        ValueError: some labels have it and some don't.
    """
    if not labels or isinstance(labels, Mapping) or not any("size" in label for label in labels):
        return None
    if lacking := [index for index, label in enumerate(labels) if "size" not in label]:
        raise ValueError(f"labels: image {lacking[0]} has no size, but others do; give it to all of them or to none")
    return torch.stack([torch.as_tensor(label["size"]).reshape(2).float() for label in labels])


def relative_boxes(boxes_xyxy: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes (N, P, 4), xyxy pixels of images (N, 2) height and width -> cxcywh relative to their image."""
    return box_convert(boxes_xyxy, "xyxy", "cxcywh") / image_sizes.flip(-1).repeat(1, 2)[:, None]


def pad_ground_truth(labels: Labels, image_sizes: Tensor) -> GroundTruth:
    """Labels of each image, or padded ones of the whole batch -> one padded batch, of at least one box an image.

    Args:
        labels: see `DenseDetector.forward`.
        image_sizes: (N, 2) height and width of each image without padding: what boxes are relative to, unless
            labels have a `size`.

    Raises:
        ValueError: if there are not as many labels as images, an image has not as many boxes as classes, or padded
            labels come without a mask.
    """
    scores = None
    if isinstance(labels, Mapping):
        if missing := {"boxes_xyxy", "class_labels", "mask"} - set(labels):
            raise ValueError(
                f"padded labels need boxes_xyxy, class_labels and mask; {', '.join(sorted(missing))} missing"
            )
        boxes, classes, mask = labels["boxes_xyxy"].float(), labels["class_labels"], labels["mask"]
        scores = labels.get("scores")
    else:
        boxes, classes, mask = padded_labels(labels)
    if len(mask) != len(image_sizes):
        raise ValueError(
            f"{len(mask)} labels were given for {len(image_sizes)} images; labels is a list with a dict per image."
        )
    if not isinstance(labels, Mapping):
        frames = box_frames(labels)
        frames = image_sizes if frames is None else frames.to(image_sizes.device)
        boxes = box_convert(boxes, "cxcywh", "xyxy") * frames.flip(-1).repeat(1, 2)[:, None]
    if mask.shape[1] == 0:
        batch = len(mask)
        boxes, classes, mask = boxes.new_zeros(batch, 1, 4), classes.new_zeros(batch, 1), mask.new_zeros(batch, 1)
        scores = None
    return GroundTruth(boxes, classes, mask, scores)


def padded_labels(labels: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, G, 4) as they are, classes (N, G) and mask (N, G) of the labels of each image."""
    if not labels:
        raise ValueError("labels is an empty list; it must have a dict per image.")
    for index, label in enumerate(labels):
        if missing := {"boxes", "class_labels"} - set(label):
            raise ValueError(
                f"labels: image {index} needs the keys boxes and class_labels; {', '.join(sorted(missing))} missing "
                f"(it has {', '.join(map(str, label))})"
            )
        if not all(isinstance(label[name], Tensor) for name in ("boxes", "class_labels")):
            raise ValueError(f"labels: image {index} needs tensors: boxes (G, 4) and class_labels (G,)")
        classes = label["class_labels"]
        if classes.numel() and (classes.is_floating_point() or classes.dtype == torch.bool):
            raise ValueError(f"labels: class_labels of image {index} are {classes.dtype}; they must be integers")
        if label["boxes"].numel() != 4 * len(label["class_labels"]):
            shapes = tuple(label["boxes"].shape), tuple(label["class_labels"].shape)
            raise ValueError(f"labels: image {index} needs boxes (G, 4) and class_labels (G,), got {shapes}")
    boxes = pad_sequence([label["boxes"].reshape(-1, 4).float() for label in labels], batch_first=True)
    # torch.tensor([]) of an image without boxes is a float.
    classes = pad_sequence([label["class_labels"].long() for label in labels], batch_first=True)
    mask = pad_sequence([torch.ones_like(label["class_labels"], dtype=torch.bool) for label in labels], True)
    return boxes, classes, mask


def matched_distances(truth: GroundTruth, assignment: Assignment, priors: Priors) -> Tensor:
    """(N, P, 4) pixels from a positive prior's centre to the sides of its box; elsewhere a stride each, so that every
    term computed from it is finite before it is weighted by 0."""
    distances = boxes_to_distances(priors.centers, gather_boxes(truth.boxes, assignment.box_index))
    return torch.where(assignment.positive.unsqueeze(-1), distances, priors.strides)


def class_targets(truth: GroundTruth, assignment: Assignment, logits: Tensor, values: Tensor | None = None) -> Tensor:
    """(N, P, labels), laid out as `logits` are: at the label of a positive prior 1, or its one of `values` (N, P); 0
    elsewhere."""
    labels = truth.labels.gather(1, assignment.box_index).unsqueeze(-1)
    values = assignment.positive.float() if values is None else values * assignment.positive
    return torch.zeros_like(logits).scatter_(-1, labels, values.unsqueeze(-1))


def positives_per_image(positive: Tensor) -> Tensor:
    """Positives (N, P) summed over images, each image counting at least 1: the class normaliser on this rank."""
    return positive.sum(dim=1).clamp(min=1).sum().float()
