"""Detections of video files: videos with boxes drawn, and a JSON file for each. Needs PyAV (`pip install av`).

Beside a video `clip.mp4` there is then `clip.mp4.json`, a list of what is drawn, one object a box: {frame, seconds,
category_id, category, bbox, score}. Frames are counted from 0, `seconds` is the frame's time in the video, `bbox` is
[x, y, width, height] in pixels of the upright frame, and category_id the model's label, counted from 0.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.escaping import printable
from ..utils.files import replacing
from ..utils.messages import first_line
from ..utils.progress import Progress
from .image_files import ImageEntry, PredictionError, relative_names, words
from .predict import Sample, check_numbers, detect
from .predict_files import load_for_prediction
from .prediction_writer import coco_results, draw_prediction, results_file

if TYPE_CHECKING:
    import av

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
VIDEOS_FOLDER = "videos"


class VideoError(PredictionError):
    """A file that can't be read as a video."""


@dataclass(frozen=True)
class VideoWritten:
    """What was written of a video: its file, the JSON file beside it, and the numbers of frames and drawn boxes."""

    video: Path
    results: Path
    frames: int
    drawn: int


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[Path]]:
    """What is no video, and the video files that sources and patterns name, each once. Folders stay what they are."""
    others, videos = [], {}
    for source in sources:
        if Path(source).suffix.lower() in VIDEO_EXTENSIONS and not Path(source).expanduser().is_dir():
            path = Path(source).expanduser()
            named = [path] if path.exists() or not glob.has_magic(source) else map(Path, glob.glob(str(path)))
            videos |= {video.absolute(): video for video in named}
        else:
            others.append(source)
    return others, sorted(videos.values())


def check_videos(videos: Sequence[Path], output: Path) -> list[Path]:
    """Where each video is written to.

    Raises:
        PredictionError: PyAV isn't installed; a video isn't there, or would be written over; something else lies where
            one is written to.
    """
    _library()
    targets = [output / VIDEOS_FOLDER / _mp4(name) for name in relative_names(videos)] if videos else []
    sources = {video.resolve() for video in videos}
    for video, target in zip(videos, targets, strict=True):
        if not video.is_file():
            raise PredictionError(f"there is no video {printable(video)}.")
        if target.resolve() in sources:
            raise PredictionError(f"{target} is a video that is read: name another folder with --output-dir.")
        if target.exists() and not results_of(target).exists():
            raise PredictionError(f"{target} isn't of an earlier call: name another folder with --output-dir.")
    return targets


def predict_videos(
    model: str,
    videos: Sequence[Path],
    targets: Sequence[Path],
    *,
    threshold: float = 0.3,
    batch_size: int = 4,
    device: str | None = None,
    stop_at_errors: bool = False,
) -> tuple[list[VideoWritten], list[str]]:
    """Write a model's predictions of videos, one after another.

    Args:
        model: folder or Hub id of a saved detector.
        videos, targets: see `check_videos`.
        threshold, batch_size: see `predict_video`.
        device: to compute on; None is a GPU if there is one.
        stop_at_errors: end at the first video that can't be read, instead of leaving it out.

    Returns:
        what was written, and why others were left out.

    Raises:
        PredictionError: wrong numbers, a device that can't be used, results that can't be written.
        CheckpointError: the model or its image processor can't be loaded.
    """
    check_numbers(batch_size, 0, threshold)
    detector, processor = load_for_prediction(model, device)
    written, left_out = [], []
    for video, target in zip(videos, targets, strict=True):
        try:
            done = predict_video(detector, processor, video, target, threshold=threshold, batch_size=batch_size)
        except VideoError as error:
            if stop_at_errors:
                raise
            left_out.append(str(error))
        else:
            written.append(done)
    return written, left_out


