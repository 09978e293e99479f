"""The quickstart's page: interleaved documents that the model wrote, loss curves, and a table of measured figures.

It reads a run folder and writes HTML with everything inside; it trains and measures nothing but the documents it
writes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..contents import beside
from ..evaluation.drawing import draw
from ..files import read_json
from ..generation.export import page_html, picture_html, segments_html
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor
from ..picture_world import Picture, score_picture
from ..reading import read_whole
from .pairs import parents_of
from .run import Run


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1060px;margin:2rem auto;padding:0 1rem;color:#1d2330;background:#fff}
h1{margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:1px solid #dde2ea;padding-bottom:.2rem}
.docs{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:1rem}
.doc{border:1px solid #dde2ea;border-radius:8px;padding:.8rem 1rem;background:#fafbfd}
.user{color:#51607a;font-style:italic;margin:0 0 .5rem}
.doc p{margin:.4rem 0 .2rem}.doc img{display:block}
img{image-rendering:auto;border:1px solid #c8cfdb;border-radius:4px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem;font-size:13px;line-height:1.3}
.ok{color:#1b7f3b}.no,.unfinished{color:#b3261e}
table{border-collapse:collapse;font-size:14px}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e4e8ef;text-align:right}
td:first-child,th:first-child{text-align:left}
.curves{display:flex;flex-wrap:wrap;gap:1rem}.curves figure{margin:0}figcaption{font-size:13px;color:#51607a}
.note{color:#51607a;font-size:14px}
"""


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def document_html(prompt: str, segments: Sequence[dict[str, Any]]) -> str:
    """One document: the prompt, then its segments in order."""
    shown = []
    for segment in segments:
        if segment["type"] == "text":
            segment = {**segment, "text": segment["text"].strip()}
        elif segment["image"] is not None:
            segment = {**segment, "image": _enlarged(segment["image"], 2)}
        shown.append(segment)
    body = segments_html(shown, picture="picture written by the model", unfinished="(a picture that was not finished)")
    return f'<div class="doc"><p class="user">{html.escape(prompt)}</p>\n{body}\n</div>'


def write_documents(run: Run, folder: Path) -> None:
    """Let jam-cross answer held-out how-to questions and draw unseen captions; leaves PNGs and `documents.json`."""
    settings = run.settings
    model = read_whole(JamForCausalLM, run.path("jam-cross"))
    processor = JamProcessor.from_pretrained(run.path("jam-cross"), trust_remote_code=False)
    howtos = run.data("howtos")["validation"].select(range(min(48, settings.sizes.validation)))
    requests = [json.loads(text)[:1] for text in howtos["messages"]]
    prompts = [processor.tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in requests]
    documents, pictures, right = [], 0, 0
    for start in range(0, len(prompts), 24):
        inputs = processor(text=prompts[start : start + 24], padding=True, return_tensors="pt")
        output = model.generate(
            **inputs,
            generation_mode="interleaved",
            guidance_scale=settings.guidance_scale,
            max_new_tokens=settings.document_tokens,
            do_sample=False,
        )
        rows = processor.post_process_interleaved(output, model, prompt_length=inputs["input_ids"].shape[1])
        for offset, segments in enumerate(rows):
            index = start + offset
            expected = [Picture.from_json(text) for text in howtos[index]["pictures"]]
            drawn = [s["image"] for s in segments if s["type"] == "image"]
            scores = [
                image is not None and score_picture(image, picture).correct for image, picture in zip(drawn, expected)
            ]
            pictures += len(expected)
            right += sum(scores)
            if index < settings.num_documents:
                entries = []
                for number, segment in enumerate(segments):
                    entry = {"type": segment["type"], "text": segment.get("text")}
                    if segment["type"] == "image" and segment["image"] is not None:
                        entry["file"] = f"document-{index}-{number}.png"
                        segment["image"].save(folder / entry["file"])
                    entries.append(entry)
                prompt = requests[index][0]["content"][0]["text"]
                documents.append({"prompt": prompt, "segments": entries, "right": scores, "pictures": len(expected)})
    tiles = []
    pairs = run.data("pairs")
    for split in ("unseen_single", "unseen_pair"):
        chosen = pairs[split].select(range(min(6, len(pairs[split]))))
        images = draw(model, processor, list(chosen["caption"]), guidance_scale=settings.guidance_scale)
        for index, (row, image) in enumerate(zip(chosen, images)):
            name = f"{split}-{index}.png"
            image.save(folder / name)
            correct = score_picture(image, Picture.from_json(row["picture"])).correct
            tiles.append({"caption": row["caption"], "file": name, "correct": correct})
    summary = {"documents": documents, "tiles": tiles, "howto_pictures": pictures, "howto_pictures_right": right}
    (folder / "documents.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


# ----- the page -------------------------------------------------------------------------------------------------------


def _curve(title: str, points: list[tuple[float, float]], width: int = 310, height: int = 150) -> str:
    """A line chart as SVG: axes in data units, the last value in the caption."""
    if len(points) < 2:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high, last = min(ys), max(ys), max(xs)
    left, bottom = 40, height - 22
    span = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + x / last * (width - left - 8):.1f},{8 + (high - y) / span * (bottom - 8):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">'
        f'<path d="M{left},8 V{bottom} H{width - 8}" fill="none" stroke="#9aa5b8"/>'
        f'<polyline points="{line}" fill="none" stroke="#2654d6" stroke-width="1.6"/>'
        f'<text x="2" y="14" font-size="11">{high:.2f}</text><text x="2" y="{bottom}" font-size="11">{low:.2f}</text>'
        f'<text x="{width - 8}" y="{height - 6}" font-size="11" text-anchor="end">{last:g} steps</text></svg>'
        f"<figcaption>{html.escape(title)} (last: {ys[-1]:.3f})</figcaption></figure>"
    )


