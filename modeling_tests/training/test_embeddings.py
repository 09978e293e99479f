"""Image codes that look alike start alike."""

import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CODES, parent_model

from jam_hf.training.embeddings import initialise_image_embeddings, word_features


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_keep_the_codebooks_geometry(family, vq):
    model = parent_model(family, 60, 1)
    before = model.get_input_embeddings().weight.detach().clone()
    assert initialise_image_embeddings(model, vq, 60 - NUM_CODES, std=0.06) == NUM_CODES
    codebook = vq.vq.quantize.embedding.weight.detach()
    centred = codebook - codebook.mean(0)
    values, vectors = torch.linalg.eigh(
        centred.double() @ centred.double().T
    )  # half-whitened: the root of the Gram matrix
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    expected = (root / (root.diag()[:, None] * root.diag()).sqrt()).float()
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        rows = table[60 - NUM_CODES :].detach()
        torch.testing.assert_close(
            F.cosine_similarity(rows[:, None], rows[None], dim=-1), expected, rtol=1e-3, atol=1e-3
        )
        assert rows.std().item() == pytest.approx(0.06, rel=1e-3)
    assert torch.equal(model.get_input_embeddings().weight[: 60 - NUM_CODES], before[: 60 - NUM_CODES])


def test_codes_outside_the_vocabulary_are_refused(vq):
    with pytest.raises(ValueError, match="vocabulary has 60"):
        initialise_image_embeddings(parent_model("llama", 60, 1), vq, 50, 0.06)


def test_codes_that_share_a_word_share_a_direction():
    """Codes 0 and 1 come with the word 7, codes 2 and 3 with the word 8; code 4 never comes."""
    documents = [[1, 7, 20 + i % 2] for i in range(50)] + [[1, 8, 22 + i % 2] for i in range(50)]
    features = word_features(documents, torch.arange(20, 25), 25, size=3)
    alike = F.cosine_similarity(features[:4, None], features[None, :4], dim=-1)
    assert alike[0, 1] > 0.99 and alike[2, 3] > 0.99
    assert alike[0, 2] < -0.9 and not features[4].abs().max() > 1e-6


def test_codes_in_any_order(vq):
    """The rows are those of codes in a row, each at its own id."""
    documents = [[1, 7, 44 + i % NUM_CODES] for i in range(80)]
    order = torch.randperm(NUM_CODES, generator=torch.Generator().manual_seed(0))
    ids = 44 + order
    shuffled = [[1, 7, int(ids[document[2] - 44])] for document in documents]
    models = [parent_model("llama", 60, 1) for _ in range(2)]
    assert initialise_image_embeddings(models[0], vq, 44, 0.06, documents) == NUM_CODES
    assert initialise_image_embeddings(models[1], vq, ids, 0.06, shuffled) == NUM_CODES
    for plain, permuted in zip(*([m.get_input_embeddings().weight, m.get_output_embeddings().weight] for m in models)):
        torch.testing.assert_close(permuted[ids], plain[44:])
        assert torch.equal(permuted[:44], plain[:44])
    with pytest.raises(ValueError, match="5 ids for the 16 codes"):
        initialise_image_embeddings(models[0], vq, ids[:5], 0.06)