def predict_video(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    source: Path,
    target: Path,
    *,
    threshold: float = 0.3,
    batch_size: int = 4,
) -> VideoWritten:
    """Write a model's predictions of a video. In memory is one batch of frames.

    The new video has the size, the frames and their times of the old one, and no sound. Frames of odd width or height
    lose their last column or row, which H.264 can't hold.

    Args:
        model, processor, batch_size: see `predict`.
        source: video file.
        target: of the video with boxes, MP4; the JSON file is written beside it.
        threshold: boxes with a higher score are drawn and listed.

    Raises:
        VideoError: the video can't be read.
        PredictionError: PyAV isn't installed, or the results can't be written. Earlier ones are then as they were.
    """
    library = _library()
    names, rows = model.config.id2label, results_of(target)
    same = {label: label for label in names}
    model.eval()
    frames = drawn = 0
    try:
        with (
            library.open(str(source)) as video,
            results_file(rows) as add,
            replacing(target) as temporary,
            library.open(str(temporary), "w", format="mp4") as written,
            Progress(f"predict {printable(source.name)}", _stream(video).frames or None, "frames") as bar,
        ):
            encoder = _Encoder(written, _stream(video))
            images = _frames(video)
            while batch := list(islice(images, batch_size)):
                samples = [Sample(source, image, processor(image, return_tensors="pt")) for _, image in batch]
                for (frame, _), prediction in zip(batch, detect(model, processor, samples, threshold), strict=True):
                    time = {"frame": frames, "seconds": round(float(frame.time or 0), 6)}
                    found = coco_results(prediction, ImageEntry(frames, source.name), names, same, threshold)
                    add(
                        [
                            time | {key: row[key] for key in ("category_id", "category", "bbox", "score")}
                            for row in found
                        ]
                    )
                    encoder.add(draw_prediction(prediction, names, threshold), frame)
                    frames, drawn = frames + 1, drawn + len(found)
                    bar.update()
            if not frames:
                raise VideoError(f"{printable(source)} has no frame.")
            encoder.finish()
    except library.FFmpegError as error:
        raise VideoError(f"{printable(source)} can't be read as a video ({first_line(error)}).") from error
    except OSError as error:
        raise PredictionError(f"{target} can't be written ({words(error)}).") from error
    return VideoWritten(target, rows, frames, drawn)


def results_of(video: Path) -> Path:
    """The JSON file beside a written video."""
    return video.with_name(f"{video.name}.json")


def _mp4(name: str) -> str:
    return name if name.lower().endswith(".mp4") else f"{name}.mp4"


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise PredictionError('videos need PyAV: pip install av, or pip install -e ".[video]".') from error
    return av


def _stream(video: "av.container.InputContainer") -> "av.VideoStream":
    if not video.streams.video:
        raise VideoError(f"{printable(video.name)} has no pictures, only sound.")
    return video.streams.video[0]


def _frames(video: "av.container.InputContainer") -> Iterator[tuple["av.VideoFrame", Image.Image]]:
    """Each frame, and its picture as people see it."""
    for frame in video.decode(_stream(video)):
        image = frame.to_image()
        yield frame, image.rotate(frame.rotation, expand=True) if frame.rotation else image


class _Encoder:
    """Pictures -> H.264, at the times of other frames."""

    def __init__(self, container: "av.container.OutputContainer", like: "av.VideoStream") -> None:
        library = _library()
        codec = "libx264" if "libx264" in library.codecs_available else "mpeg4"
        self.library, self.container = library, container
        self.stream = container.add_stream(codec, rate=like.average_rate or 25)
        self.stream.pix_fmt = "yuv420p"  # the one that every player knows
        self.time_base = like.time_base
        self.started = False

    def add(self, picture: Image.Image, frame: "av.VideoFrame") -> None:
        """Encode a picture."""
        if not self.started:
            self.stream.width, self.stream.height = (side - side % 2 for side in picture.size)
            self.stream.codec_context.time_base = self.time_base
            self.started = True
        picture = picture.crop((0, 0, self.stream.width, self.stream.height))
        new = self.library.VideoFrame.from_image(picture)
        new.pts, new.time_base = frame.pts, self.time_base
        self.container.mux(self.stream.encode(new))

    def finish(self) -> None:
        """Encode what is left."""
        self.container.mux(self.stream.encode())
