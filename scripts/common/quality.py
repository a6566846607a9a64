"""How good small models of source code are: expected acceptance, and whether greedy completions parse and repeat."""

import ast

import torch

from scripts.common.tiny_models import rows_of


@torch.inference_mode()
def expected_acceptance(target, draft, stream, context, device, rows=64):
    """Mean of Σ min(p, q) over held-out positions: how often a drafted token is accepted at temperature 1."""
    means = []
    for start in range(0, min(rows, len(stream) // context), 8):
        x = rows_of(
            stream, [i * context for i in range(start, min(start + 8, len(stream) // context))], context, device
        )
        p, q = (m(x, use_cache=False).logits.float().softmax(-1) for m in (target, draft))
        means.append(torch.minimum(p, q).sum(-1).mean())
    return torch.stack(means).mean().item()


def parses_as_python(prompt, completion, slack=3):
    """Whether prompt + completion parses after dropping up to `slack` unfinished last lines, half of it kept."""
    lines, kept = (prompt + completion).splitlines(), len((prompt + completion[: len(completion) // 2]).splitlines())
    for drop in range(slack + 1):
        if len(lines) - drop < kept:
            return False
        try:
            ast.parse("\n".join(lines[: len(lines) - drop]))
            return True
        except (SyntaxError, ValueError):
            continue
    return False


def repeats_itself(completion):
    """Whether a completion of four lines or more has at most 60% distinct lines: small models decoded greedily loop."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return len(lines) >= 4 and len(set(lines)) <= 0.6 * len(lines)


@torch.inference_mode()
def completions(model, tokenizer, texts, device, new_tokens=128):
    """Greedy completions of `texts`, decoded, cut at the end-of-text token."""
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
