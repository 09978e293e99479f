"""`jam-hf generate`: an interleaved document from a prompt. It parses arguments and calls the library."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import DEFAULT_RUN


HELP = "write an interleaved document from a prompt, as one HTML page"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", help="what to write about; with --chat, what the user says")
    command.add_argument("--model", default=f"{DEFAULT_RUN}/jam-cross", help="JAM checkpoint: folder or Hub id")
    command.add_argument("--mode", choices=("interleaved", "text", "image"), default="interleaved")
    command.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    command.add_argument("--image", action="append", default=[], help="picture for an <image> in the prompt")
    command.add_argument("--guidance-scale", type=float, default=None, help="classifier-free guidance inside pictures")
    command.add_argument("--temperature", type=float, default=None, help="sample with this temperature (default: greedy)")
    command.add_argument("--max-new-tokens", type=int, default=None)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", default="document.html", help="HTML file to write")


def run(args: argparse.Namespace) -> None:
    import torch

    from .. import JamForCausalLM, JamProcessor
    from ..files import write_whole
    from ..quickstart.page import document_page

    target = Path(args.output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: expected a file in a folder that exists.")
    if not Path(args.model).is_dir() and (args.model.count("/") != 1 or args.model.startswith((".", "/", "~"))):
        raise ValueError(f"--model {args.model}: there is no such folder; expected a JAM checkpoint or a Hub id such as a/b.")
    model = JamForCausalLM.from_pretrained(args.model).eval()
    processor = JamProcessor.from_pretrained(args.model)
    prompt = args.prompt
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=args.image or None, return_tensors="pt")
    torch.manual_seed(args.seed)
    options = {"generation_mode": args.mode, "guidance_scale": args.guidance_scale}
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.temperature is not None:
        options |= {"do_sample": True, "temperature": args.temperature}
    output = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    segments = processor.post_process_interleaved(output, model, prompt_length=length)[0]
    for segment in segments:
        print(segment["text"].strip() if segment["type"] == "text" else "[picture]")
    write_whole(target, document_page(args.prompt, segments))
    print(f"document: {target}")
