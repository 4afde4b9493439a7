"""Two processes against one: the same gradients on the same global batch, the same evaluation numbers."""

import argparse
import json
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import equality
import pytest
import torch
from processes import run_processes
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.commands import evaluate
from crosskd_hf.commands.errors import USER_ERRORS
from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.stream import DetectionStream, load_stream
from crosskd_hf.distillation import CrossKD
from crosskd_hf.hub.upload import RECIPE_FILE
from crosskd_hf.recipe import run_folder
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.running import prepare
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils import distributed

CASES = [("gfl", False), ("retinanet", False), ("fcos", False), ("atss", False), ("gfl", True)]  # with distillation?


def gradients_of_two(rank: int, port: int, output: str) -> None:
    equality.join(rank, 2, port)
    torch.distributed.init_process_group("gloo")
    averaged = {f"{case}": equality.gradients(*case, rank, 2) for case in CASES}
    if rank == 0:
        torch.save(averaged, output)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """But for RetinaNet's normaliser and the distillation's statistics, which are each process's, as published."""
    output = tmp_path / "gradients.pt"
    run_processes(gradients_of_two, (equality.free_port(), str(output)), 2)
    of_two = torch.load(output, weights_only=True)
    for detector, distil in CASES:
        error = equality.error(equality.gradients(detector, distil, 0, 1), of_two[f"{(detector, distil)}"])
        assert error > 1e-3 if distil or detector == "retinanet" else error < equality.EQUAL, (detector, distil)


def test_two_processes_give_the_evaluation_files_of_one(tmp_path: Path) -> None:
    """Five images in batches of two: the shares are uneven and the last batch is short."""
    tiny_split(tmp_path / "data5")
    written = []
    for world in (1, 2):
        run_processes(equality.evaluate_share, (world, equality.free_port(), str(tmp_path), 5), world)
        folder = tmp_path / f"run5_{world}" / "evaluation"
        written.append({name: (folder / f"eval_{name}.json").read_bytes() for name in ("metrics", "predictions")})
    assert written[0] == written[1]
    assert {entry["image_id"] for entry in json.loads(written[0]["predictions"])} == {1, 2, 3, 4, 5}


