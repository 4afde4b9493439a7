"""Compare finished runs in one HTML file: curves, classes, confusions, pictures, costs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd report`."""
    parser.description = __doc__
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of finished runs; the last one is looked at closely"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the HTML file (default: report.html in the last run's folder)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="score of detections in pictures and confusions (default: 0.3)"
    )
    parser.add_argument("--no-costs", action="store_true", help="don't load the models to measure times")


def run(arguments: argparse.Namespace) -> None:
    """Write the report, and say where.

    Raises:
        ReportError: a run isn't finished, or two were evaluated on other images.
        ValueError: a threshold outside 0..1.
    """
    from ..studies.report import write_report

    if not 0 <= arguments.threshold < 1:
        raise ValueError(f"--threshold must be from 0 to below 1, got {arguments.threshold}")
    output = Path(arguments.output) if arguments.output else None
    path, runs = write_report(
        [Path(folder) for folder in arguments.runs], output, arguments.threshold, not arguments.no_costs
    )
    print(f"{path}: {', '.join(one.name for one in runs)}")
