"""The dense detector that every architecture is made of: backbone -> FPN -> head -> losses or predictions."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..utils.label_checks import check_relative_labels
from .anchors import grid_cells, per_prior, valid_cells
from .assigners import Assignment
from .backbone import Backbone
from .box_coding import distances_to_boxes, logits_of_product
from .configuration import DenseDetectorConfig
from .fpn import FPN, FPNConv
from .head import ClassPredictor, DenseHead, HeadConv, HeadOutput, HeadSpec, LevelScales, flatten_levels
from .outputs import DenseDetectorOutput, DetectionLosses, GroundTruth, HeadPredictions, Priors
from .standalone import Standalone
from .targets import Labels, box_frames, pad_ground_truth, padded_labels, relative_boxes, unpadded_sizes

logger = logging.getLogger(__name__)


class DenseDetector(Standalone, PreTrainedModel):  # type: ignore[misc] # transformers wraps its push_to_hub
    """Base of the detectors. A detector gives its head's shape, priors, decoding, assignment and losses; everything
    else is here."""

    config: DenseDetectorConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    # With device_map: parts that hand maps across each other stay on one device.
    _no_split_modules = ["Backbone", "FPN", "DenseHead"]  # noqa: RUF012 - transformers' name and type
    accepts_loss_kwargs = False  # the losses are per-batch means: the Trainer divides them when it accumulates

    def __init__(self, config: DenseDetectorConfig, pretrained_backbone: bool = False):
        super().__init__(config)
        self.backbone = Backbone(config, pretrained=pretrained_backbone)
        self.fpn = FPN(config, self.backbone.channels)
        self.head = DenseHead(self.head_spec(config))
        # Of the instance: add_model_tags() appends to it.
        self.model_tags = ["object-detection", "crosskd", config.model_type]
        self._checked: set[str] = set()  # what was looked at in a first batch, see `_is_due`
        self.post_init()

    # What a detector provides -----------------------------------------------------------------------------------

    @staticmethod
    def head_spec(config: Any) -> HeadSpec:
        """Shape of the detector's head, by its own configuration."""
        raise NotImplementedError

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        """Anchors (P, 4) or points (P, 2) of cells, given their corners (cells, 2) xy and strides (cells, 1)."""
        raise NotImplementedError

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Box outputs (N, P, box_channels) -> pixels (N, P, 4) from a prior's centre to left, top, right, bottom."""
        raise NotImplementedError

    def bins(self, boxes: Tensor) -> Tensor | None:
        """Box outputs (N, P, box_channels) -> logits (N, P, 4, bins) of each side's distance, in strides; None for a
        detector that predicts no distributions."""
        return None

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        """Which prior learns which box.

        Args:
            priors: of the batch.
            valid: (N, P), False for priors beyond an image's own area.
            truth: the padded boxes.
            predictions: of the batch, for assigners that look at them.
        """
        raise NotImplementedError

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        """The detector's loss terms. What they are divided by is averaged over processes where the reference does."""
        raise NotImplementedError

    def matching_rule(self) -> tuple:
        """What the priors and their assignment depend on: two detectors with the same one label the same priors."""
        raise NotImplementedError

    # What they share --------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DenseDetectorOutput | tuple:
        """Detect, and compute the losses if there are labels.

        Args:
            pixel_values: (N, 3, H, W) normalised images, padded at the bottom and right.
            pixel_mask: (N, H, W), 1 on the image, 0 on padding; None: as `size` of the labels says, or no padding.
            labels: as DETR's, a dict per image with `class_labels` (G,) int64 and `boxes` (G, 4) cxcywh, relative to
                the image without padding, or to `size`, (height, width), where that is given. Or, as the collator
                makes them, one dict of the whole batch, padded: `class_labels` (N, G), `boxes_xyxy` (N, G, 4) in
                pixels of `pixel_values`, `mask` (N, G) bool.
            output_hidden_states: also give the maps of backbone and FPN; None takes the configuration's value.
            return_dict: False gives a tuple of what isn't None; None takes the configuration's value.

        Raises:
            ValueError: if labels and images differ in number, or labels can't be right (see
                `check_relative_labels`; only lists of the first batch are looked at, and compiled none).
        """
        maps = self.backbone(pixel_values.to(self.dtype))
        features = self.fpn(maps)
        head = self.head(features)
        # Only the networks run in half precision: a pixel of a large box is more than bfloat16 resolves.
        with torch.autocast(pixel_values.device.type, enabled=False):
            predictions, priors = self.flatten(head), self.priors(head)
            image_sizes = self.image_sizes(pixel_values, pixel_mask, labels)
            loss = loss_dict = None
            if labels is not None:
                losses, _ = self.losses(predictions, priors, image_sizes, labels)
                loss_dict = {name: term.sum() for name, term in losses.terms.items()}
                loss = functools.reduce(torch.add, loss_dict.values())
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            hidden_states = (*maps, *features) if output_hidden_states else None
            output = self.output(predictions, priors, image_sizes, loss, loss_dict, hidden_states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def output(
        self,
        predictions: HeadPredictions,
        priors: Priors,
        image_sizes: Tensor,
        loss: Tensor | None = None,
        loss_dict: dict[str, Tensor] | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
    ) -> DenseDetectorOutput:
        """What `forward` returns.

        Args:
            predictions, priors: of the batch.
            image_sizes: (N, 2) height and width of each image without padding.
            loss, loss_dict, hidden_states: see `DenseDetectorOutput`.
        """
        # Tensors, since the pipeline divides every output among the images.
        sizes = [image_sizes.new_full((len(image_sizes), 1), n, dtype=torch.long) for n in priors.level_sizes]
        logits, centerness = predictions.logits, predictions.centerness
        # At once: a field that is set later is no key of a `ModelOutput`, nor in its tuple.
        return DenseDetectorOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits if centerness is None else logits_of_product(logits, centerness.unsqueeze(-1)),
            pred_boxes=relative_boxes(self.decode(predictions.boxes, priors), image_sizes),
            centerness=centerness,
            level_sizes=torch.cat(sizes, dim=1),
            hidden_states=hidden_states,
        )

    def losses(
        self, predictions: HeadPredictions, priors: Priors, image_sizes: Tensor, labels: Labels
    ) -> tuple[DetectionLosses, GroundTruth]:
        """The losses of a batch, and its padded ground truth.

        Args:
            predictions, priors: of the batch.
            image_sizes: (N, 2) height and width of each image without padding.
            labels: see `forward`.

        Raises:
            ValueError: see `pad_ground_truth` and `check_relative_labels`.
        """
        truth = pad_ground_truth(labels, image_sizes)
        # Padded ones of a batch come from the collator, which has looked at them on the CPU.
        if not isinstance(labels, Mapping) and self._is_due("labels", truth.boxes):
            check_relative_labels(*padded_labels(labels), self.config.num_labels)
            self._checked.add("labels")
        assignment = self.assign(priors, self.valid_priors(priors, image_sizes), truth, predictions)
        return self.detection_losses(predictions, priors, assignment, truth), truth

    def image_sizes(self, pixel_values: Tensor, pixel_mask: Tensor | None, labels: Labels | None = None) -> Tensor:
        """(N, 2) height and width of each image without padding, as its mask has it, or else `size` of its label.

        Warns once of padding that neither tells of.

        Raises:
            ValueError: a mask has another shape than the images, or a `size` is larger than they are.
        """
        frames = box_frames(labels)
        if frames is not None and self._is_due("sizes", frames):
            height, width = pixel_values.shape[2:]
            if (frames > frames.new_tensor([height, width])).any() or (frames < 1).any():
                raise ValueError(
                    f"labels: size is {frames.int().tolist()} for pixel_values of {height} x {width}; it must be the "
                    "height and width of the image in pixel_values (orig_size is that of the file)"
                )
            self._checked.add("sizes")
        if pixel_mask is None and frames is not None and len(frames) == len(pixel_values):
            return frames.to(pixel_values.device)
        if pixel_mask is None:
            self._warn_of_padding(pixel_values)
        elif self._is_due("mask", pixel_mask) and pixel_mask.shape != (len(pixel_values), *pixel_values.shape[2:]):
            shapes = tuple(pixel_mask.shape), tuple(pixel_values.shape)
            raise ValueError(f"pixel_mask is {shapes[0]}, pixel_values {shapes[1]}; it must be (N, H, W).")
        return unpadded_sizes(pixel_values, pixel_mask)

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

    def decode(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Box outputs (N, P, box_channels) -> boxes (N, P, 4) xyxy pixels, not clipped."""
        return distances_to_boxes(priors.centers, self.distances(boxes, priors))

    def flatten(self, head: HeadOutput) -> HeadPredictions:
        """The head's maps as (N, P, ...) tensors in fp32."""
        spec = self.head.spec
        return HeadPredictions(
            logits=flatten_levels(head.logits, spec.num_labels).float(),
            boxes=flatten_levels(head.boxes, spec.box_channels).float(),
            centerness=None if head.centerness is None else flatten_levels(head.centerness, 1).squeeze(-1).float(),
        )

    def priors(self, head: HeadOutput) -> Priors:
        """Priors of the head's maps: made anew for each batch, in some 40 operators and without a copy."""
        sizes = [(level.shape[2], level.shape[3]) for level in head.logits]
        anchors = self.head.spec.num_anchors
        corners, strides = grid_cells(sizes, self.config.strides, head.logits[0].device)
        level_sizes = [height * width * anchors for height, width in sizes]
        cells = (per_prior(values, anchors) for values in (strides, corners))
        return Priors.of(self.cell_priors(corners, strides), level_sizes, *cells)

    def valid_priors(self, priors: Priors, image_sizes: Tensor) -> Tensor:
        """(N, P) bool: False for priors beyond an image's own size rounded up to `size_divisor`."""
        return valid_cells(priors.corners, image_sizes, self.config.size_divisor)

    def class_weights(self, valid: Tensor) -> Tensor:
        """(N, P) validity of the priors -> their class weights before any assignment."""
        return valid.float()

    def _auto_classes(self) -> tuple[Any, dict[str, type]]:
        return self.config, {"AutoConfig": type(self.config), "AutoModelForObjectDetection": type(self)}

    def get_input_embeddings(self) -> nn.Conv2d:
        """The first convolution: what transformers hooks to have gradients flow into a frozen backbone."""
        return next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        self.backbone.checkpoint_activations(enable)
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers skips modules without parameters of their own, so that this goes by leaves.
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:
            # timm's buffers that no checkpoint holds (Swin's relative positions) come off the meta device as garbage.
            init_buffers()
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
        else:  # norms; the backbone's layers only where a broken checkpoint lacks them: timm has initialised them
            super()._init_weights(module)
