"""The README.md of a fused checkpoint is a model card that the Hub can read."""

import pytest
from huggingface_hub import ModelCard

from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.model_card import model_card


@pytest.mark.feature("Hub", "model card")
@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "preserving")])
def test_a_fusion_has_a_valid_model_card(fused, mode, init):
    folder = fused("llama", mode, init)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
    assert "jam" in card.data.tags and card.data.base_model is None
    for words in (
        mode,
        f"| init | {init} |",
        "torchvision",
        "trust_remote_code=True",
        "import jam_hf",
        "max_new_tokens=18",
    ):
        assert words in card.text
    assert str(folder.parent) not in card.content  # where it lay on this machine is nobody else's business


def test_parents_on_the_hub_are_named(parents, vq):
    plan = plan_fusion(*parents("llama"), "cross", vq_model=vq)
    text, image = plan.text.parent, plan.image.parent
    text.hub_id, text.revision, text.license = "a/text", "0123abc", "llama2"
    image.hub_id, image.license = "b/image", "mit"
    card = ModelCard(model_card(plan))
    assert card.data.base_model == ["a/text", "b/image"] and card.data.license == "other"
    assert "[a/text](https://huggingface.co/a/text), revision `0123abc` (Llama; licence: llama2)" in card.text
    assert plan.digest[:16] in card.text and "Both parents: text logits equal" in card.text
    text.hub_id, image.license = None, "llama2"
    card = ModelCard(model_card(plan))
    assert card.data.base_model == ["b/image"] and card.data.license == "llama2" and "not on the Hub" in card.text


def test_the_code_in_the_card_runs(fused):
    """The block for those who have jam_hf, as it stands but for the name and a limit on the length."""
    folder = fused("llama", "uniform", "average")
    code = ModelCard.load(folder / "README.md").text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(
        code.replace('"path/or/id"', repr(str(folder))).replace('"interleaved")', '"interleaved", max_new_tokens=8)'),
        names,
    )
    assert isinstance(names["segments"], list)
