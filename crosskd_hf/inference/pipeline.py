"""transformers' object-detection pipeline for these detectors, with batches of images of different sizes.

transformers' own joins `pixel_values` of one shape only, and would fail on such a batch. Importing the package puts
this class in its place for the task; detectors that aren't this package's get transformers' pipeline as before.
"""

import base64
import os
from typing import Any

from PIL import Image
from transformers import ObjectDetectionPipeline, PreTrainedModel
from transformers.image_utils import httpx  # what its own pipelines fetch with: httpx, or httpx2 since some version
from transformers.pipelines import PIPELINE_REGISTRY

from ..models.base import DenseDetector
from ..utils.images import LARGEST_FILE, ImageError, load_rgb, to_rgb, upright
from ..utils.messages import first_line
from ..utils.redact import without_credentials
from .detect import detect_images

TASK = "object-detection"


class DenseDetectionPipeline(ObjectDetectionPipeline):
    """`pipeline("object-detection", model=...)`: inputs and outputs are those of `ObjectDetectionPipeline`.

    Its detections are those of `crosskd predict`: files are read in the same way, and images of a batch don't change
    each other's detections.
    """

    def __new__(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> ObjectDetectionPipeline:
        if not isinstance(model, DenseDetector):
            return ObjectDetectionPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def preprocess(self, image: "str | Image.Image", timeout: float | None = None) -> dict[str, Any]:
        """What the model takes of an image, in a dict of its own: the pipeline would join tensors of a batch.

        Args:
            image: path of a file, URL, base64 with or without `data:image/...;base64,` before it, or opened image.
            timeout: seconds to wait for a server; None waits for ever.

        Raises:
            ImageError: what can't be fetched or read.
            TypeError: none of these.
        """
        image = upright(to_rgb(image)) if isinstance(image, Image.Image) else _read(image, timeout)
        inputs = dict(self.image_processor(image, return_tensors="pt"))
        return {"inputs": inputs, "target_size": (image.height, image.width)}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        inputs, sizes = model_inputs["inputs"], model_inputs["target_size"]
        if isinstance(inputs, dict):  # not in a batch
            inputs, sizes = [inputs], [sizes]
        return {"detections": detect_images(self.model, self.image_processor, inputs, sizes)}

    def postprocess(self, model_outputs: dict[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
        """The detections of one image with a score above `threshold`."""
        detected = model_outputs["detections"]
        detected = detected[0] if isinstance(detected, list) else detected
        rows = zip(detected["scores"].tolist(), detected["labels"].tolist(), detected["boxes"], strict=True)
        return [
            {"score": score, "label": self.model.config.id2label[label], "box": self._get_bounding_box(box)}
            for score, label, box in rows
            if score > threshold
        ]


def _read(source: str, timeout: float | None) -> Image.Image:
    """A file, URL or base64 as `load_rgb` reads it. transformers' `load_image` has Pillow start programs (EPS)."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"an image must be a path, a URL, base64 or a PIL image, got a {type(source).__name__}")
    source = os.fspath(source)
    is_url = source.startswith(("http://", "https://"))
    if is_url or os.path.isfile(source):
        try:
            return load_rgb(_fetched(source, timeout) if is_url else source)
        except ImageError as error:  # it has the text that follows the name
            raise ImageError(f"{without_credentials(source) if is_url else source} {error}") from error
    try:
        return load_rgb(_decoded(source))
    except ValueError as error:  # what isn't base64, too
        raise ImageError(f"is no file, no URL, and no image in base64 ({first_line(error)})") from error


def _fetched(url: str, timeout: float | None) -> bytes:
    """The content of an address. It isn't asked to pack it: what is small packed could be large."""
    content = bytearray()
    headers = {"Accept-Encoding": "identity"}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if not response.is_success:
                raise ImageError(f"can't be fetched (status {response.status_code})")
            for chunk in response.iter_bytes():
                content += chunk
                _check_length(len(content))
    except httpx.InvalidURL:  # quotes it, with its password
        raise ImageError("can't be fetched (the address isn't valid)") from None
    except httpx.HTTPError as error:
        raise ImageError(f"can't be fetched ({without_credentials(first_line(error))})") from error
    return bytes(content)


def _decoded(text: str) -> bytes:
    encoded = text.partition(",")[2] if text.startswith("data:image/") else text
    _check_length(len(encoded) // 4 * 3 - encoded[-2:].count("="))
    return base64.decodebytes(encoded.encode())


def _check_length(length: int) -> None:
    if length > LARGEST_FILE:
        raise ImageError(f"has more than {LARGEST_FILE:,} bytes, which no image has that is read")


def register() -> None:
    """Have `pipeline("object-detection")` take this class, unless somebody else's has been registered for it."""
    task = PIPELINE_REGISTRY.supported_tasks[TASK]
    known = ("transformers.pipelines.object_detection.ObjectDetectionPipeline", ObjectDetectionPipeline)
    if task["impl"] in known:
        task["impl"] = DenseDetectionPipeline
