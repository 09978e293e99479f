"""What a JAM was made of goes with it wherever it is saved: card (README.md), recipe (fusion.yaml) and what was done
since.

`JamConfig.provenance` holds the three: "card" and "recipe" are the texts of the files as the fusion wrote them,
"history" is a list of mappings. A save writes what is missing in its folder; a card that another tool wrote there (the
Trainer, peft, the Hub) keeps its words and gets licence, parents and history. It knows texts and folders, not what they
say.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging


logger = logging.get_logger(__name__)

CARD, RECIPE = "README.md", "fusion.yaml"
START, END = "<!-- jam provenance -->", "<!-- /jam provenance -->"
SINCE, SINCE_END = "<!-- done since -->", "<!-- /done since -->"
UNTRAINED = "A fusion is a starting point: it has not been trained jointly yet."
ELSEWHERE = "the weights were changed (by training, merging or editing)"
_LARGEST = 1 << 20
_SAMPLED = 8  # numbers of each tensor, by which a change of the weights is seen

# Who writes a card of its own into a folder, and where that folder is said.
_CARD_WRITERS = (
    ("transformers.trainer", "Trainer", "create_model_card"),
    ("trl.trainer.base_trainer", "_BaseTrainer", "create_model_card"),
    ("trl.trainer.base_trainer", "BaseTrainer", "create_model_card"),
    ("peft.peft_model", "PeftModel", "create_or_update_model_card"),
)


def carry_on(config: Any, folder: str | os.PathLike) -> None:
    """Write card and recipe into a folder where they are missing, and complete a card that is there; see `carried`.

    Nothing for a JAM that was not made by a fusion. Raises `OSError` if the folder cannot be written.
    """
    provenance = getattr(config, "provenance", None)
    if not provenance or not Path(folder).is_dir():
        return
    recipe, card = Path(folder) / RECIPE, Path(folder) / CARD
    if provenance.get("recipe") and not recipe.exists():
        recipe.write_text(provenance["recipe"], encoding="utf-8")
    try:
        before = card.read_bytes().decode("utf-8") if card.exists() else ""
    except UnicodeDecodeError:
        logger.warning(f"{card} is not UTF-8 and stays as it is, without licence and parents of this JAM.")
        return
    after = carried(config, before)
    if after != before:
        card.write_bytes(after.encode("utf-8"))


def carried(config: Any, text: str) -> str:
    """A card, UTF-8 text, with the JAM's licence, parents and history; the whole card of the JAM where `text` is
    empty.
    """
    provenance = getattr(config, "provenance", None) or {}
    own = _with_history(provenance.get("card") or "", provenance.get("history") or [])
    if not own or not text.strip():
        return own or text
    try:
        ours, theirs = ModelCard(own, ignore_metadata_errors=True), ModelCard(text, ignore_metadata_errors=True)
        changed = _complete(theirs.data, ours.data)
    except Exception:  # a card is free text: what cannot be read as one is left to who wrote it
        logger.warning(
            "The card in this folder has a head that is no YAML; it stays, without the JAM's licence and parents."
        )
        return text
    if changed:
        text = f"---\n{theirs.data.to_yaml()}\n---\n{theirs.text if theirs.content.startswith('---') else text}"
    section = _between(own, START, END) or _between(own, SINCE, SINCE_END)
    if section is None:
        return text
    for marks in ((START, END), (SINCE, SINCE_END)):
        old, new = _between(text, *marks), _between(own, *marks)
        if old is not None and new is not None:
            return text.replace(old, new)
    return f"{text.rstrip()}\n\n{section}\n"


def record(model: Any, what: str, **facts: Any) -> None:
    """Note in the config of a fused JAM what was done with its weights since; it stands in every card from now on."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "provenance", None):
        return
    history = [entry for entry in config.provenance.get("history") or [] if not entry.get("session")]
    config.provenance = {**config.provenance, "history": [*history, {"what": what, **facts}]}
    remember(model)


def remember(model: Any) -> None:
    """Take the weights as they are for those that the history tells of."""
    model.__dict__["_jam_told"] = _sample(dict(model.named_parameters()))


def note_changes(model: Any, state: dict[str, torch.Tensor] | None = None) -> None:
    """Add to the history that the weights are others than those loaded, where that is so and nothing tells of it
    yet.
    """
    told = model.__dict__.get("_jam_told")
    if told is None or not getattr(model.config, "provenance", None):
        return
    now = _sample(state if state is not None else dict(model.named_parameters()))
    for name in told.keys() & now.keys():
        before, after = told[name], now[name]
        if before.shape != after.shape or not torch.equal(before.to(after.dtype), after):
            record(model, ELSEWHERE, transformers=transformers.__version__)
            model.config.provenance["history"][-1]["session"] = True  # one entry, however often it is saved
            model.__dict__["_jam_told"] = told
            return


