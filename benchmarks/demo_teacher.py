"""The teacher that `crosskd demo` carries, of a run of it: in half precision, at most 5 MB.

crosskd demo --full --output-dir runs/demo
python benchmarks/demo_teacher.py runs/demo/teacher
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from crosskd_hf.studies.demo import SHIPPED_TEACHER

MOST_BYTES = 5_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the trained teacher")
    run = parser.parse_args().run
    SHIPPED_TEACHER.mkdir(exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        (SHIPPED_TEACHER / name).write_text((run / name).read_text())
    weights = load_file(run / "model.safetensors")
    halved = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    target = SHIPPED_TEACHER / "model.safetensors"
    save_file(halved, target, metadata={"format": "pt"})
    size = target.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{target} has {size} bytes, more than {MOST_BYTES}")
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
