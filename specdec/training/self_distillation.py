"""Training rows in the target's own words: prompts from data, answers from the target by our batched generator (Cai et
al. 2024, section 2.3.2).

Heads are to guess what the target will say, so that is what they learn best from. The rows hold the very tokens that
were generated; text that is decoded and encoded again may come out as other tokens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from specdec.generation.generators import AutoregressiveGenerator
from specdec.training.checkpoint import refuse_other_settings
from specdec.training.data import apply_template


def prompts_of(row: dict, tokenizer, prompt_tokens: int = 64) -> list[list[int]]:
    """What the target is to answer, as tokens: a chat up to each assistant's turn, or the first `prompt_tokens` of a
    text.

    Raises ValueError naming the row for a chat in which no assistant speaks, or which the chat template does not take.
    """
    if "text" in row:
        return [tokenizer(row["text"])["input_ids"][:prompt_tokens]]
    if "tokens" in row:
        return [row["tokens"][: row["learned_from"]]]
    where = row.get("where", "the row")
    turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where}: no assistant speaks in it, so there is nothing to answer")
    render = lambda part: apply_template(
        part, tokenizer, where, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
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
    """Write `model`'s own answers to the prompts of `rows` into `folder`, a jsonl file a batch of rows `{"tokens",
    "learned_from"}`.

    Batch i is drawn at temperature i of `temperatures`, around and around (0: greedy), and ends at the model's
    end-of-text tokens. Prompts of similar length go together; one that leaves less than two of `max_length` tokens is
    not answered. Batches that are there are left, so a killed run goes on; process r of n does every n-th one with
    `share` (r, n), and the answers are the same for any n. Raises ValueError for a negative temperature or a folder of
    answers to other prompts or with other settings."""
    from tqdm import tqdm

    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperatures must be at least 0, got {list(temperatures)}")
    prompts = sorted(
        (prompt for row in rows for prompt in prompts_of(row, tokenizer, prompt_tokens) if prompt), key=len
    )
    prompts = [prompt for prompt in prompts if max_length is None or len(prompt) + 2 <= max_length]
    folder, generator = Path(folder), AutoregressiveGenerator(model)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(
        folder / "settings.json",
        {
            "model": str(model.config._name_or_path),
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "temperatures": list(temperatures),
            "seed": seed,
        },
    )
    for number in tqdm(range(share[0], -(-len(prompts) // batch), share[1]), desc="answers", disable=not progress):
        asked, path = prompts[number * batch : (number + 1) * batch], folder / f"{number:06}.jsonl"
        if path.exists():
            if [row["tokens"][: row["learned_from"]] for row in _read(path)] != asked:
                raise ValueError(f"{path} holds answers to other prompts; choose another output folder or remove it")
            continue
        answers = _answers(generator, asked, max_new_tokens, temperatures[number % len(temperatures)], seed + number)
        lines = [
            json.dumps({"tokens": prompt + answer, "learned_from": len(prompt)})
            for prompt, answer in zip(asked, answers, strict=True)
        ]
        path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
        path.with_suffix(".tmp").rename(path)


def read_answers(folder: str | Path) -> list[dict]:
    """All rows that `self_distil` wrote, in the order of the batches, but for texts of two tokens, which teach
    nothing.
    """
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
) -> Iterator[list[int]]:
    ids, mask = padded(prompts, generator.target.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    out = generator.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    for row, length in zip(out.sequences[:, ids.shape[1] :].tolist(), out.lengths.tolist(), strict=True):
        yield row[:length]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
