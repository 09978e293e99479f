"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, and which parameters go where."""

import copy

import pytest
import torch
from conftest import parent_model
from torch import nn

from jam_hf.training import muon
from jam_hf.training.muon import MuonAdamW, muon_parameter_groups, orthogonalise


SHAPES = [(24, 24), (24, 24), (16, 40), (40, 16)]


def _parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _steps(optimizer, parameters, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_matrices_move_as_with_torch_muon():
    """torch's products are in bfloat16, so directions agree to its precision: 8 bits, over five iterations."""
    ours, theirs = _parameters(SHAPES), _parameters(SHAPES)
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    _steps(MuonAdamW([{"params": ours, "muon": True, **settings}], newton_schulz_steps=5), ours, 4)
    _steps(torch.optim.Muon(theirs, **settings), theirs, 4)
    for a, b, before in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (b - before).norm()


def test_the_rest_moves_as_with_torch_adamw():
    shapes = [(10, 4), (6,)]
    ours, theirs, matrix = _parameters(shapes), _parameters(shapes), _parameters([(8, 8)])
    optimizer = MuonAdamW(
        [{"params": matrix, "muon": True}, {"params": ours}], lr=0.01, weight_decay=0.1, betas=(0.9, 0.98)
    )
    matrix[0].grad = torch.ones(8, 8)
    _steps(optimizer, ours, 3)
    _steps(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98)), theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices, steps=5)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3 and values.median() > 0.6
    inside = left.mT @ result @ right.mT  # the same singular directions: diagonal in their basis
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_a_saved_state_goes_on_to_the_same_weights():
    def optimizer(parameters):
        return MuonAdamW([{"params": parameters[:2], "muon": True}, {"params": parameters[2:]}], lr=0.02)

    straight = _parameters([(8, 8), (8, 6), (5,)])
    first = optimizer(straight)
    _steps(first, straight, 3)
    continued = [nn.Parameter(p.detach().clone()) for p in straight]
    second = optimizer(continued)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _steps(first, straight, 3, seed=7)
    _steps(second, continued, 3, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(straight, continued))


def test_iterating_in_parts_changes_nothing(monkeypatch):
    together, apart = _parameters([(24, 24)] * 5), _parameters([(24, 24)] * 5)
    _steps(MuonAdamW([{"params": together, "muon": True}], lr=0.02), together, 2)
    monkeypatch.setattr(muon, "_CHUNK_ELEMENTS", 2 * 24 * 24)
    _steps(MuonAdamW([{"params": apart, "muon": True}], lr=0.02), apart, 2)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"for matrices, got parameters of shapes \[\(5,\)\]"):
        MuonAdamW([{"params": _parameters([(5,)]), "muon": True}])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_embeddings_and_heads_stay_with_adamw(family):
    model = parent_model(family, 60, 1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_parameter_groups(model, 0.02, 1e-3, 0.1)
    taken = {names[id(p)] for p in groups[0]["params"]}
    assert groups[0]["muon"] and all(".layers." in name for name in taken)
    assert taken == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_a_jam_gives_its_streams_and_cross_blocks_to_muon(jam):
    from jam_hf.training.recipes import freeze

    model = jam("llama", "cross", "preserving")
    freeze(model, "vq")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_parameter_groups(model, 0.02, 1e-3, 0.1)
    taken = {names[id(p)] for p in groups[0]["params"]}
    assert all(".layers." in name for name in taken)
    assert {"text_layer", "image_layer", "text_cross", "image_cross"} <= {
        part for name in taken for part in name.split(".")
    }
    rest = {names[id(p)] for group in groups[1:] for p in group["params"]}
    assert {"lm_head.weight", "image_head.weight"} <= rest and not any("vq_model" in name for name in rest | taken)
