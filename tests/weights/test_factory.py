"""Recipe sections -> models and image processors: every source of weights, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_processor, write_tiny_coco
from transformers import AutoImageProcessor, YolosConfig, YolosForObjectDetection

from crosskd_hf import GFLForObjectDetection
from crosskd_hf.commands import main as cli
from crosskd_hf.distillation.compatibility import pair_up
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.architecture import DETECTORS, ArchitectureSection, build_config
from crosskd_hf.models.backbone import Backbone
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor, pixel_style
from crosskd_hf.recipe.build import build_model, load_teacher
from crosskd_hf.recipe.sections import ModelSection, TeacherSection
from crosskd_hf.utils.label_names import COCO_CLASSES
from crosskd_hf.weights import loading as factory
from crosskd_hf.weights.loading import count_parameters, load_backbone_weights, load_detector, load_processor
from crosskd_hf.weights.mmdet import CheckpointError, reference_keys

LABELS = ("cat", "dog", "emu")
TINY = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "head_blocks": 2}
MODEL = ModelSection(**TINY, backbone_weights="random")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setattr(factory, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def teacher(checkpoint, **options) -> TeacherSection:
    return TeacherSection(checkpoint=str(checkpoint), **(TINY | options))


def filled(model: GFLForObjectDetection) -> GFLForObjectDetection:
    """The model with weights that no initialisation gives."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def save_reference(model: GFLForObjectDetection, path: Path, meta: dict | None = None) -> Path:
    """The model as MMDetection would have saved it."""
    own = model.state_dict()
    state = {name: own[key] for key, name in reference_keys(model).items()}
    torch.save({"meta": meta or {}, "state_dict": state}, path)
    return path


def assert_equal_weights(module: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        if "num_batches_tracked" not in key:
            assert torch.equal(state[key], tensor), key


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
    assert set(values) == {f.name for f in dataclasses.fields(ArchitectureSection)}
    default, config = ArchitectureSection(), build_config(ArchitectureSection(**values), LABELS)
    del values["detector"]
    assert not {name for name, value in values.items() if value == getattr(default, name)}
    assert {name: getattr(config, name) for name in values} == values


def test_labels_are_those_of_the_data():
    config = build_config(MODEL, LABELS)
    assert config.num_labels == 3
    assert config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert config.label2id == {"cat": 0, "dog": 1, "emu": 2}


def test_a_recipe_names_every_detector_there_is():
    assert set(DETECTORS) == set(CONFIGS) == set(MODELS)


@pytest.mark.parametrize("detector", DETECTORS)
def test_builds_each_detector(detector):
    model = build_model(dataclasses.replace(MODEL, detector=detector), LABELS)
    assert type(model) is MODELS[detector] and model.config.num_labels == 3


def test_processor_has_the_pixel_style_and_the_sizes():
    config = build_config(MODEL, LABELS)
    processor = DenseDetectorImageProcessor.for_model(config, short_side=64, long_side=96)
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 96}
    assert processor.nms_threshold == config.nms_threshold
    assert list(processor.image_mean) == [123.675, 116.28, 103.53]
    caffe_section = dataclasses.replace(MODEL, backbone="resnet26", backbone_style="caffe")
    caffe = DenseDetectorImageProcessor.for_model(build_config(caffe_section, LABELS))
    assert sorted(caffe.image_mean) == [102.9801, 115.9465, 122.7717]
    assert list(caffe.image_std) == [1, 1, 1]
    # Other weights have other pixels: these were trained with mean and std 0.5.
    half = build_config(dataclasses.replace(MODEL, backbone="tf_efficientnet_b0.ap_in1k"), LABELS)
    assert pixel_style(half)["image_mean"] == [127.5] * 3 and pixel_style(half)["image_std"] == [127.5] * 3
    assert dict(caffe.size) == {"shortest_edge": 800, "longest_edge": 1333}


def test_counts_parameters():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert count_parameters(model) == (8, 6)


# New models ---------------------------------------------------------------------------------------------------------


def test_random_backbone_needs_no_network(monkeypatch):
    monkeypatch.setattr(Backbone, "__init__", no_pretrained(Backbone.__init__))
    assert isinstance(build_model(MODEL, LABELS), GFLForObjectDetection)


def no_pretrained(init):
    def wrapped(self, config, pretrained=False):
        assert not pretrained
        init(self, config, pretrained)

    return wrapped


