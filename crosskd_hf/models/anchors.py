"""Priors of the detectors: anchor boxes or points, level by level, in row, column, anchor order.

Training on images of many sizes seldom finds them in a cache. So all levels are made together, in few operators and
without a copy to the device, for which a GPU's host would wait.
"""

import torch
from torch import Tensor


def grid_cells(sizes: list[tuple[int, int]], strides: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cells of maps of (height, width): the (x, y) pixel of each one's top left corner, and its stride.

    Returns:
        (cells, 2) and (cells, 1) float tensors, over all levels.
    """
    levels = [(height * width, width, stride) for (height, width), stride in zip(sizes, strides, strict=True)]
    cell = torch.cat([torch.arange(cells, device=device) for cells, _, _ in levels])  # number in its level
    # With its type, of which the lowest allowed exporter would make a float.
    widths = [torch.full((cells,), width, dtype=torch.long, device=device) for cells, width, _ in levels]
    width = torch.cat(widths)
    stride = torch.cat([torch.full((cells, 1), float(stride), device=device) for cells, _, stride in levels])
    return torch.stack([cell % width, cell // width], dim=-1) * stride, stride


def square_anchors(corners: Tensor, strides: Tensor, scale: float) -> Tensor:
    """One square anchor of side `scale * stride` a cell, centred on the cell's corner `stride * i` (not its middle).

    (ATSS, arXiv 1912.02424; GFL.) Takes and returns (cells, 2), (cells, 1) -> (cells, 4) xyxy.
    """
    half = strides * (scale / 2)
    return torch.cat([corners - half, corners + half], dim=-1)


def octave_anchors(
    corners: Tensor, strides: Tensor, base_scale: float, ratios: list[float], scales_per_octave: int
) -> Tensor:
    """Anchors of several shapes a cell, centred on the cell's corner `stride * i` (RetinaNet, arXiv 1708.02002, 4).

    Args:
        corners, strides: (cells, 2) xy and (cells, 1) pixels.
        base_scale: side of the square anchor of the first scale, in strides.
        ratios: height / width; the outer order.
        scales_per_octave: scales 2^(i / n); the inner order.

    Returns:
        (cells * ratios * scales, 4) xyxy.
    """
    root = _filled(ratios, corners).sqrt()[:, None]
    octave = _filled([2 ** (i / scales_per_octave) for i in range(scales_per_octave)], corners)
    half_width, half_height = (1 / root * octave).flatten() / 2, (root * octave).flatten() / 2
    shapes = base_scale * torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)
    return (corners.repeat(1, 2)[:, None] + shapes * strides[:, None]).reshape(-1, 4)


def cell_centers(corners: Tensor, strides: Tensor) -> Tensor:
    """The point in the middle of each cell, stride * (i + 0.5): (cells, 2) xy (FCOS)."""
    return corners + strides / 2


def per_prior(values: Tensor, num_anchors: int) -> Tensor:
    """Values of cells (cells, C) -> (P, C), those of each prior's cell."""
    return values if num_anchors == 1 else values[:, None].expand(-1, num_anchors, -1).flatten(0, 1)


def _filled(values: list[float], like: Tensor) -> Tensor:
    """A row of numbers on a tensor's device. Each is filled in there: a list would be copied to it."""
    return torch.cat([like.new_full((1,), value) for value in values])


def valid_cells(corners: Tensor, image_sizes: Tensor, size_divisor: int) -> Tensor:
    """Which priors lie on an image's own area.

    Args:
        corners: (P, 2) xy pixel of the top left corner of each prior's cell.
        image_sizes: (N, 2) height and width in pixels, without the batch's padding.
        size_divisor: an image's own size is rounded up to this.

    Returns:
        (N, P) bool: False for priors of cells beyond the rounded image.
    """
    padded = torch.ceil(image_sizes / size_divisor) * size_divisor
    return (corners < padded.flip(1).unsqueeze(1)).all(dim=-1)
