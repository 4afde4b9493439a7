"""Out of memory: what is told, and of which errors."""

import errno
from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.memory import OutOfMemoryError, is_out_of_memory, out_of_memory_explained

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
        with out_of_memory_explained(lambda: "lower it"):
            raise error
    assert ("lower it" in str(raised.value)) == expected


def test_the_innermost_tells() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="inner") as raised:
        with out_of_memory_explained(lambda: "outer"), out_of_memory_explained(lambda: "inner"):
            raise MemoryError
    assert "outer" not in str(raised.value)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_run_names_batch_size_and_keys(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = tiny_model(), tiny_split(tmp_path / "data")
    args = tiny_args(tmp_path / "run", per_device_eval_batch_size=3)
    trainer = DetectionTrainer(model, args, split, split, tiny_processor(model))

    def fail(*args, **kwargs):
        raise RuntimeError(CPU)

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(OutOfMemoryError) as raised:
        trainer.train() if where == "training" else trainer.evaluate()
    text = str(raised.value)
    assert "data.short_side" in text and "DefaultCPUAllocator" in text
    if where == "training":  # of 96 x 64 and 64 x 90 images, two of a kind; padded to multiples of 32
        assert "per_device_train_batch_size is 2" in text and "training.gradient_accumulation_steps" in text
        assert "2 images" in text and ("64 x 96 pixels" in text or "96 x 64 pixels" in text)
    else:  # both kinds in a batch
        assert "training.per_device_eval_batch_size" in text and "3 images" in text and "96 x 96 pixels" in text


def test_a_batch_of_one_cannot_be_smaller(tmp_path: Path) -> None:
    model = tiny_model()
    args = tiny_args(tmp_path, per_device_train_batch_size=1, gradient_checkpointing=True, dataloader_num_workers=2)
    text = DetectionTrainer(model, args)._memory_advice("per_device_train_batch_size")
    assert "Lower training.per_device" not in text and "gradient_checkpointing" not in text
    assert "no batch" in text and "training.dataloader_num_workers" in text