def steps_with_unlabelled_images(rank: int, port: int, folder: str) -> None:
    """Two epochs of a pair. DDP, which looks for no unused parameters, waits for all of them in every step."""
    equality.join(rank, 2, port)
    split = load_coco(Path(folder) / "data", "mini", cache_dir=str(Path(folder) / "data" / "cache"))
    args = tiny_args(Path(folder) / "run", max_steps=8, per_device_train_batch_size=1)
    student = tiny_model()
    trainer = DistillationTrainer(
        student,
        tiny_model(seed=2),
        args,
        train_dataset=split,
        processing_class=tiny_processor(student),
        methods=[CrossKD()],
        unlabeled_dataset=split.first(3),
    )
    trainer.train()
    kinds = ["unlabeled_kd_cls" in entry for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in student.parameters()])
    torch.save((kinds, len(trainer.get_train_dataloader()), weights), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_batches_of_one_kind(tmp_path: Path) -> None:
    """Five images, one a process: three rounds of an epoch, and as many unlabelled ones."""
    tiny_split(tmp_path / "data")
    run_processes(steps_with_unlabelled_images, (equality.free_port(), str(tmp_path)), 2)
    (kinds, length, weights), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert kinds == [False, True] * 4 and length == 6
    assert torch.equal(weights, other[2])


def images_of_a_stream(rank: int, port: int, folder: str) -> None:
    """Three batches of one process of two, each of which reads a file of three images."""
    equality.join(rank, 2, port)
    split = load_coco(Path(folder) / "data", "mini", cache_dir=str(Path(folder) / "data" / "cache"))
    stream = DetectionStream(load_stream(split.dataset.to_iterable_dataset(num_shards=2)), train=True)
    args = tiny_args(Path(folder) / "run", max_steps=3, per_device_train_batch_size=1, lr_milestones=None)
    student = tiny_model()
    trainer = DetectionTrainer(student, args, train_dataset=stream, processing_class=tiny_processor(student))
    seen: list[int] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda items: (seen.extend(item["image_id"] for item in items), collate(items))[1]
    trainer.train()
    torch.save(
        (seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]), f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_read_halves_of_a_stream(tmp_path: Path) -> None:
    tiny_split(tmp_path / "data", images=6)
    run_processes(images_of_a_stream, (equality.free_port(), str(tmp_path)), 2)
    (one, losses), (other, same) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert {frozenset(one[:3]), frozenset(other[:3])} == {frozenset({1, 2, 3}), frozenset({4, 5, 6})}
    assert len(losses) == 3 and losses == same


# Several machines ----------------------------------------------------------------------------------------------------


def refusal(function: Callable, *args) -> str:
    """The message that a user's error ends in; "" if there is none."""
    try:
        function(*args)
    except USER_ERRORS as error:
        return str(error)
    return ""


def on_two_machines(rank: int, port: int, folder: str) -> None:
    """What a run says where the two have a disk each, `disk0` and `disk1`, and one that they share."""
    equality.join(rank, 2, port)
    root, disk = Path(folder), Path(folder) / f"disk{rank}"
    recipe = load_recipe("gfl_r50_crosskd", ["training.use_cpu=true"])
    args = tiny_args(disk / "new")  # starts the processes' group
    split = tiny_split(root / "data")
    evaluation = dict.fromkeys(("recipe", "split", "output_dir", "max_images")) | {"data": str(root / "data")}
    evaluation |= {"batch_size": 1, "workers": 0}
    names = mock.patch.object(socket, "gethostname", lambda: f"node-{'ab'[rank]}")
    with names, mock.patch.object(distributed, "APPEARS_WITHIN", 0.3):
        messages = {"shared": refusal(distributed.check_shared, root / "shared" / "run")}
        for run in ("new", "begun", "finished", "file"):
            recipe.training["output_dir"] = str(disk / run)
            messages[run] = refusal(prepare, recipe)
        messages["trainer"] = refusal(DetectionTrainer(tiny_model(), args, train_dataset=split).train)
        messages["data"] = refusal(lambda: DetectionTrainer(tiny_model(), args, train_dataset=split.first(3 + rank)))
        messages["teacher"] = refusal(DistillationTrainer, tiny_model(), tiny_model(seed=rank), args)
        for model in ("begun", "model"):
            arguments = argparse.Namespace(model=str(disk / model), **evaluation)
            messages[f"evaluate {model}"] = refusal(evaluate.run, arguments)
    (root / f"messages{rank}.json").write_text(json.dumps(messages))
    torch.distributed.destroy_process_group()


def test_what_differs_between_machines_is_named_on_all_processes(tmp_path: Path) -> None:
    tiny_split(tmp_path / "data")
    for seed, disk in enumerate((tmp_path / "disk0", tmp_path / "disk1")):
        tiny_model(seed=seed).save_pretrained(disk / "model")
    first = tmp_path / "disk0"
    for run in ("begun", "finished"):
        (first / run).mkdir()
        load_recipe("gfl_r50_crosskd", ["training.use_cpu=true"]).save(first / run / RECIPE_FILE)
    (first / "file").touch()
    state = {"global_step": 3, "log_history": [{"eval_AP": 0.5, "step": 3}]}
    (first / "finished" / run_folder.STATE_FILE).write_text(json.dumps(state))
    (first / "finished" / "config.json").write_text("{}")
    (first / "finished" / "model.safetensors").touch()
    run_processes(on_two_machines, (equality.free_port(), str(tmp_path)), 2)
    assert not list((tmp_path / "shared" / "run").iterdir()) and not list((first / "new").iterdir())
    for rank in range(2):
        messages = json.loads((tmp_path / f"messages{rank}.json").read_text())
        assert messages.pop("shared") == ""
        assert str(first / "file") in messages.pop("file"), "it can't be made, which ends both processes"
        for run in ("new", "begun", "finished", "trainer"):
            folder = str(tmp_path / f"disk{rank}" / ("new" if run == "trainer" else run))
            assert all(part in messages[run] for part in (folder, "node-b (process 1)", "node-a", "share"))
        for what, named in (
            ("data", "train_dataset"),
            ("teacher", "teacher"),
            ("evaluate begun", "node-a (process 0)"),
            ("evaluate model", "weights of"),
        ):
            assert named in messages[what] and "node-b (process 1)" in messages[what]