def _history(path: Path, key: str) -> list[tuple[float, float]]:
    if not path.is_file():
        return []
    rows = read_json(path)["history"]
    return [(row["step"], row[key]) for row in rows if key in row]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _perplexity(value: float | None) -> str:
    """Empty where a model has none: a parent that cannot read such documents."""
    return "" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.2g}"


def _figures(results: dict[str, Any]) -> str:
    head = (
        "<tr><th>model</th><th>text ppl</th><th>caption+image ppl</th><th>image ppl</th><th>KL to LLM</th>"
        "<th>KL to image parent</th><th>1 object</th><th>1 object, guided</th><th>2 objects</th><th>2 objects, "
        "guided</th></tr>"
    )
    rows = []
    for name, figures in results["models"].items():
        ppl, drawing = figures["perplexity"], figures.get("drawing", {})
        cells = [_perplexity(ppl.get(k)) for k in ("text", "caption_image", "image")]
        cells += [f"{figures[k]:.3f}" if k in figures else "" for k in ("kl_to_llm", "kl_to_image_parent")]
        for split in ("unseen_single", "unseen_pair"):
            for kind in ("plain", "guided"):
                found = drawing.get(f"{split}_{kind}")
                cells.append(_percent(found["correct"]) if found else "")
        rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the run set out to reach, in words with the figures, and whether it did."""
    models = results["models"]
    final, llm, image = (models[n] for n in ("jam-cross, stage 2", "LLM parent", "image parent"))
    trip, drawing = results["vq_round_trip"], final["drawing"]
    text = final["perplexity"]["text"] / llm["perplexity"]["text"] - 1
    # Perplexities of captions compare only where both models read them in the same tokens; image codes are the same to
    # all.
    same_tokens = "caption_image" in image["perplexity"]
    what, kind = ("Caption+image", "caption_image") if same_tokens else ("Image", "image")
    ours, theirs = final["perplexity"][kind], image["perplexity"][kind]
    checks = [
        (f"The scorer reads {_percent(trip['correct'])} of {trip['count']} real pictures right after the VQ model's "
         f"round trip (goal: 98 %).", trip["correct"] >= 0.98),
        (f"Text perplexity of jam-cross is {100 * text:+.1f} % off the LLM parent's (goal: at most +5 %).",
         text <= 0.05),
        (f"{what} perplexity of jam-cross is {ours:.3f}, the image parent's {theirs:.3f} (goal: no worse).",
         ours <= theirs),
    ]  # fmt: skip
    for split, words, goal in (("unseen_single", "one object", 0.85), ("unseen_pair", "two objects", 0.5)):
        for kind, how in (("plain", "without guidance"), ("guided", "with guidance")):
            found = drawing[f"{split}_{kind}"]
            checks.append(
                (f"jam-cross draws {_percent(found['correct'])} of {found['count']} unseen captions of {words} right, "
                 f"{how} (goal: {100 * goal:.0f} %).", found["correct"] >= goal)
            )  # fmt: skip
    return checks


def _note(run: Run) -> str:
    if run.settings.family == "unlike":
        return (
            "jam-cross in the preserving form says of a text exactly what the LLM parent says. It reads captions in "
            "the LLM's tokens, the image parent in its own; the KL to the image parent is what that costs before "
            "training. The image parent's perplexity is among image codes alone."
        )
    return (
        "No fusion into one stock decoder preserves a parent exactly, since its norms see both halves;\n"
        "jam-cross in the preserving form does."
    )


def _picture(folder: Path, name: str) -> Image.Image:
    return Image.open(beside(folder, name, str(folder / "documents.json")))


def render_page(run: Run) -> str:
    """The page of a run whose documents are written and whose figures are measured."""
    folder = run.path("documents")
    written = read_json(folder / "documents.json")
    results = read_json(run.path("results.json"))
    times_path = run.path("times.json")
    times = read_json(times_path) if times_path.is_file() else {}
    documents = []
    for document in written["documents"]:
        segments = [
            {**s, "image": _picture(folder, s["file"]) if s.get("file") else None} for s in document["segments"]
        ]
        documents.append(document_html(document["prompt"], segments))
    tiles = []
    for tile in written["tiles"]:
        mark = '<span class="ok">right</span>' if tile["correct"] else '<span class="no">wrong</span>'
        drawing = picture_html(_enlarged(_picture(folder, tile["file"]), 3), "drawing")
        tiles.append(f"<div>{drawing}<br>{html.escape(tile['caption'])} - {mark}</div>")
    curves = [_curve("VQ model, reconstruction", _history(run.path("vq") / "history.json", "reconstruction"))]
    for title, place in (
        ("LLM parent", "llm"),
        ("image parent", "image-model"),
        ("stage 1, jam-cross (CM3)", "pretrained/jam-cross"),
        ("stage 2, jam-cross (how-tos)", "jam-cross"),
    ):
        curves.append(_curve(f"{title}, loss", _history(run.path(place) / "history.json", "loss")))
    checks = "".join(
        f'<li class="{"ok" if reached else "no"}">{html.escape(text)}</li>' for text, reached in verdicts(results)
    )
    share = written["howto_pictures_right"] / max(written["howto_pictures"], 1)
    path = run.path("fused") / "report.txt"
    report = f"<h2>Fusion</h2><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>\n" if path.is_file() else ""
    seconds = ", ".join(f"{name} {value:g} s" for name, value in times.items())
    torch_note = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    body = f"""<h1>A picture book by jam-cross</h1>
<p class="note">{parents_of(run).words} Everything below was written
and drawn by the fused model, token by token; the questions are held out from training.</p>
<h2>Documents</h2><div class="docs">{"".join(documents)}</div>
<p class="note">{_percent(share)} of the {written["howto_pictures"]} pictures in answers to held-out questions show
exactly what was built so far.</p>
<h2>Captions never seen</h2><p class="note">No training picture shows that object, or that pair of objects, there.</p>
<div class="tiles">{"".join(tiles)}</div>
<h2>Goals</h2><ul>{checks}</ul>
<h2>Figures</h2>{_figures(results)}
<p class="note">Perplexities on held-out documents, per token. KL per token to each parent, over that parent's own
tokens. Drawing: share of unseen captions drawn right (every shape, colour and cell), greedy; guided: scale
{results["guidance_scale"]}. {_note(run)}</p>
{report}<h2>Loss curves</h2><div class="curves">{"".join(curves)}</div>
<h2>Time</h2><p class="note">{html.escape(seconds)}; {torch_note}.</p>"""
    return page_html("jam_hf quickstart", body, _STYLE)
