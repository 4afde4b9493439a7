"""Detections of image and video files: pictures with boxes, and COCO results."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd predict`."""
    parser.description = (
        "Detections of image files. Writes OUTPUT_DIR/predictions.json, a list of COCO results {image_id, file_name, "
        "category_id, category, bbox, score}, with bbox [x, y, width, height] in pixels of the upright image, and "
        "OUTPUT_DIR/pictures, the images with the boxes drawn. Without --annotations, image_id is the file "
        "name's stem if all of them are different whole numbers, else 1, 2, ... in the order of the sorted paths, and "
        "category_id is the model's label, counted from 0. Pictures keep the images' names, from the folder on that "
        "all images share. Of a video NAME it writes OUTPUT_DIR/videos/NAME.mp4, with the boxes, and NAME.mp4.json."
    )
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="image or video file or URL, folder of images, or pattern"
    )
    parser.add_argument("--recursive", action="store_true", help="also the images in folders of a folder")
    parser.add_argument("--output-dir", default="predictions", help="where results go (default: predictions)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="boxes with a higher score are drawn (default: 0.3)"
    )
    parser.add_argument(
        "--json-threshold",
        type=float,
        default=0.0,
        help="boxes with a higher score go into predictions.json (default: 0, all that the model's image processor "
        "keeps; AP needs them)",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="images per batch (default: 4)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    parser.add_argument(
        "--format",
        choices=("coco", "yolo", "voc", "csv"),
        default="coco",
        help="beside predictions.json: drawn boxes as OUTPUT_DIR/labels of YOLO or Pascal VOC, or as predictions.csv",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO instances JSON that gives image ids by file_name and category ids by label, so that pycocotools "
        "can score the results; an image that isn't in it is an error",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="skip",
        help="what an image that can't be read does: end the command, or be named at the end (default: skip); if it "
        "is a SOURCE itself, not of a folder or pattern, the status is then 1",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write predictions of image and video files, and tell how many.

    Raises:
        PredictionError, CheckpointError: see `predict_files` and `predict_videos`.
        SystemExit: with status 1, when all else is written, if a file that is a source itself was left out.
    """
    from ..inference.image_files import PredictionError, fetch_images
    from ..inference.predict_videos import check_videos, split_sources

    output = Path(arguments.output_dir)
    sources, videos = split_sources(fetch_images(arguments.sources, output / "downloads"))
    if videos and (arguments.format != "coco" or arguments.annotations):
        raise PredictionError("--format and --annotations are for images: name videos in a call of their own.")
    targets = check_videos(videos, output)
    failed = _predict_images(arguments, sources) if sources else False
    failed |= _predict_videos(arguments, videos, targets) if videos else False
    if failed:
        raise SystemExit(1)


def _predict_images(arguments: argparse.Namespace, sources: list[str]) -> bool:
    """Whether an image was left out that is a source itself."""
    from ..inference.predict_files import predict_files
    from ..utils.progress import say

    written = predict_files(
        arguments.model,
        sources,
        arguments.output_dir,
        recursive=arguments.recursive,
        threshold=arguments.threshold,
        json_threshold=arguments.json_threshold,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        pictures=not arguments.no_pictures,
        format=arguments.format,
        annotations=arguments.annotations,
        device=arguments.device,
        stop_at_errors=arguments.on_error == "stop",
    )
    count, left_out = len(written.detections), written.left_out
    say(
        f"{count} images, {sum(written.detections)} detections, {written.drawn} of them above "
        f"{arguments.threshold}, {count / written.seconds:.1f} images/s"
    )
    further = {"coco": None, "csv": "predictions.csv"}.get(arguments.format, "labels")
    files = [written.results, written.pictures, further and written.results.with_name(further)]
    say(f"written to {' and '.join(str(file) for file in files if file)}")
    if left_out:
        total = count + len(left_out)
        print(f"{len(left_out)} of {total} images were left out:\n  " + "\n  ".join(left_out.values()))
    return written.lacks_one_of(sources)


def _predict_videos(arguments: argparse.Namespace, videos: list[Path], targets: list[Path]) -> bool:
    """Whether a video was left out."""
    from ..inference.predict_videos import predict_videos
    from ..utils.progress import say

    written, left_out = predict_videos(
        arguments.model,
        videos,
        targets,
        threshold=arguments.threshold,
        batch_size=arguments.batch_size,
        pictures=not arguments.no_pictures,
        device=arguments.device,
        stop_at_errors=arguments.on_error == "stop",
    )
    for video in written:
        note = f" ({video.note})" if video.note else ""
        say(f"{video.frames} frames, {video.drawn} boxes above {arguments.threshold}{note}")
        say(f"written to {video.results}" + (f" and {video.video}" if video.video else ""))
    if left_out:
        print(f"{len(left_out)} of {len(videos)} videos were left out:\n  " + "\n  ".join(left_out))
    return bool(left_out)
