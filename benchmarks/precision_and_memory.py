"""Losses, gradient and memory of one CrossKD step in fp32 and bf16, with and without activation checkpointing.

    python benchmarks/precision_and_memory.py [--recipe gfl_r50_crosskd] [--side 480] [--batch 2] [--output FILE]

Each setting is a run of its own, by the recipe with random weights on generated images, the same in all: losses are
those of the same weights and images. Memory is the run's peak, of the GPU or resident on a CPU. On a CPU that of the
same run with one image of 64 pixels is subtracted, so that what is left are the activations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BASE_SIDE = 64  # pixels; a step that small needs little beside weights, gradients and optimizer state
SETTINGS = {
    "fp32": (),
    "fp32, checkpointing": ("training.activation_checkpointing=true",),
    "bf16": ("training.bf16=true",),
    "bf16, checkpointing": ("training.bf16=true", "training.activation_checkpointing=true"),
}


def first_step(recipe: str, side: int, batch: int, overrides: tuple[str, ...], cpu: bool) -> dict[str, float]:
    """The log of a run's only step."""
    with tempfile.TemporaryDirectory() as folder:
        values = [
            *("data.layout=shapes", "data.max_train_images=8", "data.max_val_images=1", "data.flip_probability=0"),
            *(f"data.shapes_side={side}", f"data.short_side={side}", f"data.long_side={side}"),
            *("model.backbone_weights=random", "teacher.checkpoint=random", f"training.output_dir={folder}/run"),
            *("training.max_steps=1", "training.lr_milestones=[]", "training.warmup_steps=0"),
            *(f"training.per_device_train_batch_size={batch}", "training.dataloader_num_workers=0"),
            *("training.logging_steps=1", "training.eval_strategy=no", "training.save_strategy=no"),
            f"training.use_cpu={'true' if cpu else 'false'}",
        ]
        command = [sys.executable, "-m", "crosskd_hf", "train", recipe, *values, *overrides, "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        history = json.loads((Path(folder) / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return next(entry for entry in history if "loss" in entry)


def main() -> None:
    """Run the settings and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gfl_r50_crosskd")
    parser.add_argument("--side", type=int, default=480, help="pixels a side of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON of the logs")
    arguments = parser.parse_args()
    base = 0.0 if arguments.gpu else first_step(arguments.recipe, BASE_SIDE, 1, (), True)["memory_gb"]
    logs = {}
    for name, overrides in SETTINGS.items():
        logs[name] = first_step(arguments.recipe, arguments.side, arguments.batch, overrides, not arguments.gpu)
        print(f"{name}: done", file=sys.stderr, flush=True)
    terms = [key for key in logs["fp32"] if key.startswith(("loss", "kd_", "grad_norm"))]
    print(f"{'':<22}" + "".join(f"{term:>12}" for term in terms) + f"{'memory (GB)':>14}{'of fp32':>9}")
    for name, log in logs.items():
        memory, whole = log["memory_gb"] - base, logs["fp32"]["memory_gb"] - base
        values = "".join(f"{log[term]:>12.5f}" for term in terms)
        print(f"{name:<22}{values}{memory:>18.2f}{memory / whole:>9.2f}")
    for name, log in logs.items():
        worst = max(abs(log[term] / logs["fp32"][term] - 1) for term in terms if logs["fp32"][term])
        print(f"{name}: largest relative difference to fp32 {worst:.1e}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"base_gb": base, "logs": logs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
