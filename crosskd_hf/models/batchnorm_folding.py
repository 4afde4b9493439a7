"""BatchNorms of a frozen backbone as part of the convolutions before them."""

import copy
import logging

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .backbone import Backbone, batchnorms

logger = logging.getLogger(__name__)

PROBE_SIDE = 96  # pixels; Inception needs 75
TOLERANCE = 1e-6  # of a map's largest value; rounding alone stays far below


@torch.no_grad()
def fold_batchnorms(backbone: Backbone) -> Backbone:
    """A copy of a backbone without the BatchNorms that follow a convolution: one map less to compute and to hold each.

    Their statistics and weights must not change any more. Maps are the same up to rounding. Which convolution a
    BatchNorm follows is found by a look at what runs; a backbone that isn't what it looks like there, such as one that
    uses a convolution's output elsewhere too, is given back as it is. The log says what came of it.

    Args:
        backbone: in evaluation mode. It is left as it is.
    """
    total = len(list(batchnorms(backbone)))
    if not total:
        return backbone
    weight = next(backbone.parameters())
    # On the CPU and in double precision, so that every machine finds the same: a GPU's TF32 is off by more than 1e-3.
    folded = copy.deepcopy(backbone).to("cpu", torch.float64)
    pixels = torch.randn(1, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0)).double()
    expected = folded(pixels)
    names = {module: name for name, module in folded.named_modules()}
    pairs = _pairs(folded, pixels)
    if not pairs:
        logger.info("folded 0 of %d BatchNorms: none follows a convolution of its own", total)
        return backbone
    for norm, convolution in pairs.items():
        assert norm.running_mean is not None and norm.running_var is not None  # see `_pairs`
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(names[norm], rest)
    error = max(_difference(given, wanted) for given, wanted in zip(folded(pixels), expected, strict=True))
    if not error <= TOLERANCE:  # NaN too
        logger.warning("folded 0 of %d BatchNorms: the maps would change by %.1e of their largest value", total, error)
        return backbone
    logger.info("folded %d of %d BatchNorms into the convolutions before them", len(pairs), total)
    return folded.to(weight.device, weight.dtype).requires_grad_(False).eval()


def _pairs(backbone: Backbone, pixels: Tensor) -> dict[_BatchNorm, nn.Conv2d]:
    """BatchNorm -> the convolution whose output it is given, of those that run once."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # kept, so that no other tensor takes the place in memory
    pairs: list[tuple[_BatchNorm, nn.Conv2d]] = []

    def saw_convolution(module: nn.Conv2d, _inputs: tuple, output: Tensor) -> None:
        outputs[id(output)] = (module, output)

    def saw_norm(module: _BatchNorm, inputs: tuple) -> None:
        if id(inputs[0]) in outputs:
            pairs.append((module, outputs[id(inputs[0])][0]))

    # Not subclasses: some standardise their weights as they run.
    convolutions = [module for module in backbone.modules() if type(module) is nn.Conv2d]
    norms = [norm for norm in batchnorms(backbone) if norm.running_mean is not None and norm.weight is not None]
    handles = [module.register_forward_hook(saw_convolution) for module in convolutions]
    handles += [module.register_forward_pre_hook(saw_norm) for module in norms]
    backbone(pixels)
    for handle in handles:
        handle.remove()
    runs = [module for pair in pairs for module in pair]
    return {norm: conv for norm, conv in pairs if runs.count(norm) == runs.count(conv) == 1}


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
