"""The part of an exported file that computes: a detector and the selection of its detections as one traced graph."""

import copy

import torch
import torch.fx.experimental._config as symbolic_config
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert
from torchvision.ops import nms as nms_of_one_class
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.assigners import gather_boxes
from ..models.base import DenseDetector, unpadded_sizes
from ..models.head import HeadOutput, flatten_levels
from ..models.image_processing import DenseDetectorImageProcessor

OUTPUTS = ("scores", "labels", "boxes")
AXES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "pixel_mask": {0: "batch", 1: "height", 2: "width"}}
QUERY_AXES = {"pixel_values": {0: "batch"}}


class ExportError(ValueError):
    """An export that can't be made, and what to do about it."""


@torch.library.custom_op("crosskd_hf::batched_nms_mask", mutates_args=())
def batched_nms_mask(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, num_labels: int) -> Tensor:
    """Which candidates non-maximum suppression keeps, class by class.

    Classes are kept apart by running one after another, not by moving their boxes apart: that would round coordinates.

    Args:
        boxes: (N, C, 4) xyxy.
        scores: (N, C). Candidates with score 0 aren't any.
        labels: (N, C) int64.
        iou_threshold: IoU above which the worse of two boxes of a class goes.
        num_labels: labels are below this.

    Returns:
        (N, C) bool.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(scores)):
        candidate = scores[image] > 0
        for label in labels[image][candidate].unique():
            index = (candidate & (labels[image] == label)).nonzero().squeeze(1)
            keep[image, index[nms_of_one_class(boxes[image, index], scores[image, index], iou_threshold)]] = True
    return keep


@batched_nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, num_labels: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def suppress(
    processor: DenseDetectorImageProcessor, boxes: Tensor, scores: Tensor, labels: Tensor, num_labels: int
) -> Tensor:
    """`batched_nms_mask` at the threshold of an image processor."""
    # Rounded as the IoUs are, see `select_detections`.
    threshold = torch.tensor(processor.nms_threshold, dtype=torch.float32).item()
    return batched_nms_mask(boxes, scores, labels, threshold, num_labels)


class ExportableDetector(nn.Module):
    """A detector and the selection of its detections, for batches of any size, in operations that can be traced.

    Nothing in it depends on the data but inside the suppression: candidates that drop out get score 0.

    Args:
        model: the detector.
        processor: whose thresholds and numbers of candidates and detections count.
        nms: do non-maximum suppression, too.
    """

    def __init__(self, model: DenseDetector, processor: DenseDetectorImageProcessor, nms: bool):
        super().__init__()
        self.model = model
        self.processor = processor
        self.nms = nms

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) and (N, H, W) -> scores (N, K), labels (N, K), boxes (N, K, 4), as the module describes."""
        model, most, divisor = self.model, self.processor.max_detections, self.processor.size_divisor
        image_sizes = unpadded_sizes(pixel_values, pixel_mask)
        if model.backbone.is_swin:  # sides are multiples already: written so, PyTorch proves that windows fit them
            for axis in (2, 3):
                pixel_values = pixel_values.narrow(axis, 0, pixel_values.shape[axis] // divisor * divisor)
        head = model.head(model.fpn(model.backbone(pixel_values)))
        score, label, boxes = self._candidates(head, image_sizes)
        count = score.shape[1]
        if self.nms:
            score = score * suppress(self.processor, boxes, score, label, model.config.num_labels)
            missing, count = max(most - count, 0), most
            score, label = F.pad(score, (0, missing)), F.pad(label, (0, missing))
            boxes = F.pad(boxes, (0, 0, 0, missing))
        score, order = score.topk(count)
        detected = score > 0
        label = torch.where(detected, label.gather(1, order), -1)
        return score, label, gather_boxes(boxes, order) * detected.unsqueeze(-1)

    def _candidates(self, head: HeadOutput, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, C), labels (N, C) and clipped boxes (N, C, 4), C = levels * max_candidates; see
        `select_detections`, which leaves out what has score 0 here."""
        predictions = self.model.flatten(head)
        score, pair = self._best_pairs(head)
        num_labels = self.model.head.spec.num_labels
        prior, label = pair // num_labels, pair % num_labels
        if predictions.centerness is not None:
            score = score * predictions.centerness.sigmoid().gather(1, prior)
        boxes = gather_boxes(self.model.decode(predictions.boxes, self.model.priors(head)), prior)
        height, width = image_sizes[:, None, :1], image_sizes[:, None, 1:]
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat([width, height, width, height], dim=-1))
        has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        return score * has_area, label, boxes

    def _best_pairs(self, head: HeadOutput) -> tuple[Tensor, Tensor]:
        """Class scores and (prior, class) numbers, both (N, levels * max_candidates), of each level's best pairs."""
        spec, most = self.model.head.spec, self.processor.max_candidates
        scores, pairs, start = [], [], 0
        for level in head.logits:
            flat = flatten_levels([level], spec.num_labels).float().sigmoid().flatten(1)
            best, index = F.pad(flat, (0, most), value=-1.0).topk(most)  # padded, since levels may have fewer
            keep = best > self.processor.score_threshold
            scores.append(best * keep)
            pairs.append(torch.where(keep, index, 0) + start)
            start = start + flat.shape[1]
        return torch.cat(scores, dim=1), torch.cat(pairs, dim=1)


class ExportableQueryDetector(nn.Module):
    """A detector of transformers that scores each of its Q queries for every class, and the best Q of those pairs.

    Args:
        model: a detector in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> scores (N, Q), labels (N, Q), boxes (N, Q, 4) xyxy pixels, best first."""
        outputs = self.model(pixel_values)
        height, width = pixel_values.shape[-2:]
        queries, num_labels = outputs.logits.shape[1:]
        scores, pair = outputs.logits.sigmoid().flatten(1).topk(queries)
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * scores.new_tensor([width, height, width, height])
        return scores, pair % num_labels, gather_boxes(boxes, pair // num_labels)


def trace(model: PreTrainedModel, processor: BaseImageProcessor, nms: bool) -> torch.export.ExportedProgram:
    """The graph, for any number of images, and for a dense detector of any size."""
    program = (
        _trace_dense(model, processor, nms) if isinstance(model, DenseDetector) else _trace_query(model, processor)
    )
    # With an example, a loaded program refuses sizes for which PyTorch would lay out memory otherwise than for it
    # (1 x 1 maps, 16 images), although it computes them.
    program.example_inputs = None
    return program


def _trace_query(model: PreTrainedModel, processor: BaseImageProcessor) -> torch.export.ExportedProgram:
    pixel_values = torch.zeros(2, 3, processor.size["height"], processor.size["width"])
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    exportable = ExportableQueryDetector(portable(model)).eval()
    with torch.no_grad():  # strict, since transformers takes `len` of a batch, which is a constant otherwise
        return torch.export.export(exportable, (), {"pixel_values": pixel_values}, dynamic_shapes=shapes, strict=True)


def _trace_dense(
    model: DenseDetector, processor: DenseDetectorImageProcessor, nms: bool
) -> torch.export.ExportedProgram:
    exportable = ExportableDetector(with_static_padding(portable(model)), processor, nms).eval()
    # No map of this batch has a side of 1, and no two sizes are the same: both would be taken for rules.
    multiple, stride = processor.size_divisor, model.config.strides[-1]
    cells = -(-2 * stride // multiple)
    pixel_values = torch.zeros(2, 3, cells * multiple, (cells + -(-stride // multiple)) * multiple)
    inputs = {"pixel_values": pixel_values, "pixel_mask": torch.ones_like(pixel_values[:, 0], dtype=torch.bool)}
    # Some backbones (ResNet-D's pooling) have maps of other sizes where a side isn't a multiple of 32.
    sizes = {
        "batch": torch.export.Dim("batch"),
        "height": multiple * torch.export.Dim("rows"),
        "width": multiple * torch.export.Dim("columns"),
    }
    shapes = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in AXES.items()}
    # The patch: maps may have sides of 1, as P7 of a small image has.
    with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):
        return torch.export.export(exportable, (), inputs, dynamic_shapes=shapes, strict=False)


def with_static_padding(model: DenseDetector) -> DenseDetector:
    """The model, with TensorFlow's padding as it is where sides are multiples of all strides.

    That of `tf_` backbones of timm depends on each map's size: traced so, PyTorch works on its formulas for an hour.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Conv2dSame):
            continue
        kernels = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        height, width = (max((kernel - 1) * dilation + 1 - stride, 0) for kernel, stride, dilation in kernels)
        padding = nn.ZeroPad2d((width // 2, width - width // 2, height // 2, height - height // 2))
        plain = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            dilation=module.dilation,
            groups=module.groups,
        )
        plain.weight, plain.bias = module.weight, module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(padding, plain))
    return model


def portable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode, that doesn't touch the user's, and makes anchors for the images that it is given."""
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if getattr(model.config, "anchor_image_size", None):
        model.config.anchor_image_size = None  # of transformers' detectors: anchors of this size only
    return model
