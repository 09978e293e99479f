"""transformers' `ModelTesterMixin` and its training, tensor-parallel and FSDP mixins, run on JAMs and on a stock Llama.

No test body is here: expectations that cannot hold are turned off by the suite's own knobs, each with its reason.
"""

from __future__ import annotations

import unittest

import testers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import PreTrainedConfig


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin):
    model_tester_class = testers.ModelTester
    model_tester = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.all_model_classes = (cls.model_tester_class.base_model_class, cls.model_tester_class.causal_lm_class)

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)

    def _get_tp_config(self, tie_word_embeddings: bool | None = None) -> PreTrainedConfig:
        config = super()._get_tp_config(tie_word_embeddings)
        # Compares what random models write under float8, where every near tie is a coin toss: with the usual spread of
        # weights a stock Llama fails one seed in eight, too. Smaller weights have fewer near ties.
        if self._testMethodName == "test_tp_generation_quantized":
            config.initializer_range = 0.005
        return config


NO_TYING = unittest.skip(
    "the preserving form keeps two input embeddings side by side; no output projection can be tied to them"
)


class PreservingSuite(Suite):
    """Of a cross JAM in the preserving form, whose config refuses `tie_word_embeddings=True`."""

    model_tester_class = testers.CrossLlamaTester
    test_tp_forward_1 = NO_TYING(Suite.test_tp_forward_1)
    test_fsdp2_sharding_structure_1_tied = NO_TYING(Suite.test_fsdp2_sharding_structure_1_tied)
    test_fsdp2_plan_vs_ddp_1_tied = NO_TYING(Suite.test_fsdp2_plan_vs_ddp_1_tied)


def suite(label: str, model_tester_class: type[testers.ModelTester], base: type[Suite] = Suite) -> type:
    return type(label, (base, unittest.TestCase), {"model_tester_class": model_tester_class, "__module__": __name__})


StockLlama = suite("StockLlama", testers.ModelTester)
UniformLlama = suite("UniformLlama", testers.UniformLlamaTester)
WidthLlama = suite("WidthLlama", testers.WidthLlamaTester)
CrossLlama = suite("CrossLlama", testers.CrossLlamaTester, PreservingSuite)
CrossUnequalLlama = suite("CrossUnequalLlama", testers.CrossUnequalTester, PreservingSuite)
CrossDepthsLlama = suite("CrossDepthsLlama", testers.CrossDepthsTester, PreservingSuite)
CrossFamilies = suite("CrossFamilies", testers.CrossFamiliesTester, PreservingSuite)
CrossPaperLlama = suite("CrossPaperLlama", testers.CrossPaperLlamaTester)
UniformOPT = suite("UniformOPT", testers.UniformOPTTester)
WidthOPT = suite("WidthOPT", testers.WidthOPTTester)
CrossOPT = suite("CrossOPT", testers.CrossOPTTester, PreservingSuite)
CrossPaperOPT = suite("CrossPaperOPT", testers.CrossPaperOPTTester)
