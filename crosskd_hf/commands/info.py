"""What a saved detector is, what it costs, and where it came from."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd info`."""
    parser.description = __doc__
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the image that costs are told for (default: 4:3, resized as the model's processor does)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images a forward pass (default: 1)")
    parser.add_argument("--runs", type=int, default=5, help="timed passes, after one that isn't (default: 5)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what `describe_model` finds.

    Raises:
        CheckpointError: the model or its image processor can't be loaded.
        ValueError: a size, batch size or number of runs below 1.
    """
    import json
    from dataclasses import asdict

    import torch

    from ..studies.model_info import describe_model, format_info
    from ..utils.memory import out_of_memory_explained
    from ..weights.loading import load_detector, load_processor

    for name, value in (("--batch-size", arguments.batch_size), ("--runs", arguments.runs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if arguments.size and min(arguments.size) < 1:
        raise ValueError(f"--size must be at least 1 pixel, got {arguments.size}")
    model = load_detector(arguments.model)
    processor = load_processor(arguments.model)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = tuple(arguments.size) if arguments.size else None
    with out_of_memory_explained(lambda: "lower --batch-size or --size"):
        info = describe_model(model.to(device), processor, arguments.model, size, arguments.batch_size, arguments.runs)
    print(json.dumps(asdict(info), indent=2) if arguments.json else format_info(info))
