"""Detections of image files: pictures with boxes, and COCO results."""

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
        "all images share."
    )
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image file or URL, folder, or pattern in quotes")
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
    parser.add_argument("--no-pictures", action="store_true", help="write predictions.json only")
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
    """Write predictions of image files, and tell how many.

    Raises:
        PredictionError, CheckpointError: see `predict_files`.
        SystemExit: with status 1, when all else is written, if an image that is a source itself was left out.
    """
    from ..inference.image_files import fetch_images
    from ..inference.predict_files import predict_files
    from ..utils.progress import say

    sources = fetch_images(arguments.sources, Path(arguments.output_dir) / "downloads")
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
    say(f"written to {written.results}" + (f" and {written.pictures}" if written.pictures else ""))
    if left_out:
        total = count + len(left_out)
        print(f"{len(left_out)} of {total} images were left out:\n  " + "\n  ".join(left_out.values()))
    if written.lacks_one_of(sources):
        raise SystemExit(1)
