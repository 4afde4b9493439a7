import math

import pytest
import torch
from tiny import tiny_batch, tiny_model

from crosskd_hf import CONFIGS, MODELS, GFLConfig, GFLForObjectDetection
from crosskd_hf.models.fpn import FPNConv
from crosskd_hf.models.head import HeadConv

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
    if model.head.spec.scale_boxes:
        assert [scale.item() for scale in model.head.scales] == [1.0] * 5


def test_timm_keeps_its_own_initialisation() -> None:
    model = fresh("gfl")
    conv = model.backbone.body.layer2[0].conv1.weight
    # He normal over the fan out, 128 * 9
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)
    assert model.backbone.body.bn1.running_var.eq(1).all()


def test_a_head_for_other_labels_is_initialised_on_loading(tmp_path) -> None:
    fresh("gfl").save_pretrained(tmp_path)
    model = GFLForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.head.cls_predictor.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.allclose(model.head.cls_predictor.bias, torch.tensor(-math.log(99)))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 65), (64, 96), (1, 1)])
def test_any_image_size(name: str, height: int, width: int) -> None:
    model = fresh(name).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, height, width))
    assert output.logits.shape[:2] == output.pred_boxes.shape[:2]
    assert output.pred_boxes.isfinite().all()
    assert output.level_sizes.sum() == output.logits.shape[1]


@pytest.mark.parametrize("name", DETECTORS)
def test_images_without_boxes(name: str) -> None:
    """Every term is finite; without a positive each is its numerator over 1 image's count (or over 1)."""
    model = tiny_model(name).train()
    batch = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)} for _ in range(2)]
    output = model(batch["pixel_values"], labels=empty, output_distillation=True)
    assert all(term.isfinite() for term in output.loss_dict.values())
    assert all(term == 0 for key, term in output.loss_dict.items() if key != "loss_cls")
    # FCOS counts all positives of the batch, at least 1; the others at least 1 an image.
    assert output.detection.class_normalizer == (1 if name == "fcos" else 2)
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), "every parameter is used (DDP)"


@pytest.mark.parametrize("name", DETECTORS)
def test_an_image_is_assigned_as_if_it_were_alone(name: str) -> None:
    """In a mixed batch, padded boxes and other images change nothing."""
    model = tiny_model(name).eval()
    batch = tiny_batch(images=3)
    together = model(**batch, output_distillation=True).detection.assignment
    for i in range(3):
        alone = model(
            batch["pixel_values"][i : i + 1], labels=[batch["labels"][i]], output_distillation=True
        ).detection.assignment
        assert torch.equal(together.positive[i], alone.positive[0])
        assert torch.equal(together.box_index[i], alone.box_index[0])
        assert torch.equal(together.class_weights[i], alone.class_weights[0])


def test_mask_beyond_an_image_rounded_up_to_32() -> None:
    model = tiny_model("gfl")
    pixels, mask = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)
    mask[0, :40, :70] = True  # rounded up: 64 x 96
    labels = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "class_labels": torch.tensor([0])}]
    output = model(pixels, mask, labels, output_distillation=True)
    assert output.image_sizes.tolist() == [[40, 70]]
    sizes = model.priors(output.head).level_sizes
    weights = output.detection.assignment.class_weights.split(sizes, dim=1)
    assert weights[0].reshape(12, 16).sum(0).tolist() == [8.0] * 12 + [0.0] * 4
    assert weights[0].reshape(12, 16).sum(1).tolist() == [12.0] * 8 + [0.0] * 4
    assert weights[4].tolist() == [[1.0]]


def test_wrong_numbers_of_labels_are_named() -> None:
    with pytest.raises(ValueError, match="1 labels were given for 2 images"):
        tiny_model()(tiny_batch()["pixel_values"], labels=tiny_batch()["labels"][:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("backbone_style", "tensorflow"), ("fpn_extra_convs", "both"), ("head_blocks", 0), ("strides", [4, 8, 16])],
)
def test_configurations_that_cannot_be(field: str, value) -> None:
    with pytest.raises(ValueError, match=field):
        GFLConfig(**{field: value})


def test_a_checkpoint_without_a_backbone_weight_is_noticed(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from crosskd_hf.convert import CheckpointError
    from crosskd_hf.factory import load_detector

    fresh("gfl").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["backbone.body.layer4.0.conv1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = GFLForObjectDetection.from_pretrained(tmp_path)
    weight = model.backbone.body.layer4[0].conv1.weight
    assert weight.device.type == "cpu" and weight.isfinite().all() and 0 < weight.std() < 1
    with pytest.raises(CheckpointError, match=r"layer4\.0\.conv1\.weight"):
        load_detector(str(tmp_path), None, ())
