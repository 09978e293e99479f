"""Deprecations of the libraries below fail a test, however they are said."""

from __future__ import annotations

import logging
import warnings

import pytest
from deprecations import BOTH, Deprecation, is_owed


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["transformers.modeling_utils", "peft.peft_model", "jam_hf.model.modeling_jam", "test_x"]
)
def test_a_warning_is_an_error_whoever_it_points_at(category, module):
    with pytest.raises(category, match="old name"):
        warnings.warn_explicit("an old name", category, "file.py", 1, module)


def test_a_warning_that_names_a_library_is_an_error_wherever_it_points():
    with pytest.raises(FutureWarning):
        warnings.warn_explicit("gone in transformers v6", FutureWarning, "file.py", 1, "__main__")


@pytest.mark.parametrize("library", ["transformers.generation.utils", "diffusers.models"])
def test_a_message_that_deprecates_is_an_error(library):
    logger = logging.getLogger(library)
    with pytest.raises(Deprecation, match="is deprecated"):
        logger.warning("`this` is deprecated.")
    logger.warning("`this` is slow.")


def test_config_and_arguments_together_are_for_others_to_say():
    ours, mixin = "/x/jam_hf/integrations/padded_batches.py", "/x/jam_hf/model/generation_jam.py"
    utils, draft, test = (
        "/y/transformers/generation/utils.py",
        "/y/transformers/generation/candidate_generator.py",
        "/x/t.py",
    )
    assert not is_owed(BOTH, [utils, mixin, ours, test])
    assert is_owed(BOTH, [utils, mixin, test]) and is_owed(BOTH, [utils, mixin, draft, utils, mixin, ours])
    assert not is_owed("`this` is deprecated", [utils, mixin, test])
