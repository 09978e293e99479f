#!/usr/bin/env bash
# tokenizers 0.23.3: a new token's id is the COUNT of tokens, not the largest id plus one.
#
# In a vocabulary with holes (ids that no token has, as pruned or padded vocabularies have them) an added token gets the
# id of an ordinary token. Nothing is said; decoding shows the new token in place of the ordinary one. An added token
# that a file puts behind a hole is read back at another id than the file gives it.
#
# Seen, on the vocabulary {a: 0, b: 1, c: 2, d: 5, e: 4}:
#   add_tokens(["<new>"]) -> id 5, the id of "d"; decode([5]) -> "<new>"; the next one gets 6
#   a file with "<far>" at id 10 beside a vocabulary of 2 tokens -> read back at id 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
import json

from tokenizers import AddedToken, Tokenizer, models

tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "d": 5, "e": 4}, merges=[]))
assert tokenizer.get_vocab_size() == 5 and max(tokenizer.get_vocab().values()) == 5
tokenizer.add_tokens([AddedToken("<new>", special=True)])
tokenizer.add_tokens([AddedToken("<next>", special=True)])
new, following, ordinary = (tokenizer.token_to_id(token) for token in ("<new>", "<next>", "d"))
shown = tokenizer.decode([5], skip_special_tokens=False)
print(f"<new> {new}, <next> {following}, ordinary d {ordinary}, decode([5]) {shown}")
assert (new, following, ordinary) == (5, 6, 5), "the rule for new ids has changed"
assert shown == "<new>"

text = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
text["added_tokens"] = [{"id": 10, "content": "<far>", "special": True, **flags}]
far = Tokenizer.from_str(json.dumps(text)).token_to_id("<far>")
print(f"a file says <far> is 10; read back: {far}")
assert far == 2, "files' own ids are now believed"
PY
