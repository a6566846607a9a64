"""Self-distillation: prompts from data, answers that the target itself generates (Cai et al. 2024, section 2.3.2).

A drafter predicts the target's own text, so it learns best from that. The rows hold the generated tokens themselves:
text that is decoded and encoded again may give other tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from specdec.generation.generators import AutoregressiveGenerator
from specdec.training.checkpoint import refuse_other_settings
from specdec.training.data import apply_template


def prompts_of(row: dict, tokenizer, prompt_tokens: int = 64) -> list[list[int]]:
    """The prompts of a row as tokens: a chat up to each assistant's turn, or the first `prompt_tokens` of a text.

    Raises ValueError naming the row for a chat without an assistant's turn, or one that the chat template refuses."""
    if "text" in row:
        return [tokenizer(row["text"])["input_ids"][:prompt_tokens]]
    if "tokens" in row:
        return [row["tokens"][: row["learned_from"]]]
    where = row.get("where", "the row")
    turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where}: no assistant speaks in it, so there is nothing to answer")
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    render = lambda part: apply_template(part, tokenizer, where, **options)["input_ids"]
    return [list(render(row["messages"][:number])) for number in turns]


def self_distil(
    model,
    tokenizer,
    rows: Sequence[dict],
    folder: str | Path,
    max_new_tokens: int = 512,
    temperatures: Sequence[float] = (0.7,),
    batch: int = 32,
    prompt_tokens: int = 64,
    seed: int = 0,
    max_length: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Write `model`'s answers to the prompts of `rows` into `folder`, rows `{"tokens", "learned_from"}`, a file each.

    Batch i uses `temperatures[i % len(temperatures)]` (0: greedy); answers end at the model's end-of-text tokens.
    Prompts of similar length share a batch; one that leaves fewer than two of `max_length` tokens is left out. Batches
    already there are kept, so a killed run goes on. With `share` (r, n) process r of n writes every n-th batch; the
    answers are the same for any n. Raises ValueError for a negative temperature, or a folder of answers to other
    prompts or with other settings."""
    from tqdm import tqdm

    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperatures must be at least 0, got {list(temperatures)}")
    found = (prompt for row in rows for prompt in prompts_of(row, tokenizer, prompt_tokens) if prompt)
    prompts = sorted((p for p in found if max_length is None or len(p) + 2 <= max_length), key=len)
    folder, generator = Path(folder), AutoregressiveGenerator(model)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": str(model.config._name_or_path), "max_new_tokens": max_new_tokens, "batch": batch}
    settings |= {"temperatures": list(temperatures), "seed": seed}
    refuse_other_settings(folder / "settings.json", settings)
    for number in tqdm(range(share[0], -(-len(prompts) // batch), share[1]), desc="answers", disable=not progress):
        asked, path = prompts[number * batch : (number + 1) * batch], folder / f"{number:06}.jsonl"
        if path.exists():
            if [row["tokens"][: row["learned_from"]] for row in _read(path)] != asked:
                raise ValueError(f"{path} holds answers to other prompts; choose another output folder or remove it")
            continue
        answers = _answers(generator, asked, max_new_tokens, temperatures[number % len(temperatures)], seed + number)
        texts = [{"tokens": p + answer, "learned_from": len(p)} for p, answer in zip(asked, answers, strict=True)]
        lines = map(json.dumps, texts)
        path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
        path.with_suffix(".tmp").rename(path)


def read_answers(folder: str | Path) -> list[dict]:
    """All rows that `self_distil` wrote, in the order of the batches, without texts too short for a label."""
    rows = [
        {**row, "where": f"{path}:{number}"}
        for path in sorted(Path(folder).glob("*.jsonl"))
        for number, row in enumerate(_read(path), 1)
    ]
    return [row for row in rows if len(row["tokens"]) > 2]


def padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(ids, mask)`, both `[B, S]`: prompts of different lengths, padded on the left as generators take them."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _answers(
    generator: AutoregressiveGenerator, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    ids, mask = padded(prompts, generator.target.device)
    sampling: dict = {"do_sample": bool(temperature)}
    if temperature:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = generator.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    new = out.sequences[:, ids.shape[1] :].tolist()
    return [row[:length] for row, length in zip(new, out.lengths.tolist(), strict=True)]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
