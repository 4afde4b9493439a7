"""A page in the browser: drop an image, and see what several models find in it, side by side. Needs gradio.

In a Hub Space, `app.py` is these two lines (see `examples/space`):

    from crosskd_hf.studies.show import show
    show(["user/student", "user/teacher"], host="0.0.0.0")

What one visitor uploads is kept for an hour in a folder of this process, under names that nobody can guess, and never
shown to another one. Only files in that folder are opened, whatever a request names. A process has one page.
"""

import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..inference.detect import detect_images
from ..inference.predict_files import load_for_prediction
from ..inference.prediction_writer import Prediction, draw_prediction
from ..models.postprocess import NonFiniteOutputError
from ..utils.escaping import printable
from ..utils.images import ImageError, load_rgb

if TYPE_CHECKING:
    import gradio

LARGEST_UPLOAD = "64mb"
SHOWN_SIDE = 1600  # pixels; larger images are made smaller for the browser, after the models have seen them whole
KEPT_SECONDS = 3600
LEAST_SCORE = 0.05  # what the slider begins with


class ShowError(ValueError):
    """A page that can't be made, and what to do about it."""


@dataclass(frozen=True)
class ShownModel:
    """A detector, its image processor, and what the page calls it."""

    name: str
    detector: Any
    processor: Any

    def detect(self, image: Image.Image) -> tuple[dict[str, Any], float]:
        """See `detect_images`; and the seconds that it took, with the preparation of the image."""
        start = time.perf_counter()
        inputs = self.processor(image, return_tensors="pt")
        (found,) = detect_images(self.detector, self.processor, [inputs], [(image.height, image.width)], LEAST_SCORE)
        return found, time.perf_counter() - start


@dataclass
class Seen:
    """What one visitor sees: the image, made smaller, and for each model its predictions on it, and seconds.

    Attributes:
        scale: pixels of `predictions` in a pixel of the image that was uploaded.
    """

    scale: float = 1.0
    predictions: list[Prediction] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def load_models(sources: Sequence[str], device: str | None = None) -> list[ShownModel]:
    """Load detectors, and run each once, so that the first visitor doesn't wait for it.

    Args:
        sources: folders or Hub ids; their last parts are the names, longer where those are the same.
        device: to compute on; None is a GPU if there is one.

    Raises:
        ShowError: none is named.
        CheckpointError, PredictionError: one can't be loaded.
    """
    if not sources:
        raise ShowError("there is no model to show: name a folder or a Hub id.")
    models = []
    for name, source in zip(short_names(sources), sources, strict=True):
        model = ShownModel(name, *load_for_prediction(source, device))
        model.detector.eval()
        model.detect(Image.new("RGB", (64, 64)))
        models.append(model)
    return models


def short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path or Hub id; where two are the same, numbered. Folders above it stay private."""
    paths = [Path(source).expanduser() for source in sources]
    last = [printable(path.resolve().name if path.exists() else str(path)) for path in paths]
    times, seen = Counter(last), Counter[str]()
    names = []
    for name in last:
        seen[name] += 1
        names.append(name if times[name] == 1 else f"{name} ({seen[name]})")
    return names


def look(models: Sequence[ShownModel], path: str) -> Seen:
    """What models find in an image file.

    Raises:
        ImageError: it can't be read.
        NonFiniteOutputError: a model gives NaN.
    """
    image = load_rgb(path)
    scale = min(1.0, SHOWN_SIDE / max(image.size))
    shown = image.resize([max(1, round(scale * side)) for side in image.size]) if scale < 1 else image
    seen = Seen(scale)
    for model in models:
        found, seconds = model.detect(image)
        seen.predictions.append(Prediction(Path(), shown, found["scores"], found["labels"], scale * found["boxes"]))
        seen.seconds.append(seconds)
    return seen


def pictures(models: Sequence[ShownModel], seen: Seen, threshold: float) -> list[tuple[Image.Image, str]]:
    """Of each model a picture with the boxes above a threshold, and a line about it."""
    made = []
    for model, prediction, seconds in zip(models, seen.predictions, seen.seconds, strict=True):
        count = int((prediction.scores > threshold).sum())
        text = f"{count} {'box' if count == 1 else 'boxes'}, {1000 * seconds:.0f} ms"
        made.append((draw_prediction(prediction, model.detector.config.id2label, threshold), text))
    return made


def boxes_as_json(models: Sequence[ShownModel], seen: Seen, threshold: float) -> str:
    """What is drawn, in pixels of the image that was uploaded: model -> list of {label, score, box}, box as xyxy."""
    content = {}
    for model, prediction in zip(models, seen.predictions, strict=True):
        names, keep = model.detector.config.id2label, prediction.scores > threshold
        values = (prediction.labels[keep], prediction.scores[keep], prediction.boxes[keep] / seen.scale)
        rows = zip(*(value.tolist() for value in values), strict=True)
        content[model.name] = [
            {"label": names[label], "score": round(score, 4), "box": [round(side, 1) for side in box]}
            for label, score, box in rows
        ]
    return json.dumps(content, indent=1)


class _Page:
    """What the page does for its visitors; each has a `Seen` of their own.

    Args:
        models: that are shown.
        folder: of uploads and of files to download.
        gradio: the module.
    """

    def __init__(self, models: Sequence[ShownModel], folder: Path, gradio: Any) -> None:
        self.models, self.folder, self.gradio = models, folder.resolve(), gradio

    def look(self, path: str | None) -> Seen:
        """What models find in an upload; nothing, and a warning, if it can't be read."""
        try:
            return look(self.models, own_file(path, self.folder)) if path else Seen()
        except (ImageError, NonFiniteOutputError) as error:
            self.gradio.Warning(f"This file {error}." if isinstance(error, ImageError) else str(error))
            return Seen()

    def draw(self, seen: Seen, threshold: float) -> list[Any]:
        """Values of the pictures, of the lines below them, and of the button."""
        if not seen.predictions:
            return [None, ""] * len(self.models) + [self.gradio.DownloadButton(value=None, interactive=False)]
        parts = [part for pair in pictures(self.models, seen, threshold) for part in pair]
        content = boxes_as_json(self.models, seen, threshold)
        file = self.folder / sha256(content.encode()).hexdigest() / "boxes.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return [*parts, self.gradio.DownloadButton(value=str(file), interactive=True)]