def before_saving(model: Any, state: dict[str, torch.Tensor] | None) -> bool:
    """Look at the weights, and at who may write a card of its own behind the save; True: somebody watched."""
    catch_card_writers()
    note_changes(model, state)
    return True


def model_loaded(model: Any) -> None:
    """What a JAM that was loaded is known by from now on."""
    catch_card_writers()
    adopt(model.config, model.name_or_path)
    remember(model)


def adopt(config: Any, folder: Any) -> None:
    """For folders fused before configs told of it: take card and recipe from the folder that a model was loaded
    from.
    """
    if getattr(config, "provenance", None) is not None:
        for entry in config.provenance.get("history") or []:
            entry.pop("session", None)
        return
    found = {}
    for key, name in (("card", CARD), ("recipe", RECIPE)):
        path = Path(folder or "") / name
        if folder and path.is_file() and path.stat().st_size <= _LARGEST:
            try:
                found[key] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
    if "recipe" in found:  # a folder that a fusion made
        config.provenance = {**found, "history": []}


def catch_card_writers() -> None:
    """Let those who write cards, as far as they are imported, complete a JAM's (`carry_on`)."""
    for module, owner, name in _CARD_WRITERS:
        found = getattr(sys.modules.get(module), owner, None)
        method = vars(found).get(name) if found is not None else None
        if method is not None and not getattr(method, "carries_on_a_jam", False):
            setattr(found, name, _completing(method))


def _completing(method: Any) -> Any:
    @functools.wraps(method)
    def complete(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        of_trainer = hasattr(self, "args")
        folder = self.args.output_dir if of_trainer else (args[0] if args else kwargs["output_dir"])
        config = getattr(self.model if of_trainer else self, "config", None)
        writes = not of_trainer or self.is_world_process_zero()
        if writes and getattr(config, "model_type", None) == "jam":
            carry_on(config, folder)
        return result

    complete.carries_on_a_jam = True  # type: ignore[attr-defined]
    return complete


def _with_history(card: str, history: list[dict[str, Any]]) -> str:
    if not card:
        return card
    lines = [f"- {_line(entry)}" for entry in history] or [UNTRAINED]
    section = "\n".join((SINCE, "", "## Since the fusion", "", *lines, "", SINCE_END))
    old = _between(card, SINCE, SINCE_END)
    if old is not None:
        return card.replace(old, section)
    return f"{card.rstrip()}\n\n{section}\n" if history else card


def _line(entry: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in entry.items() if name not in ("what", "session"))
    line = " ".join(f"{entry.get('what')}{': ' if facts else ''}{facts}".split())
    return line.replace("<", "&lt;")


def _between(text: str, start: str, end: str) -> str | None:
    first, last = text.find(start), text.find(end)
    return text[first : last + len(end)] if 0 <= first < last else None


def _complete(theirs: ModelCardData, ours: ModelCardData) -> bool:
    """Fill in what the JAM's card says and another does not; whether anything was. Tags are joined."""
    before = theirs.to_yaml()
    for name, value in ours.to_dict().items():
        said = theirs.get(name)
        if name == "tags":
            theirs["tags"] = list(dict.fromkeys([*([said] if isinstance(said, str) else said or []), *value]))
        elif said in (None, [], ""):
            theirs[name] = value
    if (
        isinstance(theirs.base_model, str) and Path(theirs.base_model).exists()
    ):  # where it lay here is nobody else's business
        theirs["tags"] = [tag for tag in theirs["tags"] if theirs.base_model not in tag]
        theirs.base_model = ours.base_model
        theirs["base_model_relation"] = ours.get("base_model_relation")
    return theirs.to_yaml() != before


def _sample(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A few numbers of each tensor that lies whole in memory; by names without what wrappers put before them."""
    found = {}
    for name, tensor in tensors.items():
        values = tensor.detach()
        if type(values) is not torch.Tensor or values.is_meta or not values.is_floating_point() or not values.numel():
            continue  # sharded, quantised, or not there
        flat = values.reshape(-1)
        found[name] = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().clone()
    return found


__all__ = ["before_saving", "carried", "carry_on", "catch_card_writers", "model_loaded", "record"]
