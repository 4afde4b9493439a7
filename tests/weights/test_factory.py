"""Recipe sections -> models and image processors: every source of weights, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import assert_equal_weights, filled, reference_state, tiny_model
from transformers import DetrImageProcessor

from crosskd_hf import GFLForObjectDetection
from crosskd_hf.distillation.compatibility import pair_up
from crosskd_hf.models.architecture import ArchitectureSection, build_config
from crosskd_hf.models.backbone import Backbone
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor, pixel_style
from crosskd_hf.recipe.build import build_model, load_teacher
from crosskd_hf.recipe.sections import ModelSection, TeacherSection
from crosskd_hf.utils.checksums import mark_complete
from crosskd_hf.utils.label_names import COCO_CLASSES
from crosskd_hf.weights import loading
from crosskd_hf.weights.loading import load_backbone_weights, load_detector, load_processor
from crosskd_hf.weights.mmdet import CheckpointError

LABELS = ("cat", "dog", "emu")
TINY = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "head_blocks": 2}
MODEL = ModelSection(**TINY, backbone_weights="random")


def model_section(**options) -> ModelSection:
    return dataclasses.replace(MODEL, **options)


def teacher(checkpoint, **options) -> TeacherSection:
    return TeacherSection(checkpoint=str(checkpoint), **(TINY | options))


def new_model(labels=LABELS) -> GFLForObjectDetection:
    return filled(build_model(MODEL, labels))


def save_reference(model: GFLForObjectDetection, path: Path, meta: dict | None = None) -> Path:
    """The model as MMDetection would have saved it."""
    torch.save({"meta": meta or {}, "state_dict": reference_state(model)}, path)
    return path


# Configuration ------------------------------------------------------------------------------------------------------


def test_every_architecture_field_reaches_the_configuration():
    values = {
        "detector": "gfl",
        "backbone": "resnet50",
        "backbone_style": "caffe",
        "drop_path_rate": 0.1,
        "frozen_stages": 2,
        "train_batchnorm": False,
        "freeze_batchnorm_statistics": False,
        "fpn_channels": 32,
        "fpn_extra_convs": "on_input",
        "fpn_relu_before_p7": True,
        "head_channels": 64,
        "head_blocks": 3,
    }
    assert set(values) == {f.name for f in dataclasses.fields(ArchitectureSection)} - {
        "config"
    }  # of transformers' detectors
    default, config = ArchitectureSection(), build_config(ArchitectureSection(**values), LABELS)
    del values["detector"]
    assert not {name for name, value in values.items() if value == getattr(default, name)}
    assert {name: getattr(config, name) for name in values} == values
    assert config.num_labels == 3 and config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert config.label2id == {"cat": 0, "dog": 1, "emu": 2}


def test_processor_has_the_pixel_style_and_the_sizes():
    config = build_config(MODEL, LABELS)
    processor = DenseDetectorImageProcessor.for_model(config, short_side=64, long_side=96)
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 96}
    assert processor.nms_threshold == config.nms_threshold
    assert list(processor.image_mean) == [123.675, 116.28, 103.53]
    caffe = pixel_style(build_config(model_section(backbone="resnet26", backbone_style="caffe"), LABELS))
    assert sorted(caffe["image_mean"]) == [102.9801, 115.9465, 122.7717] and caffe["image_std"] == [1, 1, 1]
    # Other weights have other pixels: these were trained with mean and std 0.5.
    half = pixel_style(build_config(model_section(backbone="tf_efficientnet_b0.ap_in1k"), LABELS))
    assert half["image_mean"] == half["image_std"] == [127.5] * 3


# New models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("no network\nat all"), RuntimeError("No pretrained weights"), OSError()])
def test_unreachable_weights_say_what_to_do(monkeypatch, error):
    def fail(self, config, pretrained=False):
        raise error

    monkeypatch.setattr(Backbone, "__init__", fail)
    with pytest.raises(ValueError, match=r"ImageNet weights of resnet18 can't be fetched .*backbone_weights=random"):
        build_model(model_section(backbone_weights="pretrained"), LABELS)


def test_a_backbone_that_cannot_be_is_named_with_its_section():
    with pytest.raises(ValueError, match=r"^model\.backbone 'resnet5O' is no timm model.* resnet50\b"):
        build_model(model_section(backbone="resnet5O"), LABELS)
    with pytest.raises(ValueError, match=r"^teacher\.backbone 'resnet5O' is no timm model"):
        load_teacher(teacher("random", backbone="resnet5O"), LABELS)


def test_random_teacher_warns(caplog):
    assert load_teacher(teacher("random"), LABELS).config.num_labels == 3
    assert "random weights" in caplog.text


# Backbone weights from a file ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> dict[str, torch.Tensor]:
    """All weights of a classifier, as timm and torchvision publish them."""
    return filled(timm.create_model("resnet18")).state_dict()


@pytest.mark.parametrize("source", ["file.safetensors", "file.pth", "https://host/resnet18-00000000.pth"])
def test_backbone_weights(tmp_path, monkeypatch, classifier, source):
    path, asked = tmp_path / source.split("/")[-1], []
    # Old files have no counters of batches.
    state = {key: tensor for key, tensor in classifier.items() if "num_batches" not in key}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    monkeypatch.setattr(loading, "fetch", lambda url, folder: asked.append((url, folder)) or path)
    given = source if "://" in source else str(path)
    model = build_model(model_section(backbone_weights=given), LABELS)
    body = model.backbone.body.state_dict()
    assert {"fc.weight", "fc.bias"} == set(state) - set(body)
    assert all(torch.equal(body[key], tensor) for key, tensor in state.items() if "fc" not in key)
    assert asked == ([(source, loading.CACHE / "downloads")] if "://" in source else [])


def test_backbone_weights_with_timms_names_of_stages(tmp_path):
    """timm's classifiers say layers.0 where its feature extractors say layers_0."""
    model = build_model(MODEL, LABELS)
    model.backbone.body = torch.nn.ModuleDict({"layers_0": torch.nn.Linear(2, 2)})
    torch.save({"layers.0.weight": torch.ones(2, 2), "layers.0.bias": torch.ones(2)}, tmp_path / "weights.pth")
    load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.backbone.body["layers_0"].weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": None}, r"1 keys are missing .*layer1\.0\.conv1\.weight"),
        ({"bn1.bias": torch.zeros(65)}, r"1 keys .*another shape.*bn1\.bias"),
        ({"bn1.bias": torch.full((64,), float("nan"))}, r"bad\.pth holds NaN .*: bn1\.bias\."),
    ],
)
def test_backbone_weights_that_dont_fit(tmp_path, classifier, change, message):
    state = {key: tensor for key, tensor in (classifier | change).items() if tensor is not None}
    torch.save(state, tmp_path / "bad.pth")
    model = build_model(MODEL, LABELS)
    before = model.backbone.body.conv1.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(model, str(tmp_path / "bad.pth"))
    assert torch.equal(model.backbone.body.conv1.weight, before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_backbone_weights_that_cant_be_read(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    if content is not None:
        path.write_bytes(content)
    message = f"model.backbone_weights {path} is no file" if content is None else rf"bad\{suffix} can't be read"
    with pytest.raises(CheckpointError, match=message):
        build_model(model_section(backbone_weights=str(path)), LABELS)


def test_random_stages_are_trained():
    model = build_model(model_section(frozen_stages=1), LABELS)
    assert model.config.frozen_stages == 0 and model.backbone.body.conv1.weight.requires_grad


# Saved models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a saved detector."""
    folder = tmp_path_factory.mktemp("saved")
    new_model().save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path, **config) -> Path:
    """A copy of a saved model, with other values in its configuration."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_a_saved_model_has_its_own_architecture(saved):
    model = load_teacher(teacher(saved, backbone="resnet50", fpn_channels=256), ("other", "labels"))
    assert_equal_weights(model, new_model())
    assert model.config.backbone == "resnet18" and model.config.num_labels == 3
    section = model_section(checkpoint=str(saved), backbone_weights="pretrained")
    assert_equal_weights(build_model(section, LABELS), new_model())


@pytest.mark.parametrize(
    "config", ["{", "{}", "[]", "null", "5", '{"model_type": "yolos"}', '{"model_type": "crosskd_gfl"}']
)
def test_a_folder_that_is_no_detector(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="can't be loaded as a detector"):
        load_detector(str(tmp_path))


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForObjectDetection.from_pretrained", lambda *_, **__: pytest.fail())
    for source in ("runs/nothing", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match=r"nothing' can't be loaded .*: there is no such folder"):
            load_detector(source)
    with pytest.raises(CheckpointError, match=r"no config\.json.*it isn't finished.*\.pth"):
        load_detector("runs/begun")


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_file_is_not_called_missing(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / name), name):
        with pytest.raises(CheckpointError, match=f"{name}' is a file.*save_pretrained"):
            load_detector(source)


def test_no_credentials_in_messages():
    for source in ("https://someone:secret@127.0.0.1/a?sig=secret", "https://someone:secret@127.0.0.1:1/a.pth"):
        with pytest.raises(CheckpointError, match=r"https://127\.0\.0\.1.*a") as error:
            load_detector(source, None if source.endswith("pth") else teacher(source), ())
        assert "secret" not in str(error.value) and "someone" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_blocks": 1}, r"a model without 6 of its weights, such as head\.cls_tower\.1"),
        ({"strides": [8, 16, 32]}, r"a model without 6 of its weights"),
        ({"head_blocks": 3}, r"lacks 6 weights of its model, such as head\.cls_tower\.2"),
        ({"fpn_channels": 64}, r"config\.json doesn't fit .* fpn\.\S+, which is \(32.*to be \(64"),
        ({"strides": "x"}, r"config\.json: .*strides"),
        ({"head_blocks": 100_000}, r"config\.json: .*head_blocks"),
        ({"head_blocks": "2"}, r"config\.json: .*head_blocks"),
        ({"nms_threshold": float("nan")}, r"config\.json: .*nms_threshold"),
        ({"num_labels": 10**9}, r"config\.json: .*num_labels"),
        ({"id2label": {"0": "cat", "2": "dog"}}, r"config\.json: .*id2label"),
        ({"id2label": {"0": "WBC", "1": "RBC", "2": "WBC"}}, r"config\.json: .*id2label.*'WBC'"),
    ],
)
def test_a_saved_model_and_its_configuration_that_do_not_fit(tmp_path, saved, config, message):
    with pytest.raises(CheckpointError, match=rf"bad'.*{message}"):
        load_detector(str(copied(saved, tmp_path / "bad", **config)))


def test_a_damaged_checkpoint_is_no_model(tmp_path, saved):
    folder = copied(saved, tmp_path / "checkpoint-3")
    mark_complete(folder)
    assert_equal_weights(load_detector(str(folder)), new_model())
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-3' is damaged: the contents of model\.safetensors"):
        load_detector(str(folder))


def test_a_saved_model_without_its_weights(tmp_path, saved):
    folder = copied(saved, tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="can't be loaded as a detector"):
        load_detector(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"can't be loaded as a detector .*model\.safetensors"):
        load_detector(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", 0),
        ("image_std", [1.0, float("nan"), 1.0]),
        ("nms_threshold", float("nan")),
        ("max_candidates", "x"),
        ("size", 5),
        ("image_processor_type", "CLIPImageProcessor"),
    ],
)
def test_an_image_processor_that_cannot_be_is_named_with_its_file(tmp_path, key, value):
    DenseDetectorImageProcessor().save_pretrained(tmp_path / "bad")
    path = tmp_path / "bad" / "preprocessor_config.json"
    assert load_processor(str(path.parent)).max_candidates == 1000
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=rf"bad'.*preprocessor_config.json: .*{key}"):
        load_processor(str(path.parent))


def test_an_image_processor_of_the_other_kind_of_detector_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    DetrImageProcessor().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"DetrImageProcessor.*crosskd_gfl"):
        load_processor(str(tmp_path / "dense"))


def test_an_image_processor_that_cannot_be_fetched_is_not_called_damaged(saved, monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to the server")

    monkeypatch.setattr(loading.AutoImageProcessor, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"someone/model'.*OSError: We couldn't connect") as raised:
        load_processor("someone/model")
    assert "preprocessor_config" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: OSError"):
        load_processor(str(saved))


@pytest.mark.parametrize("kind", ["saved", "reference"])
def test_weights_that_are_not_finite(tmp_path, kind):
    model = new_model()
    key = "backbone.body.layer2.0.bn1.running_var" if kind == "saved" else "head.cls_predictor.weight"
    model.state_dict()[key].view(-1)[-1] = float("inf" if kind == "saved" else "nan")
    if kind == "saved":
        source, name = tmp_path / "model", key
        model.save_pretrained(source)
    else:
        source, name = save_reference(model, tmp_path / "gfl.pth"), "bbox_head.gfl_cls.weight"
    with pytest.raises(CheckpointError, match=rf"{source.name}'? holds NaN or infinity in 1 of \d+ tensors: {name}\."):
        load_teacher(teacher(source), LABELS)


def test_negative_variances(tmp_path):
    model = new_model()
    model.state_dict()["backbone.body.layer2.0.bn1.running_var"][3] = -1e-9
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"model'? holds negative variances.*: backbone\.body\.layer2\.0\.bn1"):
        load_detector(str(tmp_path / "model"))


def test_missing_weights_are_told_once(tmp_path, capfd):
    """By us: transformers' own report advises to train."""
    model = new_model()
    state = {name: value for name, value in model.state_dict().items() if name != "head.box_predictor.bias"}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of its model, such as head\.box_predictor\.bias"):
        load_detector(str(tmp_path / "model"))
    assert "newly initialized" not in "".join(capfd.readouterr())


# MMDetection checkpoints --------------------------------------------------------------------------------------------


def test_a_reference_checkpoint_by_path_and_url(tmp_path, monkeypatch):
    path, asked = save_reference(new_model(), tmp_path / "gfl.pth"), []
    monkeypatch.setattr(loading, "fetch", lambda url, folder: asked.append((url, folder)) or path)
    assert_equal_weights(load_teacher(teacher("https://host/gfl.pth"), LABELS), new_model())
    assert asked == [("https://host/gfl.pth", loading.CACHE / "downloads")]
    model = build_model(model_section(checkpoint=str(path)), LABELS)
    assert_equal_weights(model, new_model())
    assert not model.training and model.config.label_names == list(LABELS)


def test_label_names_in_the_file_come_first(tmp_path):
    path = save_reference(new_model(), tmp_path / "gfl.pth", {"CLASSES": ("a", "b", "c")})
    assert load_teacher(teacher(path), LABELS).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_old_names_of_coco_keep_all_classes_and_the_predictor(tmp_path):
    """MMDetection 1.x wrote `traffic_light`; neither is another class."""
    old = tuple(name.replace(" ", "_") for name in COCO_CLASSES)
    source = new_model(COCO_CLASSES)
    path = save_reference(source, tmp_path / "gfl.pth", {"CLASSES": old})
    section = model_section(checkpoint=str(path))
    assert_equal_weights(build_model(section, COCO_CLASSES), source)
    model = build_model(section, old)  # the data's spelling stays
    assert_equal_weights(model, source)
    assert model.config.label_names == list(old) and model.config.label2id["traffic_light"] == 9
    pairing = pair_up(model.config, load_teacher(teacher(path), COCO_CLASSES).config)
    assert pairing.classes == (None, None) and pairing.notes == (), "80 of 80 classes"


def test_no_predictor_is_replaced_for_a_spelling(saved):
    section = model_section(checkpoint=str(saved))
    with pytest.raises(CheckpointError, match="checkpoint 'cat', data 'CAT'"):
        build_model(section, ("CAT", "dog", "emu"))
    # It would be replaced however the names were spelt.
    model = build_model(section, ("CAT", "dog", "emu", "gnu"))
    assert model.config.label_names == ["CAT", "dog", "emu", "gnu"] and len(model.head.cls_predictor.bias) == 4
    assert torch.equal(model.head.box_predictor.bias, new_model().head.box_predictor.bias)


@pytest.mark.parametrize(("options", "labels"), [({"head_blocks": 3}, LABELS), ({}, (*LABELS, "fox"))])
def test_a_reference_checkpoint_of_another_model(tmp_path, options, labels):
    path = save_reference(new_model(), tmp_path / "gfl.pth")
    with pytest.raises(CheckpointError, match=r"gfl\.pth doesn't hold this model"):
        load_teacher(teacher(path, **options), labels)


def test_a_reference_checkpoint_that_isnt_there_or_has_no_architecture(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth doesn't exist"):
        load_teacher(teacher(tmp_path / "gone.pth"), LABELS)
    with pytest.raises(CheckpointError, match="doesn't say which detector it holds"):
        load_detector(str(tmp_path / "gone.pth"))
