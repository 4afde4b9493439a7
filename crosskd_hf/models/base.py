"""The dense detector every architecture is made of: backbone -> FPN -> head -> losses or predictions."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..utils.distributed import Normalizers
from ..utils.labels import check_labels
from .anchors import cell_corners, grid_cells, valid_cells
from .assigners import Assignment, gather_boxes, gather_labels
from .backbone import Backbone
from .box_coding import box_centers, boxes_to_distances, distances_to_boxes
from .configuration import DenseDetectorConfig
from .fpn import FPN, FPNConv
from .head import ClassPredictor, DenseHead, HeadConv, HeadOutput, HeadSpec, LevelScales, flatten_levels

logger = logging.getLogger(__name__)
KEPT_PRIORS = 8  # sizes, for runs that see few; with many, priors are made in some 40 operators and no copy


@dataclass(frozen=True)
class DistillationSpec:
    """What distillation needs to know of a detector, as a teacher. The values are the published ones.

    Attributes:
        tap_index: number of tower blocks the student runs before the teacher's head takes over.
        cls_weight, box_weight, centerness_weight: weights of kd_cls, kd_box, kd_centerness.
        box_loss: "bin_kl" of distance distributions, "giou" or "log_iou" of decoded boxes.
        normalizer: the student's "class" or "box" normaliser, that a pair of this same detector divides by.
        centerness: whether the teacher's centerness is mimicked.
    """

    tap_index: int
    cls_weight: float
    box_weight: float
    box_loss: str
    normalizer: str
    centerness: bool = False
    centerness_weight: float = 1.0


@dataclass(frozen=True)
class Priors:
    """A batch's priors. Made by `Priors.of`.

    Attributes:
        levels: a (P_l, 4) xyxy anchor tensor, or (P_l, 2) point tensor, a level.
        all: (P, 4) or (P, 2), those of all levels.
        level_strides: pixels a cell, a level.
        strides: (P, 1) the same of each prior.
        centers: (P, 2) xy, the points themselves where priors are points.
        extents: (P, 4) from the centre to the prior's own left, top, right, bottom sides; 0 of points.
        corners: (P, 2) xy pixel of the top left corner of each prior's cell.
    """

    levels: list[Tensor]
    all: Tensor
    level_strides: tuple[int, ...]
    strides: Tensor
    centers: Tensor
    extents: Tensor
    corners: Tensor

    @classmethod
    def of(cls, levels: list[Tensor], level_strides: Sequence[int], corners: Tensor) -> "Priors":
        """Priors and stride of each level, and the cells of all."""
        pairs = zip(levels, level_strides, strict=True)
        everything = torch.cat(levels)
        boxes = everything if everything.shape[1] == 4 else everything.repeat(1, 2)
        centers = box_centers(boxes)
        return cls(
            levels=levels,
            all=everything,
            level_strides=tuple(level_strides),
            strides=torch.cat([level.new_full((level.shape[0], 1), stride) for level, stride in pairs]),
            centers=centers,
            extents=boxes_to_distances(centers, boxes),
            corners=corners,
        )

    @property
    def level_sizes(self) -> list[int]:
        """Priors a level."""
        return [len(level) for level in self.levels]


@dataclass(frozen=True)
class Predictions:
    """A head's output, flattened over levels, in fp32.

    Attributes:
        logits: (N, P, labels).
        boxes: (N, P, box_channels), as the head gives them.
        centerness: (N, P) logits, or None.
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor | None


@dataclass(frozen=True)
class GroundTruth:
    """Padded ground truth of a batch: boxes (N, G, 4) xyxy pixels, labels (N, G), mask (N, G) True for real boxes."""

    boxes: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class DetectionLosses:
    """A detector's own losses and what distillation takes from them.

    Attributes:
        terms: loss name -> (N, P) tensor, weighted and normalised; the sum of all is the loss.
        assignment: which prior learnt which box.
        class_normalizer, box_normalizer: scalars, without gradient.
    """

    terms: dict[str, Tensor]
    assignment: Assignment
    class_normalizer: Tensor
    box_normalizer: Tensor