@pytest.mark.parametrize("error", [OSError("no network\nat all"), RuntimeError("No pretrained weights"), OSError()])
def test_unreachable_weights_say_what_to_do(monkeypatch, error):
    def fail(self, config, pretrained=False):
        raise error

    monkeypatch.setattr(Backbone, "__init__", fail)
    with pytest.raises(ValueError, match=r"ImageNet weights of resnet18 can't be fetched .*backbone_weights=random"):
        build_model(dataclasses.replace(MODEL, backbone_weights="pretrained"), LABELS)


def test_unknown_backbone():
    with pytest.raises(ValueError, match=r"^model\.backbone 'resnet5O' is no timm model.* resnet50\b"):
        build_model(dataclasses.replace(MODEL, backbone="resnet5O"), LABELS)
    with pytest.raises(ValueError, match=r"^model\.backbone 'vit_tiny_patch16_224' has maps of strides .* resnet50\b"):
        build_model(dataclasses.replace(MODEL, backbone="vit_tiny_patch16_224"), LABELS)
    with pytest.raises(ValueError, match=r"^teacher\.backbone 'resnet5O' is no timm model"):
        load_teacher(teacher("random", backbone="resnet5O"), LABELS)


# Backbone weights from a file ---------------------------------------------------------------------------------------


