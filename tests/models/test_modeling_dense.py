"""The detectors as transformers' models: initialisation, inputs, outputs, saving, checkpointing."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model
from torchvision.ops import box_convert

from crosskd_hf import CONFIGS, MODELS, GFLConfig, GFLForObjectDetection
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.models import base as modeling_dense
from crosskd_hf.models.configuration import LIMITS
from crosskd_hf.models.fpn import FPNConv
from crosskd_hf.models.head import HeadConv
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

DETECTORS = sorted(CONFIGS)


def fresh(name: str, **options):
    torch.manual_seed(0)
    return MODELS[name](CONFIGS[name](backbone="resnet18", fpn_channels=64, head_channels=64, num_labels=3, **options))


@pytest.mark.parametrize("name", DETECTORS)
def test_initialisation(name: str) -> None:
    model = fresh(name)
    for key, conv in ((k, m) for k, m in model.named_modules() if isinstance(m, (HeadConv, FPNConv))):
        if isinstance(conv, HeadConv):
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1), key
        else:
            # Xavier uniform: bound sqrt(6 / (fan_in + fan_out)), deviation bound / sqrt(3)
            kernel = conv.kernel_size[0] ** 2
            bound = math.sqrt(6 / (kernel * (conv.in_channels + conv.out_channels)))
            assert conv.weight.abs().max() <= bound, key
            assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), key
        if conv.bias is not None:
            expected = -math.log(99) if key.endswith("cls_predictor") else 0.0
            assert torch.allclose(conv.bias, torch.tensor(expected)), key
    # timm's own: He normal over the fan out, 128 * 9.
    weight = model.backbone.body.layer2[0].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)
    assert model.backbone.body.bn1.running_var.eq(1).all()
    if model.head.spec.scale_boxes:
        assert [scale.item() for scale in model.head.scales.parameters()] == [1.0] * 5


def test_a_head_for_other_labels_is_initialised_on_loading(tmp_path) -> None:
    fresh("gfl").save_pretrained(tmp_path)
    model = GFLForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.head.cls_predictor.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.allclose(model.head.cls_predictor.bias, torch.tensor(-math.log(99)))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("height", "width"), [(33, 65), (1, 1)])
def test_any_image_size(name: str, height: int, width: int) -> None:
    with torch.no_grad():
        output = tiny_model(name, head_blocks=1).eval()(torch.randn(1, 3, height, width))
    assert output.logits.shape[:2] == output.pred_boxes.shape[:2]
    assert output.pred_boxes.isfinite().all()
    assert output.level_sizes.sum() == output.logits.shape[1]


@pytest.mark.parametrize("name", DETECTORS)
def test_images_without_boxes(name: str) -> None:
    """Every term is finite; without a positive each is its numerator over 1 image's count (or over 1)."""
    model = tiny_model(name, head_blocks=1).train()
    batch = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)} for _ in range(2)]
    output = model(batch["pixel_values"], labels=empty)
    assert all(term.isfinite() for term in output.loss_dict.values())
    assert all(term == 0 for key, term in output.loss_dict.items() if key != "loss_cls")
    # FCOS counts all positives of the batch, at least 1; the others at least 1 an image.
    targets = DenseObserver(model)(batch["pixel_values"], labels=empty).targets
    assert targets.class_normalizer == (1 if name == "fcos" else 2)
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), "every parameter is used (DDP)"


def test_mask_beyond_an_image_rounded_up_to_32() -> None:
    model = tiny_model("gfl")
    pixels, mask = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)
    mask[0, :40, :70] = True  # rounded up: 64 x 96
    labels = [{"boxes": torch.tensor([[0.25, 0.5, 0.4, 0.5]]), "class_labels": torch.tensor([0])}]
    sizes = model(pixels, mask).level_sizes[0].tolist()
    targets = DenseObserver(model)(pixels, mask, labels).targets
    assert targets.image_sizes.tolist() == [[40, 70]]
    weights = targets.mask.split(sizes, dim=1)
    assert weights[0].reshape(12, 16).sum(0).tolist() == [8.0] * 12 + [0.0] * 4
    assert weights[0].reshape(12, 16).sum(1).tolist() == [12.0] * 8 + [0.0] * 4
    assert weights[4].tolist() == [[1.0]]


