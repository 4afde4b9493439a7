"""A detector as an ONNX or torch.export file."""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd export`."""
    parser.description = (
        "A detector as one file for ONNX runtimes or torch.export. It takes pixel_values (N, 3, H, W) float32 and "
        "pixel_mask (N, H, W) bool as the image processor gives them, of any sizes, and gives scores (N, K), labels "
        "(N, K) and boxes (N, K, 4), xyxy in pixels of pixel_values, best first; rows without a detection have score "
        "0 and label -1. Thresholds and numbers of detections are those of the model's image processor. Of "
        "transformers' rt_detr, rt_detr_v2 and d_fine, it takes pixel_values alone, of the processor's height and "
        "width."
    )
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: onnx)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file to write (default: model.onnx or model.pt2 in the model's folder, or here for a Hub id)",
    )
    parser.add_argument(
        "--nms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="do non-maximum suppression in it; a torch program then needs `import crosskd_hf.inference.export` "
        "(default: yes)",
    )
    parser.add_argument("--opset", type=int, default=18, help="of ONNX, 18 to 23 (default: 18)")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the file with PyTorch on random images; needs onnxruntime for ONNX (default: yes)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the file and say what the check found.

    Raises:
        ExportError: see `export_detector`.
        CheckpointError: the model or its image processor can't be loaded.
    """
    from ..inference.export import SUFFIXES, export_detector
    from ..utils.progress import say
    from ..weights.loading import load_detector, load_processor

    folder = Path(arguments.model) if os.path.isdir(arguments.model) else Path()
    path = Path(arguments.output) if arguments.output else folder / f"model{SUFFIXES[arguments.format]}"
    model = load_detector(arguments.model)
    difference = export_detector(
        model,
        load_processor(arguments.model),
        path,
        format=arguments.format,
        nms=arguments.nms,
        opset=arguments.opset,
        check=arguments.check,
    )
    say(f"written to {path}, {path.stat().st_size / 1e6:.1f} MB")
    if difference is not None:
        say(f"compared with PyTorch on 4 random images: {difference}")