@dataclass(frozen=True)
class Features:
    """Maps that a distillation compares, (N, C, H, W) a level each, in the precision in which the networks ran.

    No fields of the output itself: in mixed precision accelerate makes fp32 copies of all tensors that it finds there.

    Attributes:
        fpn: levels of the FPN.
        cls_taps, reg_taps: what the towers were tapped for, or None.
    """

    fpn: list[Tensor]
    cls_taps: list[Tensor] | None = None
    reg_taps: list[Tensor] | None = None


@dataclass
class DenseDetectorOutput(ModelOutput):
    """Output of a dense detector. P counts the priors of all levels.

    Attributes:
        loss: scalar, with labels only.
        loss_dict: name -> scalar, with labels only.
        logits: (N, P, labels), if `output_predictions`.
        pred_boxes: (N, P, 4) decoded boxes, xyxy pixels of `pixel_values`; not when `output_distillation`.
        centerness: (N, P) logits, of detectors that have it, if `output_predictions`.
        image_sizes: (N, 2) height and width of each image without padding; not of a teacher, that is with
            `output_distillation` and without labels.
        level_sizes: (N, levels) priors a level, the same for every image; not when `output_distillation`.
        hidden_states: when `output_hidden_states`: the backbone's maps C3, C4, C5, then the FPN's levels P3 to P7,
            each (N, C, H, W).
        features: FPN levels and taps, when `output_distillation`; also as `fpn_features`, `cls_taps`, `reg_taps`.
        predictions: those of the head, flattened over levels, when `output_distillation` and `output_predictions`.
        priors: what `predictions` are of, when `output_distillation`.
        detection: the detector's losses by level and its assignment, when `output_distillation` and labels.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None
    image_sizes: Tensor | None = None
    level_sizes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    features: Features | None = None
    predictions: Predictions | None = None
    priors: Priors | None = None
    detection: DetectionLosses | None = None

    @property
    def fpn_features(self) -> list[Tensor] | None:
        """Levels of the FPN."""
        return self.features and self.features.fpn

    @property
    def cls_taps(self) -> list[Tensor] | None:
        """Taps of the class tower."""
        return self.features and self.features.cls_taps

    @property
    def reg_taps(self) -> list[Tensor] | None:
        """Taps of the box tower."""
        return self.features and self.features.reg_taps


class DenseDetector(PreTrainedModel):
    """Base of the detectors. A detector gives its head's shape, priors, decoding, assignment, losses and, for
    distillation, a `DistillationSpec`; everything else is here."""

    config_class = DenseDetectorConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # With device_map: parts that hand maps across each other stay on one device.
    _no_split_modules = ["Backbone", "FPN", "DenseHead"]  # noqa: RUF012 - transformers' name and type
    accepts_loss_kwargs = False  # the losses are per-batch means: the Trainer divides them when it accumulates
    distillation: DistillationSpec
    # Whether `weigh` looks at the predictions; where it doesn't, the assignment is enough to measure the normalisers.
    normalizers_need_predictions = False

    def __init__(self, config: DenseDetectorConfig, pretrained_backbone: bool = False):
        super().__init__(config)
        self.backbone = Backbone(config, pretrained=pretrained_backbone)
        self.fpn = FPN(config, self.backbone.channels)
        self.head = DenseHead(self.head_spec(config))
        # Of the instance: add_model_tags() appends to it.
        self.model_tags = ["object-detection", "crosskd", config.model_type]
        self._priors: dict[tuple, Priors] = {}
        self._level_sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.normalizers = Normalizers()
        self._checked: set[str] = set()  # what was looked at in a first batch, see `_is_due`
        self.post_init()

    # What a detector provides -----------------------------------------------------------------------------------

    @staticmethod
    def head_spec(config: DenseDetectorConfig) -> HeadSpec:
        """Shape of the detector's head."""
        raise NotImplementedError

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        """Anchors (P, 4) or points (P, 2) of cells, given their corners (cells, 2) xy and strides (cells, 1)."""
        raise NotImplementedError

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Box outputs (N, P, box_channels) -> pixels (N, P, 4) from a prior's centre to left, top, right, bottom."""
        raise NotImplementedError

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth) -> Assignment:
        """Which prior learns which box. `valid` (N, P) is False for priors beyond an image's own area."""
        raise NotImplementedError

    def weigh(
        self, positive: Tensor, targets: Tensor, predictions: Predictions | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How much each prior's box counts, and what the losses are divided by.

        Args:
            positive: (N, P) bool.
            targets: (N, P, 4), see `matched_distances`.
            predictions: of the batch; may be None if `normalizers_need_predictions` is False.

        Returns:
            weights (N, P), 0 where no box is learnt; class and box normaliser, scalars. All without gradient.
        """
        raise NotImplementedError

    def detection_losses(
        self, predictions: Predictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        """The detector's loss terms."""
        raise NotImplementedError

    def matching_rule(self) -> tuple:
        """What the priors and their assignment depend on: two detectors with the same one label the same priors."""
        raise NotImplementedError

    # What they share --------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | dict[str, Tensor] | None = None,
        output_distillation: bool = False,
        output_predictions: bool = True,
        tap_index: int | None = None,
        raw_taps: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DenseDetectorOutput | tuple:
        """Detect, and compute the losses if there are labels.

        Args:
            pixel_values: (N, 3, H, W) normalised images, padded at the bottom and right.
            pixel_mask: (N, H, W), 1 on the image, 0 on padding; None means no padding.
            labels: a dict an image with `class_labels` (G,) int64 and `boxes` (G, 4) xyxy pixels of `pixel_values`; or
                one of the whole batch, padded, with `class_labels` (N, G), `boxes` (N, G, 4) and `mask` (N, G) bool.
            output_distillation: also give what a distillation needs: FPN levels, taps, raw predictions, targets.
            output_predictions: False, with `output_distillation`, keeps no predictions longer than the losses need
                them: a class map is large.
            tap_index, raw_taps: which output of the towers to tap, see `DenseHead.forward`.
            output_hidden_states: also give the maps of backbone and FPN; None takes the configuration's value.
            return_dict: False gives a tuple of what isn't None; None takes the configuration's value.

        Raises:
            ValueError: if labels and images differ in number, or labels can't be right (see `check_labels`; only
                lists of the first batch are looked at, and compiled none).
        """
        maps = self.backbone(pixel_values.to(self.dtype))
        features = self.fpn(maps)
        head = self.head(features, tap_index=tap_index, raw_taps=raw_taps)
        # A teacher in training needs no sizes: its images are the student's.
        needs_sizes = labels is not None or not output_distillation
        if needs_sizes and pixel_mask is None:
            self._warn_of_padding(pixel_values)
        image_sizes = unpadded_sizes(pixel_values, pixel_mask) if needs_sizes else None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = (*maps, *features) if output_hidden_states else None
        # Only the networks run in half precision: a pixel of a large box is more than bfloat16 resolves.
        with torch.autocast(pixel_values.device.type, enabled=False):
            keeps = output_predictions or not output_distillation
            output = self._output(head, features, hidden_states, image_sizes, labels, output_distillation, keeps)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _output(
        self,
        head: HeadOutput,
        features: list[Tensor],
        hidden_states: tuple[Tensor, ...] | None,
        image_sizes: Tensor | None,
        labels: list[dict[str, Tensor]] | dict[str, Tensor] | None,
        output_distillation: bool,
        output_predictions: bool,
    ) -> DenseDetectorOutput:
        predictions, priors = self.flatten(head), self.priors(head)
        loss = loss_dict = losses = level_sizes = None
        if labels is not None:
            truth, assignment = self.match(priors, image_sizes, labels)
            losses = self.detection_losses(predictions, priors, assignment, truth)
            loss_dict = {name: term.sum() for name, term in losses.terms.items()}
            first, *others = loss_dict.values()
            loss = sum(others, first)
        if not output_distillation:  # what post-processing needs
            sizes = [image_sizes.new_full((len(image_sizes), 1), n, dtype=torch.long) for n in priors.level_sizes]
            level_sizes = torch.cat(sizes, dim=1)
        # At once: a field that is set later is no key of a `ModelOutput`, nor in its tuple.
        return DenseDetectorOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=predictions.logits if output_predictions else None,
            pred_boxes=None if output_distillation else self.decode(predictions.boxes, priors),
            centerness=predictions.centerness if output_predictions else None,
            image_sizes=image_sizes,
            level_sizes=level_sizes,
            hidden_states=hidden_states,
            features=Features(features, head.cls_taps, head.reg_taps) if output_distillation else None,
            predictions=predictions if output_distillation and output_predictions else None,
            priors=priors if output_distillation else None,
            detection=losses if output_distillation else None,
        )

    def match(
        self, priors: Priors, image_sizes: Tensor, labels: list[dict[str, Tensor]] | dict[str, Tensor]
    ) -> tuple[GroundTruth, Assignment]:
        """A batch's boxes, padded, and which prior learns which.

        Raises:
            ValueError: see `pad_ground_truth` and `check_labels`.
        """
        truth = pad_ground_truth(labels, len(image_sizes))
        # Padded ones of a batch come from the collator, which has looked at them on the CPU.
        if not isinstance(labels, Mapping) and self._is_due("labels", truth.boxes):
            check_labels(truth.boxes, truth.labels, truth.mask, image_sizes, self.config.num_labels)
            self._checked.add("labels")
        return truth, self.assign(priors, self.valid_priors(priors, image_sizes), truth)

    def _is_due(self, what: str, values: Tensor) -> bool:
        """Whether values are still to be looked at: not in every batch, since on a GPU the host waits for it."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or values.is_meta:
            return False
        return what not in self._checked

    def _warn_of_padding(self, pixel_values: Tensor) -> None:
        """Tell once that images look padded, of which there is no mask. Normalised pixels are hardly ever 0."""
        if not self._is_due("padding", pixel_values):
            return
        begun = pixel_values[:, :, 0, 0].any(-1)
        ended = pixel_values[:, :, -1].flatten(1).any(-1) & pixel_values[:, :, :, -1].flatten(1).any(-1)
        padded = bool((begun & ~ended).any())
        if padded or pixel_values.device.type != "cpu":
            self._checked.add("padding")
        if padded:
            logger.warning(
                "pixel_values look padded (zeros in the last row or column), but there is no pixel_mask: padding "
                "counts as image, in losses and in boxes' sizes. Give the model the image processor's pixel_mask."
            )

    @torch.no_grad()
    def measure_normalizers(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | dict[str, Tensor] | None = None,
    ) -> None:
        """Tell `normalizers`, inside `measuring()`, of a batch: as `forward` would, whose arguments these are.

        A detector whose `normalizers_need_predictions` runs forward, so that it draws its random numbers. The others
        assign the boxes only, and leave the images alone.

        Raises:
            ValueError: if labels and images differ in number.
        """
        if self.normalizers_need_predictions:
            self(pixel_values, pixel_mask, labels)
            return
        with torch.autocast(pixel_values.device.type, enabled=False):
            height, width = pixel_values.shape[-2:]
            priors = self.priors_of(self.level_sizes(height, width), pixel_values.device)
            truth, assignment = self.match(priors, unpadded_sizes(pixel_values, pixel_mask), labels)
            self.weigh(assignment.positive, matched_distances(truth, assignment, priors), None)

    @torch.no_grad()
    def level_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of each level's maps of images of a height and width in pixels.

        The strides don't tell: some of timm's backbones round up, some down, and Inception has a border less. So an
        empty image is run through backbone and FPN, once a size, in evaluation mode: no random numbers are drawn, no
        averages change, and no SyncBatchNorm waits for other processes, whose sizes may be known.
        """
        size = height, width
        if size not in self._level_sizes:
            training = self.training
            self.eval()
            features = self.fpn(self.backbone(torch.zeros(1, 3, height, width, dtype=self.dtype, device=self.device)))
            self.train(training)
            self._level_sizes[size] = _map_sizes(features)
        return self._level_sizes[size]

    def decode(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Box outputs (N, P, box_channels) -> boxes (N, P, 4) xyxy pixels, not clipped."""
        return distances_to_boxes(priors.centers, self.distances(boxes, priors))

    def flatten(self, head: HeadOutput) -> Predictions:
        """The head's maps as (N, P, ...) tensors in fp32."""
        spec = self.head.spec
        centerness = None
        if head.centerness is not None:
            centerness = flatten_levels(head.centerness, 1).squeeze(-1).float()
        return Predictions(
            logits=flatten_levels(head.logits, spec.num_labels).float(),
            boxes=flatten_levels(head.boxes, spec.box_channels).float(),
            centerness=centerness,
        )

    def priors(self, head: HeadOutput) -> Priors:
        """Priors of the head's maps."""
        return self.priors_of(_map_sizes(head.logits), head.logits[0].device)

    def priors_of(self, sizes: list[tuple[int, int]], device: torch.device) -> Priors:
        """Priors of levels of (height, width). Those of the last few are kept; compiled, they are made of any size."""
        if torch.compiler.is_compiling():
            return self.build_priors(sizes, device)
        key = (tuple(sizes), device)
        found = self._priors.pop(key, None)  # put in again as the last used; other threads may do the same meanwhile
        if found is None:
            with torch.inference_mode(False):  # training may need them later
                found = self.build_priors(sizes, device)
        self._priors[key] = found
        if len(self._priors) > KEPT_PRIORS:
            self._priors.pop(next(iter(self._priors)), None)
        return found

    def build_priors(self, sizes: list[tuple[int, int]], device: torch.device) -> Priors:
        """Priors of levels of (height, width)."""
        anchors = self.head.spec.num_anchors
        corners, strides = grid_cells(sizes, self.config.strides, device)
        levels = self.cell_priors(corners, strides).split([height * width * anchors for height, width in sizes])
        return Priors.of(list(levels), self.config.strides, cell_corners(corners, anchors))

    def valid_priors(self, priors: Priors, image_sizes: Tensor) -> Tensor:
        """(N, P) bool: False for priors beyond an image's own size rounded up to `size_divisor`."""
        return valid_cells(priors.corners, image_sizes, self.config.size_divisor)

    def class_weights(self, valid: Tensor) -> Tensor:
        """(N, P) validity of the priors -> their class weights before any assignment."""
        return valid.float()

    def get_input_embeddings(self) -> nn.Conv2d:
        """The first convolution: what transformers hooks to have gradients flow into a frozen backbone."""
        return next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        self.backbone.checkpoint_activations(enable)
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers skips modules without parameters of their own, so that this goes by leaves.
        if hasattr(module, "init_non_persistent_buffers"):
            # timm's buffers that no checkpoint holds (Swin's relative positions) come off the meta device as garbage.
            module.init_non_persistent_buffers()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LevelScales):
            for scale in module.parameters():
                init.ones_(scale)
        elif isinstance(module, (FPNConv, HeadConv)):
            if isinstance(module, FPNConv):
                init.xavier_uniform_(module.weight)
            else:
                init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                # A class probability of 0.01 everywhere at the start (RetinaNet, arXiv 1708.02002, section 4.1).
                init.constant_(module.bias, -math.log(99) if isinstance(module, ClassPredictor) else 0.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            # The backbone's: timm has initialised it, so that this only fills what a broken checkpoint lacks.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, fill in (
                (module.weight, init.ones_),
                (module.bias, init.zeros_),
                (module.running_mean, init.zeros_),
                (module.running_var, init.ones_),
                (module.num_batches_tracked, init.zeros_),
            ):
                if tensor is not None:
                    fill(tensor)