@pytest.mark.parametrize("most", [0, 8])
def test_padded_labels_give_the_losses_of_a_list(most: int) -> None:
    """Whatever the padding holds. Without any box, there may be none even as padding."""
    model, batch = tiny_model(head_blocks=1).eval(), tiny_batch(images=3)
    if most == 0:
        batch["labels"] = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)}] * 3
    listed = model(**batch).loss_dict
    boxes, classes = torch.full((3, most, 4), 7.0), torch.ones(3, most, dtype=torch.long)
    mask = torch.zeros(3, most, dtype=torch.bool)
    for i, label in enumerate(batch["labels"]):
        count = len(label["boxes"])
        boxes[i, :count] = box_convert(label["boxes"], "cxcywh", "xyxy") * torch.tensor([96, 64, 96, 64])
        classes[i, :count], mask[i, :count] = label["class_labels"], True
    labels = {"boxes_xyxy": boxes, "class_labels": classes, "mask": mask}
    torch.testing.assert_close(model(batch["pixel_values"], labels=labels).loss_dict, listed)
    with pytest.raises(ValueError, match="padded labels need boxes_xyxy, class_labels and mask; mask missing"):
        model(batch["pixel_values"], labels={"boxes_xyxy": boxes, "class_labels": classes})
    for wrong in (labels, batch["labels"]):
        with pytest.raises(ValueError, match="3 labels were given for 2 images"):
            model(batch["pixel_values"][:2], labels=wrong)


@pytest.mark.parametrize(
    ("detector", "field", "value"),
    [
        *(("gfl", "backbone_style", "tensorflow"), ("gfl", "fpn_extra_convs", "both"), ("gfl", "head_blocks", 0)),
        *(("gfl", "head_blocks", 65), ("gfl", "strides", [4, 8, 16]), ("gfl", "strides", [8, 16])),
        *(("gfl", "strides", [8, 16, 32, 48]), ("gfl", "nms_threshold", float("nan")), ("gfl", "nms_threshold", 1.01)),
        *(("gfl", "frozen_stages", -2), ("gfl", "num_labels", 10**9), ("gfl", "id2label", {})),
        *(("gfl", "id2label", {0: "a", 2: "b"}), ("gfl", "id2label", {0: None}), ("gfl", "id2label", ["a"])),
        *(("retinanet", "anchor_ratios", []), ("retinanet", "anchor_ratios", [1.0, float("nan")])),
        *(("retinanet", "negative_iou", 0.6), ("fcos", "regress_ranges", [[64.0, -1.0]])),
        *(("fcos", "strides", [8, 16, 32, 64]), ("fcos", "regress_ranges", [[64.0]])),
        *(("atss", "delta_scales", [0.1, 0.1]), ("atss", "delta_scales", [0.1, 0.1, 0.2, 0.0])),
    ],
)
def test_configurations_that_cannot_be(detector: str, field: str, value) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=field):
        CONFIGS[detector](**{field: value})


def test_limits_are_inclusive_and_of_fields_that_there_are() -> None:
    config = GFLConfig(nms_threshold=0.0, drop_path_rate=1.0, head_blocks=64, num_labels=3, strides=[8, 16, 32])
    assert GFLConfig(frozen_stages=-1).frozen_stages == -1, "MMDetection's word for none"
    assert config.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    fields = set(DenseDetectorImageProcessor().to_dict()).union(*(vars(made()) for made in CONFIGS.values()))
    assert set(LIMITS) <= fields


