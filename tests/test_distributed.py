"""Two processes against one: the same gradients on the same global batch, the same evaluation numbers."""

import contextlib
from pathlib import Path

import pytest
import torch
from processes import run_processes
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split
from torch.nn.parallel import DistributedDataParallel

from crosskd_hf.data.coco import load_coco
from crosskd_hf.distillation.adapters import attach_adapters
from crosskd_hf.distillation.objective import distillation_losses, student_forward, teacher_forward
from crosskd_hf.distillation.pairing import pair_up
from crosskd_hf.distillation.settings import resolve_settings
from crosskd_hf.recipe import DistillationSection
from crosskd_hf.trainer import DetectionTrainer


def double_batch() -> dict:
    """In double precision: sums in another order then differ less than the bar, also where they nearly cancel."""
    batch = tiny_batch(images=4)
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def gradients_of_share(rank: int, world: int, store: str, output: str, detector: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = DistributedDataParallel(tiny_model(detector).double().train())
    batch = double_batch()
    share = slice(2 * rank, 2 * rank + 2)
    model(pixel_values=batch["pixel_values"][share], labels=batch["labels"][share]).loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}, output)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("detector", ["gfl", "fcos", "atss"])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, detector: str) -> None:
    """RetinaNet isn't among them: its normaliser is a rank's own, as in the reference."""
    output = tmp_path / "gradients.pt"
    run_processes(gradients_of_share, (2, str(tmp_path / "store"), str(output), detector), 2)
    model = tiny_model(detector).double().train()
    model(**double_batch()).loss.backward()
    shared = torch.load(output, weights_only=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (shared[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-8)
            assert error < 1e-5, f"{name}: {error:.2e}"


def adapter_gradients(rank: int, world: int, store: str, output: str) -> None:
    """Gradients of the adapters: of this rank alone, and as DDP leaves them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    student, teacher = tiny_model(seed=1, head_channels=16), tiny_model(seed=5).eval().requires_grad_(False)
    settings = resolve_settings(DistillationSection(), teacher)
    pairing = pair_up(student, teacher, settings)
    attach_adapters(student, pairing.adapters)
    model = DistributedDataParallel(student.train())
    batch = tiny_batch(images=4)
    inputs = {name: values[2 * rank : 2 * rank + 2] for name, values in batch.items()}

    def gradients(context) -> list[torch.Tensor]:
        model.zero_grad()
        with context:
            out = student_forward(model, inputs, settings)
            own = teacher_forward(teacher, inputs, settings, pairing)
            terms = distillation_losses(student, out, teacher, own, settings, pairing)
            (out.loss + sum(term.sum() for term in terms.values())).backward()
        return [convolution.weight.grad.clone() for convolution in pairing.adapters.values()]

    alone = gradients(model.no_sync())
    torch.save({"alone": alone, "averaged": gradients(contextlib.nullcontext())}, f"{output}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_average_the_gradients_of_adapters(tmp_path: Path) -> None:
    """They are used outside the student's forward, which is all that DDP wraps."""
    output = tmp_path / "gradients"
    run_processes(adapter_gradients, (2, str(tmp_path / "store"), str(output)), 2)
    first, second = (torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2))
    for mine, theirs, averaged, other in zip(
        first["alone"], second["alone"], first["averaged"], second["averaged"], strict=True
    ):
        assert torch.equal(averaged, other) and not torch.allclose(mine, theirs)
        torch.testing.assert_close(averaged, (mine + theirs) / 2)


def evaluate_share(rank: int, world: int, port: int, folder: str) -> None:
    import os

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    model = tiny_model()
    # Loaded, not written again: one process would read what the other is just writing.
    split = load_coco(Path(folder) / "data", "mini", cache_dir=str(Path(folder) / "data" / "cache"))
    args = tiny_args(Path(folder) / f"run{world}", per_device_eval_batch_size=2)
    trainer = DetectionTrainer(model, args, None, split, tiny_processor(model))
    assert trainer.accelerator.num_processes == world
    trainer.evaluate()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_evaluation_numbers_of_one(tmp_path: Path) -> None:
    """Five images in batches of two: the shares are uneven and the last batch is short."""
    import json
    import socket

    tiny_split(tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    written = []
    for world in (1, 2):
        run_processes(evaluate_share, (world, port, str(tmp_path)), world)
        folder = tmp_path / f"run{world}" / "evaluation"
        written.append([json.loads((folder / f"eval_{name}.json").read_text()) for name in ("metrics", "predictions")])
    assert written[0] == written[1]
    assert {entry["image_id"] for entry in written[0][1]} == {1, 2, 3, 4, 5}