def _map_sizes(levels: list[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in levels]


def unpadded_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(N, 2) float height and width of each image, from a mask (N, H, W) of 1 on the image and 0 on padding."""
    if pixel_mask is None:
        batch, _, height, width = pixel_values.shape
        sides = [pixel_values.new_full((batch, 1), side, dtype=torch.float32) for side in (height, width)]
        return torch.cat(sides, dim=1)
    # Padding is at the bottom and right only, so that the first column and row tell.
    column, row = pixel_mask.select(2, 0).bool(), pixel_mask.select(1, 0).bool()  # bfloat16 counts to 256 only
    return torch.stack([column.sum(dim=1), row.sum(dim=1)], dim=1).float()


def pad_ground_truth(labels: list[dict[str, Tensor]] | dict[str, Tensor], batch: int) -> GroundTruth:
    """Labels of each image, or padded ones of the whole batch -> one padded batch.

    Raises:
        ValueError: if there are not as many labels as images, an image has not as many boxes as classes, or padded
            labels come without a mask.
    """
    if isinstance(labels, Mapping):
        if missing := {"boxes", "class_labels", "mask"} - set(labels):
            raise ValueError(f"padded labels need boxes, class_labels and mask; {', '.join(sorted(missing))} missing")
        truth = GroundTruth(labels["boxes"].float(), labels["class_labels"], labels["mask"])
        given = len(truth.mask)
    else:
        truth, given = None, len(labels)
    if given != batch:
        raise ValueError(f"{given} labels were given for {batch} images; labels is a list with a dict an image.")
    if truth is not None:
        return truth
    for index, label in enumerate(labels):
        if label["boxes"].numel() != 4 * len(label["class_labels"]):
            shapes = tuple(label["boxes"].shape), tuple(label["class_labels"].shape)
            raise ValueError(f"labels: image {index} needs boxes (G, 4) and class_labels (G,), got {shapes}")
    boxes = pad_sequence([label["boxes"].reshape(-1, 4).float() for label in labels], batch_first=True)
    classes = pad_sequence([label["class_labels"] for label in labels], batch_first=True)
    mask = pad_sequence([torch.ones_like(label["class_labels"], dtype=torch.bool) for label in labels], True)
    return GroundTruth(boxes, classes, mask)


def matched_distances(truth: GroundTruth, assignment: Assignment, priors: Priors) -> Tensor:
    """(N, P, 4) pixels from a positive prior's centre to the sides of its box; elsewhere a stride each, so that every
    term computed from it is finite before it is weighted by 0."""
    distances = boxes_to_distances(priors.centers, gather_boxes(truth.boxes, assignment.box_index))
    return torch.where(assignment.positive.unsqueeze(-1), distances, priors.strides)


def class_targets(truth: GroundTruth, assignment: Assignment, logits: Tensor, values: Tensor | None = None) -> Tensor:
    """(N, P, labels), laid out as `logits` are: at the label of a positive prior 1, or its one of `values` (N, P); 0
    elsewhere."""
    labels = gather_labels(truth.labels, assignment.box_index).unsqueeze(-1)
    values = assignment.positive.float() if values is None else values * assignment.positive
    return torch.zeros_like(logits).scatter_(-1, labels, values.unsqueeze(-1))


def positives_per_image(positive: Tensor) -> Tensor:
    """Positives (N, P) summed over images, each image counting at least 1: the class normaliser on this rank."""
    return positive.sum(dim=1).clamp(min=1).sum().float()
