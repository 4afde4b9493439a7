"""transformers' `ModelTesterMixin` on the four detectors. Run by `python tests/upstream/run.py`, else skipped."""

import copy
import unittest

import pytest
import torch

common = pytest.importorskip("transformers_tests.test_modeling_common", reason="python tests/upstream/run.py")
configuration = pytest.importorskip("transformers_tests.test_configuration_common")

import crosskd_hf  # noqa: E402


class DetectorTester:
    """A tiny detector and a batch for it, as the common tests ask for them."""

    batch_size, height, width, num_labels = 2, 64, 96, 3
    is_training = True
    # Read by `test_num_layers_is_small`: the tower blocks, the only layers whose number is configured here.
    num_hidden_layers = 2
    expected_num_hidden_layers = 8  # C3, C4, C5, P3 .. P7

    def __init__(self, parent: unittest.TestCase, name: str):
        self.parent = parent
        self.config_class = crosskd_hf.CONFIGS[name]

    def get_config(self):
        return self.config_class(
            backbone="test_resnet",
            fpn_channels=32,
            head_channels=32,
            head_blocks=self.num_hidden_layers,
            num_labels=self.num_labels,
            frozen_stages=0,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(self.batch_size, 3, self.height, self.width, generator=generator)
        mask = torch.ones(self.batch_size, self.height, self.width, dtype=torch.bool)
        return self.get_config(), {"pixel_values": pixels, "pixel_mask": mask}

    def labels(self):
        box = torch.tensor([[0.25, 0.4, 0.3, 0.5], [0.6, 0.5, 0.6, 0.7]])
        return [{"boxes": box.clone(), "class_labels": torch.tensor([0, 2])} for _ in range(self.batch_size)]


class DetectorTests(common.ModelTesterMixin):
    """What the four have in common."""

    name: str
    has_attentions = False  # a convolutional head; a Swin backbone's attentions aren't given out
    test_resize_embeddings = False  # no vocabulary

    def setUp(self):
        self.model_tester = DetectorTester(self, self.name)
        self.config_tester = configuration.ConfigTester(
            self,
            config_class=self.model_tester.config_class,
            has_text_modality=False,
            common_properties=["num_labels"],
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        return inputs | {"labels": self.model_tester.labels()} if return_labels else inputs

    # Skipped: the backbone's weights are timm's, drawn by timm when it is built; `_init_weights` only fills a gap.
    @unittest.skip("timm draws the backbone's weights")
    def test_can_init_all_missing_weights(self):
        pass

    # Overridden: hidden states are maps (N, C, H, W) of several strides, not sequences.
    def test_hidden_states_output(self):
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        sizes = [(tester.height // stride, tester.width // stride) for stride in (8, 16, 32)]
        expected = [*sizes, *sizes, (1, 2), (1, 1)]
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                config.output_hidden_states = by_config
                model = model_class(copy.deepcopy(config)).eval()
                with torch.no_grad():
                    outputs = model(**inputs, **({} if by_config else {"output_hidden_states": True}))
                self.assertEqual([tuple(state.shape[-2:]) for state in outputs.hidden_states], expected)
                self.assertEqual(len(outputs.hidden_states), tester.expected_num_hidden_layers)

    # Overridden: the input embedding is the first convolution, not an `nn.Embedding`, and isn't exchanged.
    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
            self.assertIsNone(model.get_output_embeddings())

    def test_config(self):
        self.config_tester.run_common_tests()


class GFLTest(DetectorTests, unittest.TestCase):
    name = "gfl"
    all_model_classes = (crosskd_hf.GFLForObjectDetection,)


class RetinaNetTest(DetectorTests, unittest.TestCase):
    name = "retinanet"
    all_model_classes = (crosskd_hf.RetinaNetForObjectDetection,)


class FCOSTest(DetectorTests, unittest.TestCase):
    name = "fcos"
    all_model_classes = (crosskd_hf.FCOSForObjectDetection,)


class ATSSTest(DetectorTests, unittest.TestCase):
    name = "atss"
    all_model_classes = (crosskd_hf.ATSSForObjectDetection,)


del DetectorTests  # without a name of its own, unittest would not run it, but pytest would collect it
