"""Generators as a model of lm-evaluation-harness, so that its tasks show equal scores with and without speculation.

Needs lm_eval (the extra `eval`). Log-likelihoods are the target's own, computed by its transformers forward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.evaluation.texts import pad_left
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator

DEFAULT_NEW_TOKENS = 256  # where a task does not say; the harness's own default
Pair = tuple[list[int], list[int]]  # a context and its continuation, as tokens


@dataclass(frozen=True, slots=True)
class Answers:
    """What tasks ask of a model: texts by `generator`, and log-likelihoods of its target.

    batch: prompts, or continuations, at a time.
    """

    generator: SpeculativeGenerator | AutoregressiveGenerator
    tokenizer: Any  # a transformers tokenizer
    batch: int = 1
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the target takes."""
        limit = self.generator.target.max_positions
        return 2048 if limit is None else limit

    def texts(self, asked: Sequence[tuple[str, dict]]) -> list[str]:
        """The text after each context, up to its first stop string; of settings as transformers' `generate` has them.

        `until` are the stop strings, `max_gen_toks` the limit. Contexts that are too long lose their beginning."""
        found: dict[int, str] = {}
        for members, settings in _alike(asked, self.batch):
            given = dict(settings)
            until, count = list(given.pop("until", [])), given.pop("max_gen_toks", DEFAULT_NEW_TOKENS)
            if count >= self.longest:
                raise ValueError(
                    f"max_gen_toks={count} leaves no room for a prompt in the model's {self.longest} tokens"
                )
            if not given.get("do_sample"):
                given = {"do_sample": False} | {n: v for n, v in given.items() if n not in ("temperature", "do_sample")}
            prompts = [self.encode(asked[n][0])[-(self.longest - count) :] for n in members]
            ids, mask = pad_left([torch.tensor(one, device=self.generator.target.device) for one in prompts], 0)
            stops = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
            out = self.generator.generate(ids, mask, max_new_tokens=count, seed=self.seed, **given, **stops)
            new = out.sequences[:, ids.shape[1] :].tolist()
            for n, row, length in zip(members, new, out.lengths.tolist(), strict=True):
                found[n] = _cut(self.tokenizer.decode(row[:length], skip_special_tokens=True), until)
        return [found[n] for n in range(len(asked))]

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each pair the log-probability of the continuation, and whether greedy decoding would write it."""
        found = []
        model, device = self.generator.target.model, self.generator.target.device
        for start in range(0, len(pairs), self.batch):
            members = pairs[start : start + self.batch]
            texts = [torch.tensor((context + new)[-self.longest - 1 :][:-1]) for context, new in members]
            width = max(map(len, texts))
            ids = torch.stack([torch.nn.functional.pad(text, (0, width - len(text))) for text in texts])
            mask = torch.stack([(torch.arange(width) < len(text)).long() for text in texts])
            logits = model(ids.to(device), attention_mask=mask.to(device)).logits
            for row, text, (_, new) in zip(logits, texts, members, strict=True):
                found.append(_score(row[len(text) - len(new) : len(text)], new))
        return found

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """The tokens of a text; special ones are added unless it begins with one (`special` None), or as it says."""
        first = self.tokenizer.bos_token
        there = first is not None and text.startswith(first)
        return self.tokenizer(text, add_special_tokens=not there if special is None else special).input_ids


def lm_eval_model(
    generator: SpeculativeGenerator | AutoregressiveGenerator, tokenizer, batch: int = 1, seed: int = 0
) -> Any:
    """A model for `lm_eval.simple_evaluate(model=…, tasks=[…])`.

    Raises ModuleNotFoundError without lm_eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    answers = Answers(generator, tokenizer, batch, seed)

    class GeneratorModel(TemplateLM):
        """The harness's interface, whose work `Answers` does."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return answers.encode(string, add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return answers.texts([
                (context, dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)))
                for context, settings in (request.args for request in requests)
            ])  # fmt: skip

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            return answers.log_likelihoods([(context, new) for _, context, new in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, answers.longest, 1
                )
                pairs = [(list(context), list(new)) for context, new in map(make_disjoint_window, windows)]
                found.append(sum(score for score, _ in answers.log_likelihoods(pairs)))
            return found

    GeneratorModel.tokenizer = tokenizer
    return GeneratorModel()


def _alike(asked: Sequence[tuple[str, dict]], batch: int) -> Iterator[tuple[list[int], dict]]:
    """Numbers of requests with the same settings, `batch` at a time."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in enumerate(asked):
        groups.setdefault(repr(sorted(settings.items())), []).append(number)
    for members in groups.values():
        for start in range(0, len(members), batch):
            yield members[start : start + batch], asked[members[0]][1]


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of all stop strings."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _score(logits: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of `tokens` under `logits [n, V]`, and whether each is the likeliest."""
    chosen = torch.tensor(tokens, device=logits.device)
    logs = logits.float().log_softmax(-1)
    return float(logs.gather(-1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())
