#!/usr/bin/env bash
# llguidance refuses the end token that its own mask offers, where nothing else can come.
#
# With: llguidance 1.9.1, numpy 2.4.6 on a CPU, Python 3.11. Date: 2026-11-30.
#
# A grammar that can go no further has stopped its matcher: the mask then allows the end token alone, but validate_tokens
# and try_consume_tokens both take 0 tokens of [end]. Where the grammar may also go on, the same end token is taken. So
# "take any token that the mask allows" holds for `"ab" "c"?` behind ab, and not for `"ab"` behind ab: whoever drafts past
# the end and rolls back has to count the end token by himself in one case and not in the other.
#
# Output seen:
#   "ab": behind ab the mask allows ['end'], accepting True, stopped True, taken of [end]: 0 by validate, 0 by try_consume
#   "ab" "c"?: behind ab the mask allows ['c', 'end'], accepting True, stopped False, taken of [end]: 1 by validate, 1 by try_consume
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import sys

import llguidance
import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

END = 256


class Bytes:
    """A tokenizer of all bytes and an end token."""

    eos_token_id, bos_token_id, unk_token_id, special_token_ids = END, None, None, [END]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


tokenizer, found = LLTokenizer(TokenizerWrapper(Bytes())), []
for grammar in ('"ab"', '"ab" "c"?'):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(f"start: {grammar}"))
    assert all(matcher.consume_token(token) for token in b"ab")
    mask = np.zeros((1, 9), dtype=np.int32)
    llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
    allowed = ["end" if t == END else chr(t) for t in range(257) if mask[0, t // 32] >> t % 32 & 1]
    state = matcher.is_accepting(), matcher.is_stopped()
    taken = matcher.validate_tokens([END]), matcher.try_consume_tokens([END])
    print(f"{grammar}: behind ab the mask allows {allowed}, accepting {state[0]}, stopped {state[1]}, "
          f"taken of [end]: {taken[0]} by validate, {taken[1]} by try_consume")
    found.append((allowed, state, taken))
sys.exit(found != [(["end"], (True, True), (0, 0)), (["c", "end"], (True, False), (1, 1))])
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