def test_a_backbone_weight_that_a_checkpoint_lacks_is_initialised(tmp_path) -> None:
    fresh("gfl").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["backbone.body.layer4.0.conv1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = GFLForObjectDetection.from_pretrained(tmp_path)
    weight = model.backbone.body.layer4[0].conv1.weight
    assert weight.device.type == "cpu" and weight.isfinite().all() and 0 < weight.std() < 1


def test_hidden_states_are_the_maps_of_backbone_and_fpn() -> None:
    model, pixels = tiny_model().eval(), tiny_batch()["pixel_values"]
    with torch.no_grad():
        output, plain = model(pixels, output_hidden_states=True), model(pixels)
        features = DenseObserver(model)(pixels).features
        model.config.output_hidden_states = True
        by_config, without = model(pixels), model(pixels, output_hidden_states=False)
    assert [tuple(state.shape[1:]) for state in output.hidden_states[:3]] == [(128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert all(torch.equal(*pair) for pair in zip(output.hidden_states[3:], features, strict=True))
    assert len(by_config.hidden_states) == 8 and plain.hidden_states is without.hidden_states is None


def test_a_tuple_holds_what_the_output_holds() -> None:
    model, batch = tiny_model().eval(), tiny_batch()
    with torch.no_grad():
        output, as_tuple = model(**batch), model(**batch, return_dict=False)
        model.config.return_dict = False
        by_config = model(**batch)
    assert isinstance(as_tuple, tuple) and isinstance(by_config, tuple)
    assert torch.equal(as_tuple[0], output.loss) and as_tuple[1] == output.loss_dict
    assert torch.equal(as_tuple[2], output.logits) and torch.equal(by_config[3], output.pred_boxes)


@pytest.mark.parametrize(("name", "dtype"), [("gfl", torch.bfloat16), ("fcos", torch.float16)])
def test_half_precision_weights_take_fp32_pixels(tmp_path, name: str, dtype: torch.dtype) -> None:
    model, pixels = tiny_model(name).eval(), tiny_batch()["pixel_values"]
    model.save_pretrained(tmp_path)
    half = MODELS[name].from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    with torch.no_grad():
        expected, output = model(pixels), half(pixels)
    assert output.pred_boxes.dtype == torch.float32, "a pixel of a large box is more than half precision resolves"
    assert (output.logits.sigmoid() - expected.logits.sigmoid()).abs().mean() < 0.02


def test_parts_may_lie_on_the_disk(tmp_path) -> None:
    model, pixels = tiny_model().eval(), tiny_batch()["pixel_values"]
    model.save_pretrained(tmp_path / "model", max_shard_size="2MB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 5, "saved in shards"
    places = {"backbone": "disk", "fpn": "cpu", "head": "disk"}
    split = GFLForObjectDetection.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {p.device.type for p in split.head.parameters()} == {"meta"}
    with torch.no_grad():
        expected, output = model(pixels), split.eval()(pixels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.pred_boxes, expected.pred_boxes)


def test_activation_checkpointing_changes_no_gradient() -> None:
    model, batch = tiny_model(head_blocks=2).train(), tiny_batch(height=96)
    calls = {"stage": 0, "block": 0}
    model.backbone.body.layer2[0].conv1.register_forward_hook(lambda *_: calls.update(stage=calls["stage"] + 1))
    model.head.cls_tower[0].conv.register_forward_hook(lambda *_: calls.update(block=calls["block"] + 1))
    kept = gradients(model, batch)
    assert calls == {"stage": 1, "block": 5}
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    again = gradients(model, batch)
    assert calls == {"stage": 3, "block": 15}, "stages and towers are computed again"
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[key], again[key], rtol=1e-4, atol=1e-6) for key in kept)


def gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_batchnorm_statistics_are_not_counted_twice() -> None:
    model = tiny_model(freeze_batchnorm_statistics=False)
    with pytest.raises(ValueError, match="freeze_batchnorm_statistics"):
        model.activation_checkpointing_enable()


def test_only_safetensors_are_written_and_label_names_come_back(tmp_path) -> None:
    tiny_model("atss").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = MODELS["atss"].from_pretrained(tmp_path)
    assert again.config.id2label == {0: "cat", 1: "dog"} and again.config.label2id == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda label: {"boxes": label["boxes"] * 96}, "box 0 of image 0 has .* in pixels .* cxcywh, relative"),
        (lambda label: {"class_labels": label["class_labels"] + 2}, "from 0 to 1"),
        (lambda label: {"boxes": label["boxes"][1:]}, r"image 0 needs boxes \(G, 4\) .*got \(\(0, 4"),
        (lambda label: {"class_labels": label["class_labels"].float()}, r"class_labels of image 0 are torch\.float32"),
        (lambda label: {"boxes": label["boxes"].tolist()}, "image 0 needs tensors"),
    ],
)
def test_labels_of_a_hand_written_loop_are_checked(change, words):
    """See `check_relative_labels`."""
    batch = tiny_batch()
    wrong = [{**label, **change(label)} for label in batch["labels"]]
    with pytest.raises(ValueError, match=words):
        tiny_model().train()(batch["pixel_values"], labels=wrong)