def own_file(path: str, folder: Path) -> str:
    """A file of a folder. gradio trusts what some requests name.

    Raises:
        ImageError: it lies elsewhere, whether it is there or not.
    """
    if not Path(path).resolve().is_relative_to(folder.resolve()):
        raise ImageError("was not uploaded here")
    return path


def build_page(sources: Sequence[str], device: str | None = None) -> "gradio.Blocks":
    """The page of some models, as an app of gradio.

    Args:
        sources, device: see `load_models`.

    Raises:
        ShowError: gradio isn't installed, or see `load_models`, as for other errors.
    """
    # Uploads and pictures: one folder a process, that others on this machine can't read.
    folder = tempfile.TemporaryDirectory(prefix="crosskd-show-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ShowError('the page needs gradio: pip install gradio, or pip install -e ".[show]".') from error
    does = _Page(load_models(sources, device), Path(folder.name), gradio)
    with gradio.Blocks(title="Detectors side by side", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        state = gradio.State(Seen(), time_to_live=KEPT_SECONDS)
        with gradio.Row():
            image = gradio.Image(label="Your image", type="filepath", sources=["upload", "clipboard"], height=320)
            # As it was uploaded: `look` tells in words what can't be read. (gradio writes a file beside the module of
            # each class that is derived from its own.)
            image.preprocess = lambda payload: payload.path if payload else None
            with gradio.Column():
                threshold = gradio.Slider(LEAST_SCORE, 1, 0.3, step=0.05, label="Show boxes with a score above")
                download = gradio.DownloadButton("Download the boxes (JSON)", interactive=False)
        outputs: list[Any] = []
        with gradio.Row():
            for model in does.models:
                with gradio.Column(min_width=320):
                    buttons = ["download", "fullscreen"]
                    outputs.append(gradio.Image(label=model.name, format="png", interactive=False, buttons=buttons))
                    outputs.append(gradio.Markdown())
        outputs.append(download)
        shown = {"inputs": [state, threshold], "outputs": outputs, "show_progress": "hidden"}
        looked = image.change(does.look, image, state, api_visibility="private")
        looked.success(does.draw, **shown, api_visibility="private")
        threshold.change(does.draw, **shown, api_visibility="private", trigger_mode="always_last")
    page.folder_of_uploads = folder  # removed with the page
    return page


def show(sources: Sequence[str], host: str = "127.0.0.1", port: int | None = None, device: str | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        sources, device: see `load_models`.
        host: address to listen on.
        port: of it; None takes the first free one from 7860 on.

    Raises:
        ShowError: see `build_page`; or the port is taken.
    """
    page = build_page(sources, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and the uploads are removed
    try:
        page.launch(server_name=host, server_port=port, max_file_size=LARGEST_UPLOAD, share=False, footer_links=[])
    except OSError as error:
        raise ShowError(f"the page can't listen on {host}:{port or 7860} ({error}). Name another --port.") from error
    finally:
        page.close()
        page.folder_of_uploads.cleanup()