def backbone_state(name: str = "resnet18", seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole classifier's weights, as timm and torchvision publish them."""
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_backbone_weights_from_a_file(tmp_path, suffix):
    state, path = backbone_state(), str(tmp_path / f"resnet18{suffix}")
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build_model(dataclasses.replace(MODEL, backbone_weights=path), LABELS)
    own = model.backbone.body.state_dict()
    assert {"fc.weight", "fc.bias"} == set(state) - set(own)
    assert all(torch.equal(tensor, state[key]) for key, tensor in own.items())


def test_backbone_weights_from_a_url(tmp_path, monkeypatch):
    path = tmp_path / "resnet18-00000000.pth"
    torch.save(backbone_state(), path)
    asked = []
    monkeypatch.setattr(factory, "fetch", lambda url, folder: asked.append((url, folder)) or path)
    model = build_model(dataclasses.replace(MODEL, backbone_weights="https://host/resnet18-00000000.pth"), LABELS)
    assert asked == [("https://host/resnet18-00000000.pth", factory.CACHE / "downloads")]
    assert torch.equal(model.backbone.body.conv1.weight, backbone_state()["conv1.weight"])


def test_backbone_weights_with_timms_names_of_stages(tmp_path):
    """timm's classifiers say layers.0 where its feature extractors say layers_0."""
    model = build_model(MODEL, LABELS)
    model.backbone.body = torch.nn.ModuleDict({"layers_0": torch.nn.Linear(2, 2)})
    state = {"layers.0.weight": torch.ones(2, 2), "layers.0.bias": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pth")
    load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.backbone.body["layers_0"].weight, torch.ones(2, 2))


def test_old_backbone_files_have_no_batch_counters(tmp_path):
    state = {key: tensor for key, tensor in backbone_state().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    load_backbone_weights(build_model(MODEL, LABELS), str(tmp_path / "old.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), r"1 keys are missing .*layer1\.0\.conv1\.weight"),
        (lambda state: state.update({"bn1.bias": torch.zeros(65)}), r"1 keys .*bn1\.bias"),
        (lambda state: [state.pop(key) for key in list(state) if "layer" in key], "95 keys"),
    ],
)
def test_backbone_weights_that_dont_fit(tmp_path, change, message):
    state = backbone_state()
    change(state)
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
    with pytest.raises(CheckpointError, match=r"bad\."):
        build_model(dataclasses.replace(MODEL, backbone_weights=str(path)), LABELS)


# Saved models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a saved detector."""
    folder = tmp_path_factory.mktemp("saved")
    filled(build_model(MODEL, LABELS)).save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path, **config) -> Path:
    """A copy of a saved model, with other values in its configuration."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_random_teacher_warns(caplog):
    model = load_teacher(teacher("random"), LABELS)
    assert isinstance(model, GFLForObjectDetection) and model.config.num_labels == 3
    assert "random weights" in caplog.text


def test_teacher_from_a_folder_has_its_own_architecture(saved):
    model = load_teacher(teacher(saved, backbone="resnet50", fpn_channels=256), ("other", "labels"))
    assert_equal_weights(model, filled(build_model(MODEL, LABELS)))
    assert model.config.backbone == "resnet18" and model.config.num_labels == 3


def test_model_from_a_checkpoint(saved):
    model = build_model(dataclasses.replace(MODEL, checkpoint=str(saved), backbone_weights="pretrained"), LABELS)
    assert_equal_weights(model, filled(build_model(MODEL, LABELS)))


@pytest.mark.parametrize("config", [None, "{", "{}", '{"model_type": "bert"}', '{"model_type": "crosskd_gfl"}'])
def test_a_folder_that_is_no_detector(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="can't be loaded as a detector"):
        load_teacher(teacher(tmp_path), LABELS)


def test_a_folder_that_isnt_there(tmp_path):
    with pytest.raises(CheckpointError, match="can't be loaded as a detector"):
        load_teacher(teacher(tmp_path / "gone"), LABELS)


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForObjectDetection.from_pretrained", lambda *_, **__: pytest.fail())
    with pytest.raises(CheckpointError, match=r"'runs/nothing' can't be loaded .*: there is no such folder"):
        load_detector("runs/nothing", None, ())
    with pytest.raises(CheckpointError, match=r"holds no config.json. If a run writes to it, it isn't finished"):
        load_detector("runs/begun", None, ())


def test_no_credentials_in_messages():
    for source in ("https://someone:secret@127.0.0.1/a?sig=secret", "https://someone:secret@127.0.0.1:1/a.pth"):
        with pytest.raises(CheckpointError, match=r"https://127\.0\.0\.1.*a") as error:
            load_detector(source, None if source.endswith("pth") else teacher(source), ())
        assert "secret" not in str(error.value) and "someone" not in str(error.value)


def test_a_detector_of_another_kind(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": [32, 32], "num_detection_tokens": 2}
    YolosForObjectDetection(YolosConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a YolosForObjectDetection; only the dense detectors"):
        load_teacher(teacher(tmp_path), LABELS)


def test_a_saved_model_that_lacks_weights(tmp_path, saved):
    folder = copied(saved, tmp_path / "lacking", head_blocks=3)
    with pytest.raises(CheckpointError, match=r"lacks 6 weights of its model, such as head\.cls_tower\.2"):
        load_detector(str(folder), None, ())


def test_a_saved_model_of_other_shapes(tmp_path, saved):
    folder = copied(saved, tmp_path / "other", fpn_channels=64)
    with pytest.raises(CheckpointError, match=r"config\.json doesn't fit .* fpn\.\S+, which is \(32.*to be \(64"):
        load_detector(str(folder), None, ())


def test_a_saved_model_that_was_cut_off(tmp_path, saved):
    folder = copied(saved, tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="can't be loaded as a detector"):
        load_detector(str(folder), None, ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strides", "x"),
        ("head_blocks", 100_000),
        ("head_blocks", "2"),
        ("nms_threshold", float("nan")),
        ("num_labels", 10**9),
        ("id2label", {"0": "cat", "2": "dog"}),
        ("id2label", {"0": "WBC", "1": "RBC", "2": "WBC"}),
    ],
)
def test_a_configuration_that_cannot_be_is_named_with_its_file(tmp_path, saved, key, value):
    with pytest.raises(CheckpointError, match=rf"bad'.*config\.json: .*{key}"):
        load_detector(str(copied(saved, tmp_path / "bad", **{key: value})), None, ())


@pytest.mark.parametrize("content", ["[]", "null", "5"])
def test_a_configuration_that_is_no_mapping(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_detector(str(tmp_path), None, ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", 0),
        ("image_std", [1.0, float("nan"), 1.0]),
        ("nms_threshold", float("nan")),
        ("max_candidates", "x"),
        ("size", 5),
        ("image_processor_type", "DetrImageProcessor"),
    ],
)
def test_an_image_processor_that_cannot_be_is_named_with_its_file(tmp_path, saved, key, value):
    folder = copied(saved, tmp_path / "bad")
    DenseDetectorImageProcessor().save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    assert load_processor(str(folder)).max_candidates == 1000
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=rf"bad'.*preprocessor_config.json: .*{key}"):
        load_processor(str(folder))


def test_an_image_processor_that_cannot_be_fetched_is_not_called_damaged(tmp_path, saved, monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to the server")

    monkeypatch.setattr(factory.AutoImageProcessor, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"someone/model'.*OSError: We couldn't connect") as raised:
        load_processor("someone/model")
    assert "preprocessor_config" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: OSError"):
        load_processor(str(saved))


# Weights that aren't finite -----------------------------------------------------------------------------------------


def spoilt(key: str, value: float) -> GFLForObjectDetection:
    """A detector with one number of a tensor that is no number."""
    model = filled(build_model(MODEL, LABELS))
    model.state_dict()[key].view(-1)[-1] = value
    return model


@pytest.mark.parametrize(
    ("key", "value"),
    [("head.box_predictor.bias", float("nan")), ("backbone.body.layer2.0.bn1.running_var", float("inf"))],
)
def test_a_saved_model_with_weights_that_are_not_finite(tmp_path, key, value):
    spoilt(key, value).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"model' holds NaN or infinity in 1 of \d+ tensors: {key}\."):
        load_teacher(teacher(tmp_path / "model"), LABELS)


def test_a_reference_checkpoint_with_weights_that_are_not_finite(tmp_path, cache):
    path = save_reference(spoilt("head.cls_predictor.weight", float("nan")), tmp_path / "gfl.pth")
    with pytest.raises(CheckpointError, match=r"gfl\.pth holds NaN .*: bbox_head\.gfl_cls\.weight\."):
        build_model(dataclasses.replace(MODEL, checkpoint=str(path)), LABELS)
    assert not cache.exists()


def test_backbone_weights_that_are_not_finite(tmp_path):
    state = backbone_state()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"backbone\.pth holds NaN .*: layer1\.0\.conv1\.weight\."):
        load_backbone_weights(build_model(MODEL, LABELS), str(tmp_path / "backbone.pth"))


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "info"])
def test_no_command_runs_weights_that_are_not_finite(tmp_path, command):
    model = tiny_model(backbone="lcnet_050", head_blocks=1)
    with torch.no_grad():
        model.fpn.output_convs[0].bias[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    write_tiny_coco(tmp_path / "data", 1)
    more = {"predict": [str(tmp_path / "data" / "mini")], "evaluate": ["--data", str(tmp_path / "data")]}
    with pytest.raises(SystemExit, match=r"model' holds NaN .*: fpn\.output_convs\.0\.bias\."):
        cli.main([command, str(tmp_path / "model"), *more.get(command, [])])


# MMDetection checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch) -> list[str]:
    """The files that were really converted, not found again."""
    done = []
    convert = factory.load_reference_state

    def counted(model, state, source):
        done.append(source)
        convert(model, state, source=source)

    monkeypatch.setattr(factory, "load_reference_state", counted)
    return done


def test_a_reference_checkpoint_is_converted_once(tmp_path, cache, conversions):
    source = filled(build_model(MODEL, LABELS))
    path = save_reference(source, tmp_path / "gfl_r18.pth")
    for _ in range(2):
        assert_equal_weights(load_teacher(teacher(path), LABELS), source)
    assert conversions == [str(path)]
    (folder,) = (cache / "converted").iterdir()
    assert folder.name.startswith("gfl_r18-")
    # The folder is a whole model, that a Hub user could load.
    assert AutoImageProcessor.from_pretrained(folder).nms_threshold == source.config.nms_threshold


def test_another_content_or_architecture_is_converted_anew(tmp_path, cache, conversions):
    model = filled(build_model(MODEL, LABELS))
    path = save_reference(model, tmp_path / "gfl.pth")
    load_teacher(teacher(path), LABELS)
    load_teacher(teacher(path, frozen_stages=0), LABELS)
    with torch.no_grad():
        model.head.cls_predictor.bias.fill_(-1)
    save_reference(model, path)
    assert load_teacher(teacher(path), LABELS).head.cls_predictor.bias.unique().tolist() == [-1]
    assert load_teacher(teacher(path), ("a", "b", "c")).config.id2label[0] == "a"
    assert len(conversions) == len(list((cache / "converted").iterdir())) == 4


def test_label_names_in_the_file_come_first(tmp_path):
    path = save_reference(build_model(MODEL, LABELS), tmp_path / "gfl.pth", {"CLASSES": ("a", "b", "c")})
    assert load_teacher(teacher(path), LABELS).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_old_names_of_coco_keep_all_classes_and_the_predictor(tmp_path):
    """MMDetection 1.x wrote `traffic_light`; neither is another class."""
    old = tuple(name.replace(" ", "_") for name in COCO_CLASSES)
    source = filled(build_model(MODEL, COCO_CLASSES))
    path = save_reference(source, tmp_path / "gfl.pth", {"CLASSES": old})
    section = dataclasses.replace(MODEL, checkpoint=str(path))
    assert_equal_weights(build_model(section, COCO_CLASSES), source)
    model = build_model(section, old)  # the data's spelling stays
    assert_equal_weights(model, source)
    assert model.config.label_names == list(old) and model.config.label2id["traffic_light"] == 9
    taught = load_teacher(teacher(path), COCO_CLASSES)
    pairing = pair_up(model.config, taught.config)
    assert pairing.classes == (None, None) and pairing.notes == (), "80 of 80 classes"


def test_no_predictor_is_replaced_for_a_spelling(saved):
    section = dataclasses.replace(MODEL, checkpoint=str(saved))
    with pytest.raises(CheckpointError, match=f"checkpoint {LABELS[0]!r}, data {LABELS[0].upper()!r}"):
        build_model(section, (LABELS[0].upper(), *LABELS[1:]))
    # It would be replaced however the names were spelt.
    assert build_model(section, (LABELS[0].upper(), *LABELS[1:], "gnu")).config.num_labels == 4


def test_a_reference_checkpoint_from_a_url(tmp_path, monkeypatch):
    source = filled(build_model(MODEL, LABELS))
    path, asked = save_reference(source, tmp_path / "gfl.pth"), []
    monkeypatch.setattr(factory, "fetch", lambda url, folder: asked.append((url, folder)) or path)
    assert_equal_weights(load_teacher(teacher("https://host/gfl.pth"), LABELS), source)
    assert asked == [("https://host/gfl.pth", factory.CACHE / "downloads")]


def test_a_model_starts_from_a_reference_checkpoint(tmp_path):
    source = filled(build_model(MODEL, LABELS))
    path = save_reference(source, tmp_path / "gfl.pth")
    assert_equal_weights(build_model(dataclasses.replace(MODEL, checkpoint=str(path)), LABELS), source)


def test_a_reference_checkpoint_of_another_model_leaves_nothing_behind(tmp_path, cache):
    path = save_reference(build_model(MODEL, LABELS), tmp_path / "gfl.pth")
    for section, labels in ((teacher(path, head_blocks=3), LABELS), (teacher(path), (*LABELS, "fox"))):
        with pytest.raises(CheckpointError, match=r"gfl\.pth doesn't hold this model"):
            load_teacher(section, labels)
    assert not cache.exists()


def test_a_reference_checkpoint_that_isnt_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth doesn't exist"):
        load_teacher(teacher(tmp_path / "gone.pth"), LABELS)


def test_a_reference_checkpoint_needs_an_architecture(tmp_path):
    with pytest.raises(CheckpointError, match="doesn't say which detector it holds"):
        load_detector(str(tmp_path / "gfl.pth"), None, ())


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "pytorch_model.bin", "model.safetensors"])
def test_a_file_is_not_called_missing(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / name), name):
        with pytest.raises(CheckpointError, match=f"{name}' is a file.*save_pretrained") as error:
            load_detector(source, None, ())
        assert "no such" not in str(error.value)


def test_pickles_in_a_folder_that_is_no_model_are_named(tmp_path):
    (tmp_path / "latest.pth").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json.* holds latest\.pth.*save_pretrained"):
        load_detector(str(tmp_path), None, ())
    build_config(MODEL, LABELS).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no file named.* holds latest\.pth.*save_pretrained"):
        load_detector(str(tmp_path), None, ())


def test_files_of_a_run_are_not_called_a_model(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"no config\.json.* isn't finished"):
        load_detector(str(tmp_path), None, ())
    build_config(MODEL, LABELS).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"weights are missing.*model\.safetensors") as raised:
        load_detector(str(tmp_path), None, ())
    assert "It holds" not in str(raised.value)


@pytest.mark.parametrize(("weights", "frozen"), [("random", 0), ("file", 1)])
def test_random_stages_are_trained(tmp_path, weights, frozen):
    if weights == "file":
        weights = str(tmp_path / "weights.pth")
        torch.save(timm.create_model("resnet18").state_dict(), weights)
    model = build_model(dataclasses.replace(MODEL, backbone_weights=weights), LABELS)
    assert model.config.frozen_stages == frozen
    assert model.backbone.body.conv1.weight.requires_grad == (frozen == 0)


def test_a_file_of_backbone_weights_that_is_missing_is_named_with_its_key(tmp_path):
    for path in (tmp_path / "gone.pth", tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"model.backbone_weights {path} is no file"):
            build_model(dataclasses.replace(MODEL, backbone_weights=str(path)), LABELS)
