"""Thousands of drawn data sets with faults: each must be loaded or refused with a clear error, in time.

    python benchmarks/fuzz_data.py --data-sets 2000 --seed 0 --output FUZZ.json

Hypothesis draws 3 to 5 images of mixed modes and sizes, their boxes, and up to four faults at once: in image files, in
names, in numbers, in lists, in the JSON. Whatever is left is followed box by box through resizing and flips (0.01 px),
and a detector's losses on it must be finite. Any other exception, a hang or a moved box is printed with its data set,
and the exit status is 1.
"""

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from reporting import commit, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fuzzing import data_sets, examine, write
from tiny import tiny_model, tiny_processor


def fault_name(fault: tuple) -> str:
    """What a fault is counted as."""
    return f"{fault[0]}: {fault[-1]}" if fault[0] in ("image", "file") else fault[0]


def main() -> None:
    """Draw, examine, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-sets", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # many small steps would wait for each other
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = tiny_model().train()
    processor = tiny_processor(model)
    outcomes, faults, at_once, findings, seconds = Counter(), Counter(), Counter(), [], []
    images = 0
    began = time.monotonic()

    @seed(options.seed)
    @settings(
        max_examples=options.data_sets,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data_sets())
    def run(spec: dict) -> None:
        nonlocal images
        images += len(spec["images"])
        at_once[len(spec["faults"])] += 1
        faults.update(fault_name(fault) for fault in spec["faults"])
        start = time.monotonic()
        with TemporaryDirectory() as folder:
            write(spec, Path(folder) / "data")
            start = time.monotonic()
            try:
                outcomes.update(examine(Path(folder) / "data", model, processor))
            except Exception as error:  # each of them is what is looked for
                findings.append({"error": f"{type(error).__name__}: {str(error)[:300]}", "data set": str(spec)})
                traceback.print_exc(limit=-3)
                print(spec, flush=True)
        seconds.append(time.monotonic() - start)
        if len(seconds) % 200 == 0:
            print(f"{len(seconds)} data sets, {len(findings)} findings", flush=True)

    run()
    result = {
        **{
            "machine": machine(),
            "commit": commit(),
            "seed": options.seed,
            "data_sets": len(seconds),
            "images": images,
        },
        **{"faults_at_once": dict(sorted(at_once.items())), "faults": dict(faults.most_common())},
        **{"outcomes": dict(outcomes), "slowest_seconds": round(max(seconds), 2), "findings": findings},
        **{"seconds": round(time.monotonic() - began, 1)},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "findings"}, indent=1))
    print(f"{len(findings)} findings")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
