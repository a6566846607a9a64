"""How many drafted tokens a quantised target accepts, drafter by drafter."""

from collections.abc import Callable, Sequence
from textwrap import shorten

import torch

import specdec
from medusa import MedusaDrafter
from medusa.tiny_heads import load_tiny_heads
from specdec import TokenTree

LENGTH = 5  # γ, of all drafters alike
DRAFT, MEDUSA, LOOKUP, SELF = "draft model", "Medusa heads", "prompt lookup", "quantised self"


def drafters_of(model, draft, heads: bool, group: int) -> dict[str, Callable[[], object]]:
    """{name: makes the drafter}: chains of LENGTH greedy tokens for the target `model`.

    heads: whether it is the shipped target, which has Medusa heads. group: of the target's own weights in 4 bits."""
    found: dict[str, Callable[[], object]] = {DRAFT: lambda: specdec.ModelDrafter(draft, LENGTH)}
    if heads:
        dtype = next(model.parameters()).dtype
        found[MEDUSA] = lambda: MedusaDrafter(load_tiny_heads(dtype)[0], TokenTree.chain(LENGTH))
    found[LOOKUP] = lambda: specdec.PromptLookupDrafter(LENGTH)
    found[SELF] = lambda: specdec.QuantisedSelfDrafter(model, LENGTH, bits=4, group=group)
    return found


def measure_acceptance(model, drafters: dict[str, Callable[[], object]], texts: Sequence[str], tokenizer, tokens: int,
                       kv_dtype: str | None) -> dict[str, dict]:  # fmt: skip
    """{drafter: figures} over greedy texts of up to `tokens` new tokens; a drafter that cannot be is an `error`.

    acceptance_rate: accepted of the proposed tokens. tokens_per_round: with the target's own. equal_texts: of `texts`,
    how many are the target's own of plain decoding to the last token."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")

    def decode(drafter):
        generator = specdec.SpeculativeGenerator(model, drafter, kv_dtype=kv_dtype, mode="eager")
        return generator.generate(batch.input_ids, batch.attention_mask, max_new_tokens=tokens)

    plain, found = decode(None), {}
    for name, make in drafters.items():
        try:
            drafter = make()
        except ValueError as error:
            found[name] = {"error": shorten(str(error), 220, placeholder=" …")}
            continue
        out, width = decode(drafter), batch.input_ids.shape[1]
        stats = out.stats.pooled
        same = [_new(out, row, width).equal(_new(plain, row, width)) for row in range(len(texts))]
        found[name] = {
            "acceptance_rate": stats.acceptance_rate, "tokens_per_round": stats.tokens_per_round,
            "proposed": sum(stats.proposed), "rounds": stats.rounds, "equal_texts": sum(same), "texts": len(texts),
        }  # fmt: skip
    return found


def _new(out, row: int, width: int) -> torch.Tensor:
    return out.sequences[row, width : width + int(out.lengths[row])]
