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


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin):
    model_tester_class: type[testers.ModelTester]
    model_tester = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.all_model_classes = (cls.model_tester_class.base_model_class, cls.model_tester_class.causal_lm_class)

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)


def suite(label: str, model_tester_class: type[testers.ModelTester]) -> type:
    return type(label, (Suite, unittest.TestCase), {"model_tester_class": model_tester_class, "__module__": __name__})


TestStockLlama = suite("TestStockLlama", testers.ModelTester)
TestUniformLlama = suite("TestUniformLlama", testers.UniformLlamaTester)
TestWidthLlama = suite("TestWidthLlama", testers.WidthLlamaTester)
TestCrossLlama = suite("TestCrossLlama", testers.CrossLlamaTester)
TestCrossUnequal = suite("TestCrossUnequal", testers.CrossUnequalTester)
TestCrossPaperLlama = suite("TestCrossPaperLlama", testers.CrossPaperLlamaTester)
TestUniformOPT = suite("TestUniformOPT", testers.UniformOPTTester)
TestWidthOPT = suite("TestWidthOPT", testers.WidthOPTTester)
TestCrossOPT = suite("TestCrossOPT", testers.CrossOPTTester)
TestCrossPaperOPT = suite("TestCrossPaperOPT", testers.CrossPaperOPTTester)
