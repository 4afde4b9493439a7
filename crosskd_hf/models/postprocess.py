"""From a detector's predictions to detections: cut, top-k, clip, non-maximum suppression.

Nothing is done level by level or class by class: which level, image or class a candidate belongs to is a number of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

NMS_SHARE = 10  # of the candidates, so many times `max_detections` are enough for nearly every image


class NonFiniteOutputError(ValueError):
    """A model gives NaN or infinity, of which post-processing would make "nothing found"."""


def check_outputs(outputs: Any) -> Any:
    """A detector's outputs as they are. The host waits for the device.

    Args:
        outputs: `logits` and `pred_boxes`.

    Raises:
        NonFiniteOutputError: they hold NaN, or boxes infinity.
    """
    if outputs.logits.isnan().any() or not outputs.pred_boxes.isfinite().all():
        raise NonFiniteOutputError(
            "the model gives NaN or infinity: its weights are damaged or diverged, or half precision is too narrow "
            "for them. Take an earlier checkpoint, or try fp32."
        )
    return outputs


def select_detections(
    logits: Tensor,
    boxes_xyxy: Tensor,
    image_sizes: Tensor,
    centerness: Tensor | None,
    level_sizes: Sequence[int],
    score_threshold: float = 0.05,
    max_candidates: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> list[dict[str, Tensor]]:
    """Detections of a batch, best first.

    Args:
        logits: (N, P, labels) of the scores.
        boxes_xyxy: (N, P, 4), in any unit.
        image_sizes: (N, 2) height and width of each image in the same unit, to which boxes are clipped.
        centerness: (N, P) logits, or None. Scores are divided by it for the threshold and the top-k, which are those
            of the class alone (FCOS and ATSS).
        level_sizes: priors per level; candidates are cut level by level.
        score_threshold: (prior, class) pairs need a higher class score.
        max_candidates: pairs kept a level.
        nms_threshold: IoU above which the worse of two boxes of a class goes.
        max_detections: detections kept an image.

    Returns:
        a dict per image of `scores` (K,), `labels` (K,) int64, `boxes` (K, 4) xyxy. Of equal scores, that of the lower
        level, then prior, then class comes first.
    """
    image, prior, label = best_pairs(logits, level_sizes, score_threshold, max_candidates, centerness)
    score = logits[image, prior, label].sigmoid()
    ends = image_sizes.flip(-1).repeat(1, 2)[image]  # width, height, width, height
    boxes = torch.minimum(boxes_xyxy[image, prior].clamp(min=0), ends)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=-1)
    image, boxes, score, label = image[has_area], boxes[has_area], score[has_area], label[has_area]
    counts = torch.bincount(image, minlength=len(logits)).tolist()
    detections = []
    for candidates in zip(score.split(counts), label.split(counts), boxes.split(counts), strict=True):
        keep = suppress(*candidates, nms_threshold, max_detections)
        detections.append(dict(zip(("scores", "labels", "boxes"), (v[keep] for v in candidates), strict=True)))
    return detections


def best_pairs(
    logits: Tensor, level_sizes: Sequence[int], score_threshold: float, count: int, centerness: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (prior, class) pairs above the threshold, at most `count` of each image and level.

    Args:
        logits: (N, P, labels).
        level_sizes: priors per level.
        score_threshold: a pair's score must be above.
        count: of an image's level.
        centerness: (N, P) logits, or None. Scores are divided by it.

    Returns:
        image, prior and label of each pair, all (M,): image after image, level after level, best first.
    """
    ends = torch.tensor(level_sizes, device=logits.device).cumsum(0)
    # A level's best pairs are among its as many best priors: this cuts 16 million pairs of a large image at once.
    factor = logits.new_ones(logits.shape[:2]) if centerness is None else centerness.sigmoid()
    best = logits.amax(dim=-1).sigmoid() / factor
    image, prior = (best > score_threshold).nonzero(as_tuple=True)
    level = image * len(ends) + torch.bucketize(prior, ends, right=True)
    keep = best_of_each(level, best[image, prior], count).sort().values
    image, prior, level = image[keep], prior[keep], level[keep]
    scores = logits[image, prior].sigmoid() / factor[image, prior, None]
    # Of a level with so many priors, none of the best pairs is below the best pair of any.
    levels = len(logits) * len(ends)
    least = scores.new_ones(levels).scatter_reduce(0, level, scores.amax(dim=-1), "amin")
    least = torch.where(torch.bincount(level, minlength=levels) == count, least, 0)
    row, label = ((scores > score_threshold) & (scores >= least[level, None])).nonzero(as_tuple=True)
    keep = best_of_each(level[row], scores[row, label], count)
    row = row[keep]
    return image[row], prior[row], label[keep]


def best_of_each(group: Tensor, score: Tensor, count: int) -> Tensor:
    """Positions of the `count` best scores of each group: group after group, best first, of equal ones the first.

    Args:
        group: (M,) int64.
        score: (M,), not negative; compared in single precision.
        count: of a group.
    """
    # Bits of such floats are ordered as they are. Group and score in an integer are sorted in a seventh of the time.
    order = ((group << 32) - score.detach().float().view(torch.int32)).sort(stable=True).indices
    group = group[order]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    return order[rank < count]


def suppress(score: Tensor, label: Tensor, boxes: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Non-maximum suppression of each class.

    Args:
        score: (M,).
        label: (M,) int64, from 0.
        boxes: (M, 4) xyxy, no coordinate below 0.
        iou_threshold: IoU above which the worse of two boxes of a class goes.
        count: positions wanted.

    Returns:
        positions of the `count` best boxes that stay, best first.
    """
    # Classes are moved apart, as published, but in double precision: in single, the 80th class of a photograph would
    # have coordinates that are multiples of 1/128 pixel. Suppression looks only at better boxes, so that the best ones
    # are decided without the rest.
    if boxes.device.type == "mps":  # has no double precision
        return suppress(score.cpu(), label.cpu(), boxes.cpu(), iou_threshold, count).to(boxes.device)
    boxes, score = boxes.double(), score.double()
    size = boxes.max() + 1 if len(boxes) else 0
    apart = boxes + (label * size)[:, None]
    order = score.argsort(descending=True, stable=True)
    for part in (order[: NMS_SHARE * count], order):
        keep = part[nms(apart[part], score[part], iou_threshold)]
        if len(keep) >= count or len(part) == len(order):
            break
    return keep[:count]