def test_labels_of_other_shapes_are_refused_by_name():
    batch, model = tiny_batch(), tiny_model().train()
    pixels = batch["pixel_values"]
    with pytest.raises(ValueError, match="labels is an empty list"):
        model(pixels, labels=[])
    with pytest.raises(ValueError, match=r"class_labels missing \(it has boxes, labels\)"):
        model(pixels, labels=[{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}] * 2)
    with pytest.raises(ValueError, match=r"pixel_mask is \(2, 8, 8\)"):
        model(pixels, torch.ones(2, 8, 8))
    nothing = {"boxes": torch.tensor([]), "class_labels": torch.tensor([])}  # as floats, as torch makes them
    assert model(pixels, labels=[nothing] * 2).loss.isfinite()


def test_labels_are_looked_at_in_the_first_batch_only(monkeypatch):
    """On a GPU the host waits for it. What the collator has padded, it has looked at."""
    looked_at, model, batch = [], tiny_model().train(), tiny_batch()
    monkeypatch.setattr(modeling_dense, "check_relative_labels", lambda *args: looked_at.append(args))
    labels = batch.pop("labels")
    boxes, classes = (torch.stack([label[key][:1] for label in labels]) for key in ("boxes", "class_labels"))
    model(
        **batch,
        labels={"boxes_xyxy": boxes, "class_labels": classes, "mask": torch.ones_like(classes, dtype=torch.bool)},
    )
    assert len(looked_at) == 0
    model(**batch, labels=labels)
    model(**batch, labels=labels)
    assert len(looked_at) == 1


def test_padding_without_a_mask_is_told_once(monkeypatch):
    told, model, pixels = [], tiny_model().eval(), tiny_batch()["pixel_values"]
    monkeypatch.setattr(modeling_dense.logger, "warning", told.append)
    padded, mask = pixels.clone(), torch.ones(2, 64, 96)
    padded[1, :, 60:], mask[1, 60:] = 0, 0
    with torch.no_grad():
        for arguments in ((pixels,), (torch.zeros(1, 3, 32, 32),), (padded, mask)):
            model(*arguments)
        assert not told
        model(padded)
        model(padded)
    assert len(told) == 1 and "pixel_mask" in told[0]


def test_boxes_are_relative_to_what_the_mask_or_the_label_says_is_the_image():
    """The same box, given relative to the image and relative to the padded batch, and predictions of both."""
    model = tiny_model("gfl", head_blocks=1).eval()
    pixels, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[0, :40, :80] = True
    pixels = pixels * mask[:, None]
    classes = {"class_labels": torch.tensor([1])}
    of_image = {**classes, "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}
    of_batch = {**classes, "boxes": of_image["boxes"] * torch.tensor([80 / 96, 40 / 64] * 2)}
    sizes = torch.tensor([40, 80]), torch.tensor([64, 96])
    first = model(pixels, mask, [of_image])
    for inputs in (
        (pixels, mask, [{**of_image, "size": sizes[0]}]),
        (pixels, mask, [{**of_batch, "size": sizes[1]}]),
        (pixels, None, [{**of_image, "size": sizes[0]}]),
    ):
        output = model(*inputs)
        torch.testing.assert_close(output.loss_dict, first.loss_dict)
        torch.testing.assert_close(output.pred_boxes, first.pred_boxes)
    whole = model(pixels, None, [{**of_batch, "size": sizes[1]}])
    torch.testing.assert_close(whole.pred_boxes, first.pred_boxes * torch.tensor([80 / 96, 40 / 64] * 2))


def test_a_size_that_is_the_files_is_refused():
    batch = tiny_batch(2)
    some = [{**batch["labels"][0], "size": torch.tensor([64, 96])}, batch["labels"][1]]
    with pytest.raises(ValueError, match="image 1 has no size, but others do"):
        tiny_model().train()(batch["pixel_values"], labels=some)
    batch = tiny_batch(1)
    label = {**batch["labels"][0], "size": torch.tensor([640, 960])}
    with pytest.raises(ValueError, match=r"size is \[\[640, 960\]\] for pixel_values of 64 x 96.*orig_size"):
        tiny_model().train()(batch["pixel_values"], labels=[label])


@pytest.mark.parametrize("name", ["fcos", "atss"])
def test_scores_are_class_scores_times_centerness(name):
    model, pixels = tiny_model(name, head_blocks=1).eval(), tiny_batch()["pixel_values"]
    observer = DenseObserver(model)
    observer.ask_for_predictions()
    shown, output = observer(pixels).predictions, model(pixels)
    scores = shown.logits.double().sigmoid() * shown.quality.double().sigmoid()[..., None]
    torch.testing.assert_close(output.logits.double().sigmoid(), scores, rtol=1e-5, atol=0)
