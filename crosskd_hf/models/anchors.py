"""Priors of the detectors: anchor boxes or points, level by level, in row, column, anchor order."""

import torch
from torch import Tensor


def grid_offsets(sizes: list[tuple[int, int]], strides: list[int], device: torch.device) -> list[Tensor]:
    """(x, y) pixel of each cell's top left corner, a (H * W, 2) float tensor a level."""
    grids = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y = torch.arange(height, device=device, dtype=torch.float32) * stride
        x = torch.arange(width, device=device, dtype=torch.float32) * stride
        grids.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 2))
    return grids


def square_anchors(
    sizes: list[tuple[int, int]], strides: list[int], scale: float, device: torch.device
) -> list[Tensor]:
    """One square anchor of side `scale * stride` a cell, centred on the cell's corner `stride * i` (not its middle).

    Returns a (H * W, 4) xyxy tensor a level (ATSS, arXiv 1912.02424; GFL).
    """
    anchors = []
    for grid, stride in zip(grid_offsets(sizes, strides, device), strides, strict=True):
        half = scale * stride / 2
        anchors.append(torch.cat([grid - half, grid + half], dim=-1))
    return anchors


def octave_anchors(
    sizes: list[tuple[int, int]],
    strides: list[int],
    base_scale: float,
    ratios: list[float],
    scales_per_octave: int,
    device: torch.device,
) -> list[Tensor]:
    """Anchors of several shapes a cell, centred on the cell's corner `stride * i` (RetinaNet, arXiv 1708.02002, 4).

    Args:
        sizes, strides: (height, width) and pixels a cell, a level.
        base_scale: side of the square anchor of the first scale, in strides.
        ratios: height / width; the outer order.
        scales_per_octave: scales 2^(i / n); the inner order.
        device: of the result.

    Returns:
        (H * W * ratios * scales, 4) xyxy a level.
    """
    root = torch.tensor(ratios, device=device).sqrt()[:, None]
    octave = torch.tensor([2 ** (i / scales_per_octave) for i in range(scales_per_octave)], device=device)
    half_width, half_height = (1 / root * octave).flatten() / 2, (root * octave).flatten() / 2
    shapes = base_scale * torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)
    anchors = []
    for grid, stride in zip(grid_offsets(sizes, strides, device), strides, strict=True):
        anchors.append((grid.repeat(1, 2)[:, None] + shapes * stride).reshape(-1, 4))
    return anchors


def cell_centers(sizes: list[tuple[int, int]], strides: list[int], device: torch.device) -> list[Tensor]:
    """The point in the middle of each cell, stride * (i + 0.5): a (H * W, 2) xy tensor a level (FCOS)."""
    return [grid + stride / 2 for grid, stride in zip(grid_offsets(sizes, strides, device), strides, strict=True)]


def cell_corners(sizes: list[tuple[int, int]], strides: list[int], num_anchors: int, device: torch.device) -> Tensor:
    """(P, 2) xy pixel of the top left corner of each prior's cell, over all levels."""
    return torch.cat(grid_offsets(sizes, strides, device)).repeat_interleave(num_anchors, dim=0)


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
