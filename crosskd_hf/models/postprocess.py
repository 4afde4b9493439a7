"""From a detector's predictions to detections: cut, top-k, clip, rescale, non-maximum suppression."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def select_detections(
    logits: Tensor,
    pred_boxes: Tensor,
    centerness: Tensor | None,
    level_sizes: list[int],
    image_size: tuple[float, float],
    scale: tuple[float, float] = (1.0, 1.0),
    score_threshold: float = 0.05,
    max_candidates: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> dict[str, Tensor]:
    """Detections of one image, best first.

    Args:
        logits: (P, labels).
        pred_boxes: (P, 4) xyxy pixels of the network's input.
        centerness: (P,) logits, or None. The score is multiplied by it only after the threshold and the top-k.
        level_sizes: priors a level; candidates are cut level by level.
        image_size: (height, width) of the network's input without padding, to which boxes are clipped.
        scale: (height, width) factors of the resize: boxes are divided by them.
        score_threshold: (prior, class) pairs need a higher class score.
        max_candidates: pairs kept a level.
        nms_threshold: IoU above which the worse of two boxes of a class goes.
        max_detections: detections kept.

    Returns:
        `scores` (K,), `labels` (K,) int64, `boxes` (K, 4) xyxy in original pixels.
    """
    num_labels = logits.shape[-1]
    centerness = None if centerness is None else centerness.sigmoid()
    scores, pairs, start = [], [], 0
    for level in logits.sigmoid().split(level_sizes):
        flat = level.flatten()
        best, index = flat.topk(min(max_candidates, len(flat)))
        keep = best > score_threshold
        scores.append(best[keep])
        pairs.append(index[keep] + start * num_labels)
        start += len(level)
    score, pair = torch.cat(scores), torch.cat(pairs)
    prior, label = pair // num_labels, pair % num_labels
    if centerness is not None:
        score = score * centerness[prior]
    boxes = clip_boxes(pred_boxes[prior], image_size)
    height_scale, width_scale = scale
    boxes = boxes / boxes.new_tensor([width_scale, height_scale, width_scale, height_scale])
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, score, label = boxes[has_area], score[has_area], label[has_area]
    # Rounded as the IoUs are: otherwise an IoU of exactly 0.6 would be above 0.6.
    threshold = torch.tensor(nms_threshold, dtype=boxes.dtype).item()
    keep = batched_nms(boxes, score, label, threshold)[:max_detections]
    return {"scores": score[keep], "labels": label[keep], "boxes": boxes[keep]}


def clip_boxes(boxes: Tensor, image_size: tuple[float, float]) -> Tensor:
    """Boxes (..., 4) xyxy cut to an image of (height, width)."""
    height, width = image_size
    return torch.stack(
        [
            boxes[..., 0].clamp(0, width),
            boxes[..., 1].clamp(0, height),
            boxes[..., 2].clamp(0, width),
            boxes[..., 3].clamp(0, height),
        ],
        dim=-1,
    )
