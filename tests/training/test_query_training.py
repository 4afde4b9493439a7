"""Detectors of transformers in the trainers: the guarantees of the dense ones, by the same means."""

from pathlib import Path

import equality
import pytest
import timm
import torch
from accelerate import PartialState
from processes import run_processes
from query_models import query_batch, query_model
from safetensors.torch import load_file, save_file
from tiny import tiny_args, tiny_model, tiny_split
from transformers import AutoModelForObjectDetection, RTDetrImageProcessor, pipeline
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2ForObjectDetection

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.distillation import PKD, QueryCrossKD, SoftBoxes
from crosskd_hf.distillation.pair import METHODS_FILE
from crosskd_hf.inference.predict import predict
from crosskd_hf.models.transformers_detectors import detection_losses, use_fp32_losses
from crosskd_hf.recipe.build import build_model
from crosskd_hf.recipe.sections import ModelSection
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.weights.loading import for_labels, load_detector, load_pretrained_backbone, load_processor
from crosskd_hf.weights.mmdet import CheckpointError

LABELS = {0: "cat", 1: "dog"}  # of `tiny_split`
OPTIONS = {
    "optim": "adamw_torch",
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "no",
    "per_device_eval_batch_size": 2,
    "max_grad_norm": 0.1,
    "ema_decay": 0.9,
    "ema_warmup_steps": 2,
    "no_decay": "norms",
    "backbone_lr_factor": 0.5,
}


def processor() -> RTDetrImageProcessor:
    return RTDetrImageProcessor(size={"height": 64, "width": 64})


