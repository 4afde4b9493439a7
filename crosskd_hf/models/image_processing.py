"""The image processor of the dense detectors: resize, normalise, pad."""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from PIL import Image
from torchvision.ops import box_convert
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from ..utils.images import load_rgb, resized_size, to_rgb
from .configuration import DenseDetectorConfig, check_number
from .postprocess import select_detections
from .processor_inputs import as_uint8, channels_can_only_be_last, given_sides, labels_of
from .standalone import Standalone

logger = logging.getLogger(__name__)

LEVELS = 5  # of a dense detector
# Keyword arguments of `DenseDetectorImageProcessor`: grey levels 0..255, channels in the order that the model sees.
RGB_IMAGENET: dict[str, Any] = {
    "image_mean": [123.675, 116.28, 103.53],
    "image_std": [58.395, 57.12, 57.375],
    "do_flip_channel_order": False,
}
BGR_CAFFE: dict[str, Any] = {
    "image_mean": [102.9801, 115.9465, 122.7717],
    "image_std": [1.0, 1.0, 1.0],
    "do_flip_channel_order": True,
}


def pixel_style(config: DenseDetectorConfig) -> dict[str, Any]:
    """How a detector's backbone wants its pixels: mean, std and channel order of its pretrained weights."""
    if config.backbone_style == "caffe":
        return BGR_CAFFE
    cfg = timm.get_pretrained_cfg(config.backbone)
    if cfg is None:
        return RGB_IMAGENET
    mean, std = ([round(255 * value, 4) for value in values] for values in (cfg.mean, cfg.std))
    return {"image_mean": mean, "image_std": std, "do_flip_channel_order": False}


class DenseDetectorImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_flip_channel_order (`bool`, *optional*, defaults to `False`):
        Give the model BGR instead of RGB; `image_mean` and `image_std` are then in the order BGR too.
    size_divisor (`int`, *optional*, defaults to 32):
        The padded height and width are multiples of this.
    """

    do_flip_channel_order: bool
    size_divisor: int


class DenseDetectorImageProcessor(Standalone, TorchvisionBackend):
    """Prepares images and annotations for a dense detector, and keeps what its predictions are cut down with.

    Images are resized to `size` (bilinear on uint8, no antialiasing), normalised in grey levels 0..255, and padded
    with zeros, right and bottom, to a multiple of `size_divisor` pixels, or to `pad_size`. The ratio of an image is
    kept with a `size` of `shortest_edge` and `longest_edge` or of `max_height` and `max_width`, not with `height` and
    `width`.

    Takes PIL images, arrays and tensors, one or a list, of any sizes. Floating point images may hold grey levels
    0..255 or, as torchvision has it, 0..1; they are rounded to uint8 first.

    Args:
        score_threshold: predictions with a score up to this are dropped.
        nms_threshold: IoU above which a prediction is suppressed by a better one of its class.
        max_candidates: (prior, class) pairs a level that are decoded.
        max_detections: predictions an image.
        **kwargs: of transformers' image processors (`size`, `image_mean`, `image_std`, ...), and
            `do_flip_channel_order`, `size_divisor`. `do_rescale` goes with statistics of 0..1 only; with those of grey
            levels it is left out, and a warning says so. `RGB_IMAGENET` and `BGR_CAFFE` are the two styles in use.

    Raises:
        ValueError: a value that no image can be prepared with, by the name of its key.
    """

    valid_kwargs = DenseDetectorImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012 - transformers copies class attributes
    default_to_square = False
    image_mean = RGB_IMAGENET["image_mean"]
    image_std = RGB_IMAGENET["image_std"]
    do_convert_rgb = True
    do_resize = True
    do_rescale = False  # mean and std are in grey levels
    do_normalize = True
    do_pad = True
    do_flip_channel_order = False
    size_divisor = 32
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012

    def __init__(
        self,
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        max_candidates: int = 1000,
        max_detections: int = 100,
        **kwargs: Unpack[DenseDetectorImageProcessorKwargs],
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[misc] # takes every key of `valid_kwargs`
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_candidates = max_candidates
        self.max_detections = max_detections
        for name in ("score_threshold", "nms_threshold"):
            check_number(name, getattr(self, name))
        for name in ("max_candidates", "max_detections"):
            check_number(name, getattr(self, name), whole=True)
        if self.rescale_factor is not None or self.do_rescale:
            check_number("rescale_factor", self.rescale_factor)
        if self.size_divisor is not None or self.do_pad:
            check_number("size_divisor", self.size_divisor, whole=True)
        if self.do_normalize:
            mean, std = self.image_mean, self.image_std
            check_number("image_mean", mean)
            check_number("image_std", std)
            if not (isinstance(mean, list | tuple) and isinstance(std, list | tuple) and len(mean) == len(std)):
                raise ValueError(
                    f"image_mean is {mean!r}, image_std {std!r}; both must have a number for each channel."
                )
        if self.do_resize:
            given_sides(self.size)  # type: ignore[arg-type] # of __init__ on, it is a SizeDict
        if isinstance(self.resample, int):
            PILImageResampling(self.resample)  # a ValueError names what it isn't

    @classmethod
    def for_model(
        cls, config: DenseDetectorConfig, short_side: int = 800, long_side: int = 1333
    ) -> "DenseDetectorImageProcessor":
        """The processor that goes with a detector: its backbone's pixels, its padding and its NMS threshold.

        Args:
            config: of the detector.
            short_side, long_side: pixels that images are resized to fit.
        """
        return cls(
            size={"shortest_edge": short_side, "longest_edge": long_side},
            size_divisor=config.size_divisor,
            nms_threshold=config.nms_threshold,
            **pixel_style(config),
        )

    def _auto_classes(self) -> tuple[Any, dict[str, type]]:
        return self, {"AutoImageProcessor": type(self)}

    def pixel_style(self) -> dict[str, Any]:
        """What it does to grey levels of 0..255, in the terms of `pixel_style`."""
        channels = len(self.image_mean or [0.0] * 3)
        mean, std = [0.0] * channels, [1.0] * channels
        if self.do_normalize:
            mean, std = list(self.image_mean), list(self.image_std)
        if self.do_rescale and not (self.do_normalize and max(mean) > 1):  # see `_normalize_and_pad`
            mean, std = ([round(value / self.rescale_factor, 4) for value in values] for values in (mean, std))
        return {"image_mean": mean, "image_std": std, "do_flip_channel_order": bool(self.do_flip_channel_order)}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Files by name as training reads them: transformers' own way cuts 16 bits off at 255."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return load_rgb(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One image as (C, h, w) uint8. Raises ValueError for values that are no grey levels."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        if input_data_format is None and channels_can_only_be_last(getattr(image, "shape", ())):
            input_data_format = ChannelDimension.LAST
        return as_uint8(super().process_image(image, do_convert_rgb, input_data_format, device, **kwargs))

    def preprocess(self, images: Any, annotations: Any = None, **kwargs: Any) -> BatchFeature:
        """Images, and their annotations, as a batch for the model; the processor itself is called with the same.

        Args:
            images: one or a list of images or file names.
            annotations: one or a list of COCO's, as DETR's processor takes them: a dict with `image_id` and
                `annotations`, each of which has `bbox` (x, y, width, height in pixels of the image), `category_id`
                (the model's label), `area` and maybe `iscrowd`. Crowd regions and boxes without area are left out.
            **kwargs: what is different from the processor's own settings, and `return_tensors`.

        Returns:
            `pixel_values`, `pixel_mask` (see `normalize_and_pad`) and, with annotations, `labels`: a dict per image
            with `class_labels` (G,), `boxes` (G, 4) cxcywh relative to the image without padding, `area` (G,) in
            pixels of the resized image, `iscrowd` (G,), `image_id` (1,), `size` and `orig_size` (2,), (height, width)
            of the image resized and as it came.

        Raises:
            ValueError: images that can't be prepared, annotations of another format, or not one per image.
        """
        return super().preprocess(images, annotations, **kwargs)

    def resize(
        self,
        image: torch.Tensor,
        size: SizeDict,
        resample: PILImageResampling | int | None = None,
        antialias: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(..., h, w) uint8 resized to the size and with the pixels of training (`SizeToFit`, `resize`).

        Raises:
            ValueError: a `size` that isn't one of the three kinds.
        """
        first, second = given_sides(size)
        if size.shortest_edge:
            first, second = resized_size(image.shape[-2], image.shape[-1], first, second)
        elif size.max_height:
            first, second = get_image_size_for_max_height_width((image.shape[-2], image.shape[-1]), first, second)
        return super().resize(image, SizeDict(height=first, width=second), resample, antialias)

    def normalize_and_pad(self, images: Sequence[torch.Tensor]) -> BatchFeature:
        """A batch from images that are resized already.

        Args:
            images: N tensors (C, h, w), uint8, of any sizes; C is 3, or that of `image_mean`.

        Returns:
            `pixel_values` (N, C, H, W) float32, 0 in the padding, and `pixel_mask` (N, H, W) bool, False there.
            H and W are the largest height and width, rounded up to `size_divisor`.

        Raises:
            ValueError: if an image has another number of channels.
        """
        return self._normalize_and_pad(images, **{name: getattr(self, name) for name in self._valid_kwargs_names})

    def _preprocess(  # type: ignore[override] # named are the arguments that are read here
        self,
        images: list[torch.Tensor],
        annotations: Any,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        resized = [self.resize(image, size, resample) for image in images] if do_resize else images
        batch = self._normalize_and_pad(resized, **kwargs).convert_to_tensors(return_tensors)
        if annotations is not None:
            labels = labels_of(images, annotations, [(image.shape[-2], image.shape[-1]) for image in resized])
            batch["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return batch

    def _normalize_and_pad(
        self,
        images: Sequence[torch.Tensor],
        *,
        do_flip_channel_order: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int,
        **unused: Any,
    ) -> BatchFeature:
        channels = len(image_mean) if do_normalize else images[0].shape[0]
        for image in images:
            if image.shape[0] != channels:
                raise ValueError(
                    f"an image must have {channels} channels, got shape {tuple(image.shape)}; set do_convert_rgb=True"
                )
        height, width = max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)
        if do_pad and pad_size is not None:
            fixed_height, fixed_width = pad_size.height or 0, pad_size.width or 0
            if fixed_height < height or fixed_width < width:
                raise ValueError(f"pad_size {dict(pad_size)} is smaller than the batch, {height} x {width}")
            height, width = fixed_height, fixed_width
        elif do_pad:
            height, width = -(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor
        if not do_pad and any(image.shape[-2:] != (height, width) for image in images):
            raise ValueError("images of different sizes make a batch only with do_pad=True")

        if do_rescale and do_normalize and max(image_mean) > 1:
            logger.warning_once(  # type: ignore[attr-defined] # transformers' addition
                f"do_rescale=True is left out: image_mean {list(image_mean)} is of grey levels 0..255, as they come. "
                "For pixels of 0..1 set image_mean and image_std of 0..1, or do_normalize=False."
            )
            do_rescale = False
        device = images[0].device
        pixel_values = torch.zeros((len(images), channels, height, width), dtype=torch.float32, device=device)
        pixel_mask = torch.zeros((len(images), height, width), dtype=torch.bool, device=device)
        mean, std = (_on_device(tuple(values), device) for values in (image_mean or (), image_std or ()))
        for index, image in enumerate(images):
            h, w = image.shape[-2:]
            region = pixel_values[index, :, :h, :w]  # filled in place: one pass less over memory than a copy each
            region.copy_(image.flip(-3) if do_flip_channel_order else image)
            if do_rescale:
                region.mul_(rescale_factor)
            if do_normalize:
                self.normalize(region, mean, std, inplace=True)
            pixel_mask[index, :h, :w] = True
        return BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask})

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """A model's output as detections.

        Args:
            outputs: of a dense detector, for N images: `logits` and `pred_boxes`, or all of `DenseDetectorOutput`.
                Without `level_sizes` candidates are cut once for all levels, without `centerness` by the score.
            threshold: detections with a score up to this are left out, after non-maximum suppression. 0 keeps the
                up to `max_detections` that COCO's metrics are computed from.
            target_sizes: (N, 2) original (height, width) of each image, to whose pixels the boxes are scaled;
                None leaves them relative to the image, 0..1.

        Returns:
            a dict per image: `scores` (K,), best first, `labels` (K,) int64 and `boxes` (K, 4) xyxy.

        Raises:
            ValueError: if `target_sizes` doesn't have an entry per image.
        """
        logits, level_sizes = outputs.logits, getattr(outputs, "level_sizes", None)
        images, priors = logits.shape[:2]
        targets = [(1.0, 1.0)] * images if target_sizes is None else [tuple(map(float, size)) for size in target_sizes]
        if len(targets) != images:
            raise ValueError(f"target_sizes has {len(targets)} entries for {images} images")
        sizes = outputs.pred_boxes.new_tensor(targets)
        detections = select_detections(
            logits,
            box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * sizes.flip(-1).repeat(1, 2)[:, None],
            sizes,
            getattr(outputs, "centerness", None),
            [priors] if level_sizes is None else level_sizes[0].tolist(),
            score_threshold=self.score_threshold,
            max_candidates=self.max_candidates * (LEVELS if level_sizes is None else 1),
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        return [{name: value[one["scores"] > threshold] for name, value in one.items()} for one in detections]


@functools.lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept, because a GPU's host waits for every copy to it."""
    return torch.tensor(values, dtype=torch.float32, device=device)
