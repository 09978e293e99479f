"""What transformers' own tests need to know about a model that lives outside the library; their bodies stay as they
are.

Loaded as a pytest plugin before the suites. Each entry says why it is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from jam_hf.model import modeling_jam_cross


# Every day the tests that train for long or start processes, a third of all time, run on one JAM of each mode; nightly
# on all. So does the one that loads a model in all dtypes by all classes, five seconds for each JAM.
LONG = {"is_training_test", "is_tensor_parallel_test", "is_fsdp_test"}
LONG_BY_NAME = {"test_bc_torch_dtype"}
EVERY_DAY = {"UniformLlama", "WidthOPT", "CrossFamilies"}


def without_values(tensor: torch.Tensor, spec: str, with_them: Any = torch.Tensor.__format__) -> str:
    """One test writes out every parameter, many times, for messages that are rarely read: half of its time."""
    return with_them(tensor, spec) if tensor.dim() == 0 else f"<{tensor.dtype}, {list(tensor.shape)}>"


torch.set_num_threads(1)
torch.Tensor.__format__ = without_values

# The tests tell a base model from one with a head by its name in such tables; jam_hf itself puts JamForCausalLM into
# them.
modeling_auto.MODEL_MAPPING_NAMES["jam"] = "JamModel"

# By default these run for the model types that transformers' own CI pays for; without a list they run for all.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


def draw_weights_in_place_of_zeros() -> None:
    """Cross blocks of the preserving form start at zero: every test that looks through one would pass, whatever it
    does.
    """
    zero_aware = modeling_jam_cross.JamPreTrainedModel._init_weights

    @torch.no_grad()
    def _init_weights(self: modeling_jam_cross.JamPreTrainedModel, module: torch.nn.Module) -> None:
        zero_aware(self, module)
        if isinstance(module, modeling_jam_cross.ZeroInitLinear):
            init.normal_(module.weight, std=self.config.initializer_range)

    modeling_jam_cross.JamPreTrainedModel._init_weights = _init_weights


draw_weights_in_place_of_zeros()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="on all JAMs what otherwise runs on three")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suites = {item.cls.__name__ for item in items}
    assert EVERY_DAY <= suites, f"no such suite: {EVERY_DAY - suites}"
    if config.getoption("--nightly"):
        return
    for item in items:
        long = item.originalname in LONG_BY_NAME or LONG & {mark.name for mark in item.iter_markers()}
        if long and item.cls.__name__ not in EVERY_DAY:
            item.add_marker(pytest.mark.skip(reason=f"nightly (every day on {', '.join(sorted(EVERY_DAY))})"))
