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
from specdec.training.data import require_known_tokens
from specdec.training.kinds import TOO_LONG, checked, good_rows
from specdec.training.report import BadRow, RowReport, reported
from specdec.training.templates import chat_of, unused


def prompts_of(row: dict, tokenizer, prompt_tokens: int = 64, max_length: int | None = None) -> list[list[int]]:
    """The prompts of a row as tokens: a chat up to each assistant's turn, or the first `prompt_tokens` of a text.

    Prompts that leave fewer than two of `max_length` tokens are left out. Raises BadRow, a ValueError that names the
    row, where none is left: no assistant's turn, all too long; or where the chat template refuses the chat."""
    row = checked(row, "the row")
    if "text" in row:
        prompts = [tokenizer(row["text"])["input_ids"][:prompt_tokens]]
    elif "tokens" in row:
        prompts = [row["tokens"][: row["learned_from"]]]
    else:
        chat = chat_of(row, tokenizer)
        prompts = [chat.prompt_tokens(number) for number in chat.answers]
    if not any(prompts):
        raise BadRow(row["where"], "an empty prompt")
    fitting = [prompt for prompt in prompts if prompt and (max_length is None or len(prompt) + 2 <= max_length)]
    if not fitting:
        shortest = min(map(len, prompts))
        raise BadRow(row["where"], TOO_LONG, f"a prompt of {shortest} tokens, where a row has {max_length}")
    return fitting


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
    report: RowReport | None = None,
) -> None:
    """Write `model`'s answers to the prompts of `rows` into `folder`, rows `{"tokens", "learned_from"}`, a file each.

    Batch i uses `temperatures[i % len(temperatures)]` (0: greedy); answers end at the model's end-of-text tokens.
    Prompts of similar length share a batch; one that leaves fewer than two of `max_length` tokens is left out. Batches
    already there are kept, so a killed run goes on. With `share` (r, n) process r of n writes every n-th batch; the
    answers are the same for any n. Rows without a prompt are left out and counted in `report`; without one they are
    shown in a warning. Raises ValueError for a negative temperature, no prompts, prompts of tokens that the model does
    not have, or a folder of answers to other prompts or with other settings."""
    from tqdm import tqdm

    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperatures must be at least 0, got {list(temperatures)}")
    with reported(report) as own:

        def asked_by(row: dict) -> list[list[int]]:
            prompts = prompts_of(row, tokenizer, prompt_tokens, max_length)
            own.remark(row["where"], unused(row, tokenizer))
            return prompts

        found = [prompt for prompts in good_rows(rows, asked_by, own) for prompt in prompts]
        own.require(len(found), "prompts")
    require_known_tokens({token for prompt in found for token in prompt}, tokenizer, model)
    prompts = sorted(found, key=len)
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
