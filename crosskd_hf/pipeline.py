"""transformers' object-detection pipeline for these detectors, with batches of images of different sizes.

transformers' own joins `pixel_values` of one shape only, and would fail on such a batch. Importing the package puts
this class in its place for the task; detectors that aren't this package's get transformers' pipeline as before.
"""

import os
from typing import Any

from PIL import Image
from transformers import ObjectDetectionPipeline, PreTrainedModel
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from .data.images import load_rgb, to_rgb, upright
from .inference import detect_images
from .models.modeling_dense import DenseDetector

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

        Raises:
            ImageError: a file that can't be read.
        """
        if isinstance(image, Image.Image):
            image = to_rgb(upright(image))
        elif os.path.isfile(image):
            image = load_rgb(image)
        else:  # a URL, or an image in base64
            image = load_image(image, timeout=timeout)
        inputs = dict(self.image_processor(image, return_tensors="pt"))
        return {"inputs": inputs, "target_size": (image.height, image.width)}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        inputs, sizes = model_inputs["inputs"], model_inputs["target_size"]
        if isinstance(inputs, dict):  # not in a batch
            inputs, sizes = [inputs], [sizes]
        return {"detections": detect_images(self.model, self.image_processor, inputs, sizes)}

    def postprocess(self, model_outputs: dict[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
        """The detections of one image with a score above `threshold`."""
        found = model_outputs["detections"]
        found = found[0] if isinstance(found, list) else found
        rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"], strict=True)
        return [
            {"score": score, "label": self.model.config.id2label[label], "box": self._get_bounding_box(box)}
            for score, label, box in rows
            if score > threshold
        ]


def register() -> None:
    """Have `pipeline("object-detection")` take this class, unless somebody else's has been registered for it."""
    task = PIPELINE_REGISTRY.supported_tasks[TASK]
    known = ("transformers.pipelines.object_detection.ObjectDetectionPipeline", ObjectDetectionPipeline)
    if task["impl"] in known:
        task["impl"] = DenseDetectionPipeline
