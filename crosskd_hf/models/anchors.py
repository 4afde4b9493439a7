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


def valid_cells(
    sizes: list[tuple[int, int]], strides: list[int], image_sizes: Tensor, size_divisor: int, num_anchors: int
) -> Tensor:
    """Which priors lie on an image's own area.

    Args:
        sizes: (height, width) of each level.
        strides: pixels a cell, a level.
        image_sizes: (N, 2) height and width in pixels, without the batch's padding.
        size_divisor: an image's own size is rounded up to this.
        num_anchors: priors a cell.

    Returns:
        (N, P) bool: False for priors of cells beyond the rounded image.
    """
    padded = torch.ceil(image_sizes / size_divisor) * size_divisor
    masks = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        cells = torch.ceil(padded / stride)
        rows = torch.arange(height, device=image_sizes.device) < cells[:, 0, None]
        columns = torch.arange(width, device=image_sizes.device) < cells[:, 1, None]
        mask = rows[:, :, None] & columns[:, None, :]
        masks.append(mask.flatten(1).repeat_interleave(num_anchors, dim=1))
    return torch.cat(masks, dim=1)
