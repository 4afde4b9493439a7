"""Out of memory: what is told, and of which errors."""

import errno
from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.memory import OutOfMemoryError, batch_advice, is_out_of_memory, out_of_memory_explained

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError(CPU), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (caused(RuntimeError("exited unexpectedly"), RuntimeError("worker is killed by signal: Killed. ")), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_of_which_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with pytest.raises(OutOfMemoryError if expected else type(error)) as raised:
        with out_of_memory_explained(lambda: "outer"), out_of_memory_explained(lambda: "inner"):
            raise error
    assert ("inner" in str(raised.value)) == expected and "outer" not in str(raised.value)


def test_a_run_names_batch_size_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = tiny_model(head_blocks=1), tiny_split(tmp_path / "data")
    args = tiny_args(tmp_path / "run", per_device_eval_batch_size=3)
    trainer = DetectionTrainer(
        model, args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(model)
    )

    def fail(*args, **kwargs):
        raise RuntimeError(CPU)

    monkeypatch.setattr(type(model), "forward", fail)
    # Of 96 x 64 and 64 x 90 images, two of a kind in a batch of training; padded to multiples of 32.
    with pytest.raises(OutOfMemoryError, match=r"(?s)per_device_train_batch_size is 2.* 2 images.*(64 x 96|96 x 64)"):
        trainer.train()
    with pytest.raises(OutOfMemoryError, match=r"(?s)3 images.* 96 x 96.*training\.per_device_eval.*DefaultCPU"):
        trainer.evaluate()


@pytest.mark.parametrize("small", [False, True])
def test_advice_names_what_can_be_lowered(small: bool, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "activation_checkpointing": True} if small else {}
    args = tiny_args(tmp_path, dataloader_num_workers=2 if small else 0, **options)
    text = batch_advice(args, "per_device_train_batch_size", None if small else (2, 3, 64, 96))
    assert "data.short_side" in text and ("no batch" in text) == small
    assert ("Lower training.per_device_train_batch_size" in text) == (not small)
    assert ("training.gradient_accumulation_steps" in text) == (not small)
    assert ("training.activation_checkpointing=true" in text) == (not small)
    assert ("training.dataloader_num_workers" in text) == small
