"""A page in the browser: drop an image, and see what several models find in it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd show`."""
    parser.description = "Models side by side in the browser, with a slider for the score. Needs gradio."
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids of saved detectors")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone; 0.0.0.0 is everybody who can reach it)",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ShowError, CheckpointError, PredictionError: see `show`.
    """
    from ..studies.show import show

    show(arguments.models, arguments.host, arguments.port, arguments.device)