def build(root: Path, name: str, teacher: bool = True, **options) -> DetectionTrainer:
    """RT-DETRv2, with a wider D-FINE as its teacher; flips and several sizes."""
    student = query_model("rt_detr_v2", labels=LABELS)
    split = tiny_split(root / "data", images=7)
    train = DetectionDataset(split, train=True, multiscale="batch", multiscale_short_sides=(64, 96))
    common = {"train_dataset": train, "eval_dataset": split, "processing_class": processor()}
    args = tiny_args(root / name, **{**OPTIONS, **options})
    if not teacher:
        return DetectionTrainer(student, args, **common)
    wide = query_model("d_fine", 1, labels=LABELS, d_model=32, decoder_in_channels=[16] * 3)
    return DistillationTrainer(student, wide, args, methods=[QueryCrossKD(), PKD()], **common)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DetectionTrainer]:
    root = tmp_path_factory.mktemp("query")
    trainer = build(root, "undisturbed")
    trainer.train()
    return root, trainer


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(undisturbed: tuple[Path, DetectionTrainer]) -> None:
    root, expected = undisturbed
    build(root, "first", max_steps=2, lr_milestones=[]).train()
    resumed = build(root, "first")
    resumed.train(resume_from_checkpoint=str(root / "first" / "checkpoint-2"))
    for one, other in (
        (expected.pair.state_dict(), resumed.pair.state_dict()),
        (expected.average.model.state_dict(), resumed.average.model.state_dict()),
    ):
        assert set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
    states = [trainer.optimizer.state_dict()["state"] for trainer in (expected, resumed)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def test_a_checkpoint_holds_the_student_under_its_own_names(undisturbed: tuple[Path, DetectionTrainer]) -> None:
    root, trainer = undisturbed
    checkpoint = root / "undisturbed" / "checkpoint-5"
    saved = load_file(checkpoint / "model.safetensors")
    assert not [name for name in saved if "teacher" in name or "adapter" in name or name.startswith("student")]
    assert sorted(load_file(checkpoint / METHODS_FILE)) == [
        "pkd.adapters.fpn.weight",
        "query_crosskd.adapter.bias",
        "query_crosskd.adapter.weight",
    ]
    assert isinstance(AutoModelForObjectDetection.from_pretrained(checkpoint), RTDetrV2ForObjectDetection)
    assert isinstance(load_processor(str(checkpoint)), RTDetrImageProcessor)
    assert trainer.state.log_history[0]["loss_detection"] > 0 and trainer.state.log_history[0]["kd_cls"] > 0


def test_pipeline_and_predict_agree_with_each_other(undisturbed: tuple[Path, DetectionTrainer]) -> None:
    """transformers' own pipeline reads what was saved."""
    root, _ = undisturbed
    folder, image = root / "undisturbed" / "checkpoint-5", root / "data" / "mini" / "1.png"
    detected = pipeline("object-detection", model=str(folder))(str(image), threshold=0.2)
    (own,) = predict(load_detector(str(folder)), load_processor(str(folder)), [image], threshold=0.2)
    assert len(own.scores) == len(detected) > 0
    scores = torch.tensor(sorted((one["score"] for one in detected), reverse=True))
    torch.testing.assert_close(own.scores.sort(descending=True).values, scores, atol=1e-5, rtol=0)


ONE_STEP = {"max_steps": 1, "save_strategy": "no", "ema_decay": None, "ema_warmup_steps": 0}


def train_share(rank: int, port: int, folder: str) -> None:
    equality.join(rank, 2, port)
    trainer = build(Path(folder), "two", **ONE_STEP)
    trainer.train()
    metrics = trainer.evaluate()
    torch.save((trainer.pair.state_dict(), metrics), Path(folder) / f"share{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_with_adapters_and_evaluate_as_one(tmp_path: Path) -> None:
    """Also where BatchNorms have statistics of each process's own images."""
    tiny_split(tmp_path / "data", images=7)
    run_processes(train_share, (equality.free_port(), str(tmp_path)), 2)
    shares = [torch.load(tmp_path / f"share{rank}.pt", weights_only=True) for rank in (0, 1)]
    (one, metrics), (other, _) = shares
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    alone = build(tmp_path, "alone", **ONE_STEP)
    start = alone.pair.state_dict()
    changed = {name for name, value in one.items() if not torch.equal(value, start[name])}
    assert {"methods.query_crosskd.adapter.weight", "methods.pkd.adapters.fpn.weight"} <= changed
    alone.pair.load_state_dict(one)
    of_one = alone.evaluate()
    assert metrics["eval_AR100"] > 0
    assert {name: value for name, value in of_one.items() if "_A" in name} == {
        name: value for name, value in metrics.items() if "_A" in name
    }


def test_two_stage_deformable_detr_alone_learns_its_encoders_heads(tmp_path: Path) -> None:
    model = query_model("deformable_detr two-stage", labels=LABELS)
    split = tiny_split(tmp_path / "data")
    trainer = DetectionTrainer(model, tiny_args(tmp_path / "run", max_steps=1), train_dataset=split)
    head = model.class_embed[-1].weight.clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss_encoder"] > 0
    assert not torch.equal(model.class_embed[-1].weight, head)


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_a_query_student_learns_unlabelled_images_from_a_dense_teacher(tmp_path: Path, threshold: float) -> None:
    """No score is above 1: without boxes, its own loss counts 0, and every parameter has a gradient all the same."""
    student, split = query_model("rt_detr", labels=LABELS), tiny_split(tmp_path / "data")
    trainer = DistillationTrainer(
        student,
        tiny_model("gfl", seed=2),
        tiny_args(tmp_path / "run", max_steps=2),
        train_dataset=split,
        processing_class=processor(),
        methods=[SoftBoxes(SoftBoxes.Settings(score_threshold=threshold, max_boxes=5))],
        unlabeled_dataset=split,
    )
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert first["loss_detection"] > 0 and (second["unlabeled_loss_detection"] > 0) == (threshold < 1)
    trainer.optimizer.zero_grad()
    trainer.pair(torch.zeros(1, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None for p in trainer.pair.parameters() if p.requires_grad)


def losses_of_two(rank: int, port: int, folder: str) -> None:
    equality.join(rank, 2, port)
    PartialState(cpu=True)  # as training arguments make it
    losses = {family: loss_of(family) for family in MEAN_LOSSES}
    if rank == 0:
        torch.save(losses, Path(folder) / "losses.pt")
    torch.distributed.destroy_process_group()


MEAN_LOSSES = ("deformable_detr two-stage", "detr", "lw_detr", "rt_detr")


def loss_of(family: str) -> float:
    model, batch = query_model(family).eval(), query_batch()
    use_fp32_losses(model)
    with torch.no_grad():
        terms = detection_losses(model, model(**batch), batch["labels"])
    return sum(terms.values()).item()


def test_two_processes_with_one_batch_have_its_loss(tmp_path: Path) -> None:
    run_processes(losses_of_two, (equality.free_port(), str(tmp_path)), 2)
    of_two = torch.load(tmp_path / "losses.pt", weights_only=True)
    assert of_two == pytest.approx({family: loss_of(family) for family in MEAN_LOSSES}, rel=1e-5)


# New models ---------------------------------------------------------------------------------------------------------


def recipe_of(detector: str, **config) -> ModelSection:
    backbone = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [2, 3, 4]}
    return ModelSection(detector=detector, config={"backbone_config": backbone, **config})


@pytest.mark.parametrize(
    ("detector", "config"),
    [
        ("rt_detr_v2", {"encoder_in_channels": [128, 256, 512]}),
        ("deformable_detr", {"d_model": 32}),
    ],
)
def test_a_backbone_of_timm_gets_its_weights(detector: str, config: dict, tmp_path: Path, monkeypatch) -> None:
    """By timm's name, and from a file; Deformable DETR's stem and first stage are then frozen."""
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    save_file(weights, tmp_path / "resnet18.safetensors")
    create, named = timm.create_model, []

    def pretrained(name, **options):
        named.append((name, options.pop("pretrained", False)))
        model = create(name, **options)
        if named[-1][1]:
            model.load_state_dict(weights)
        return model

    section = recipe_of(detector, **config)
    monkeypatch.setattr(timm, "create_model", pretrained)
    for source in ("pretrained", str(tmp_path / "resnet18.safetensors")):
        section.backbone_weights = source
        model = build_model(section, ["cat", "dog"])
        name = next(name for name in model.state_dict() if name.endswith("layer3.0.conv1.weight"))
        assert torch.equal(model.state_dict()[name], weights["layer3.0.conv1.weight"])
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        of_stem = {
            n
            for n, _ in model.named_parameters()
            if (n.endswith("conv1.weight") and "layer" not in n) or "layer1" in n
        }
        assert frozen == (of_stem if detector == "deformable_detr" else set())
    assert ("resnet18", True) in named
    if detector == "deformable_detr":
        torch.testing.assert_close(model.class_embed[0].bias.sigmoid(), torch.full((2,), 0.01))


def test_a_backbone_of_transformers_has_no_weights_alone() -> None:
    with pytest.raises(CheckpointError, match=r"rt_detr.*model\.pretrained.*backbone_weights=random"):
        load_pretrained_backbone(query_model("rt_detr"))


# Other classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["d_fine", "rt_detr", "deformable_detr two-stage", "lw_detr"])
def test_other_classes_get_new_predictors_and_the_rest_is_kept(family: str) -> None:
    """As many classes of other names: nothing that belongs to a class is kept, whatever fits."""
    model = query_model(family)
    new = for_labels(model, ["ant", "bee", "cow"])
    assert new.config.id2label == {0: "ant", 1: "bee", 2: "cow"} and new.config.label2id["bee"] == 1
    before, after = model.state_dict(), new.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("class_embed" in name or "score_head" in name for name in changed)
    if family in ("d_fine", "rt_detr"):
        assert any("denoising_class_embed" in name for name in changed)


def test_classes_that_both_know_keep_their_rows() -> None:
    """COCO's 80 among DETR's 91 ids, of which some are N/A."""
    model = query_model("detr", labels={0: "N/A", 1: "cat", 2: "N/A", 3: "dog"})
    new = for_labels(model, ["dog", "cat", "yak"])
    weight, expected = new.class_labels_classifier.weight, model.class_labels_classifier.weight
    assert torch.equal(weight[:2], expected[[3, 1]]) and not any(torch.equal(weight[2], row) for row in expected)


def test_known_classes_keep_the_model() -> None:
    model = query_model("rt_detr")
    assert for_labels(model, ["cat", "dog", "emu"]) is model


def test_a_saved_detector_is_loaded_and_other_families_are_refused_by_name(tmp_path: Path) -> None:
    model = query_model("d_fine").eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load_detector(str(tmp_path / "model"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    config = (tmp_path / "model" / "config.json").read_text().replace('"d_fine"', '"owlvit"')
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"owlvit.*rt_detr"):
        load_detector(str(tmp_path / "model"))
