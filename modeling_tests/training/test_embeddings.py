"""Image codes that look alike start alike."""

import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CODES, parent_model

from jam_hf.training.embeddings import initialise_image_embeddings


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_keep_the_codebooks_geometry(family, vq):
    model = parent_model(family, 60, 1)
    before = model.get_input_embeddings().weight.detach().clone()
    assert initialise_image_embeddings(model, vq, 60 - NUM_CODES, std=0.06) == NUM_CODES
    codebook = vq.vq.quantize.embedding.weight.detach()
    centred = codebook - codebook.mean(0)
    expected = F.cosine_similarity(centred[:, None], centred[None], dim=-1)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        rows = table[60 - NUM_CODES :].detach()
        torch.testing.assert_close(F.cosine_similarity(rows[:, None], rows[None], dim=-1), expected, rtol=1e-3, atol=1e-4)
        assert rows.std().item() == pytest.approx(0.06, rel=1e-3)
    assert torch.equal(model.get_input_embeddings().weight[: 60 - NUM_CODES], before[: 60 - NUM_CODES])


def test_codes_outside_the_vocabulary_are_refused(vq):
    with pytest.raises(ValueError, match="vocabulary has 60"):
        initialise_image_embeddings(parent_model("llama", 60, 1), vq, 50, 0.06)
