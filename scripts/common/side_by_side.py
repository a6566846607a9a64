"""Decoding methods side by side on the same prompts: runs that resume, the table of speeds, the first differences."""

import json
import statistics
import time
from dataclasses import asdict

import torch

from specdec.auditing.greedy import first_difference
from specdec.report.stats import RoundStats, pool
from specdec.report.terminal import table

PLAIN, OURS = "transformers generate", "specdec autoregressive"  # what the others are compared with
ALL = "all"


def decode(methods, tokenizer, texts, temperature, tokens, seed, device):
    """One run of `texts` as a batch per method; transformers' method runs in batches of one only.

    A run is `{"method", "new_tokens", "seconds", "stats"}`."""
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    runs = []
    for method, generate in methods.items():
        plain = method == PLAIN
        if plain and len(texts) > 1:
            continue
        torch.manual_seed(seed)
        wait()
        began = time.perf_counter()
        out = generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=tokens,
            **options,
            **({} if plain else {"seed": seed}),
        )
        wait()
        seconds = time.perf_counter() - began
        rows = (out if plain else out.sequences)[:, batch.input_ids.shape[1] :].tolist()
        lengths = [len(rows[0])] if plain else out.lengths.tolist()
        runs.append(
            {
                "method": method,
                "new_tokens": [row[:length] for row, length in zip(rows, lengths, strict=True)],
                "seconds": seconds,
                "stats": None if plain else asdict(out.stats.pooled),
            }
        )
    return runs


def run_all(methods, tokenizer, prompts, temperatures, tokens, repeats, path, device, seed=0, until=float("inf"),
            batches=True):  # fmt: skip
    """`(runs, whether they are complete)` of `repeats` passes over all temperatures and prompts `{kind: [text, …]}`.

    A run is what `decode` says, with "temperature", "kind", "prompt" (None: all of the kind as one batch) and "repeat".
    The file `path` gets a line a prompt; what an earlier call left there is not run again. No prompt is begun after the
    time `until`. Without `batches` each prompt runs alone."""
    lines = [
        line for line in (path.read_text() if path.exists() else "").splitlines(keepends=True) if line.endswith("\n")
    ]
    path.write_text("".join(lines))  # without the half of a line that a kill left
    whole = [None] if batches else []
    one_pass = [
        (temperature, kind, number)
        for temperature in temperatures
        for kind in prompts
        for number in [*range(len(prompts[kind])), *whole]
    ]
    jobs = [(job, repeat) for repeat in range(repeats) for job in one_pass]

    def run(job, tokens):
        temperature, kind, number = job
        texts = prompts[kind] if number is None else [prompts[kind][number]]
        return decode(methods, tokenizer, texts, temperature, tokens, seed + (number or 0), device)

    if len(lines) < len(jobs) and time.perf_counter() < until:
        first = next(iter(prompts))
        # plain steps are timed once for every length of text, prompts recorded when they come for the second time
        for job in one_pass[: len(one_pass) // len(temperatures)] * 2:
            run(job, min(4, tokens))
        for job in ((temperature, first, number) for temperature in temperatures for number in (0, *whole)):
            run(job, tokens)
    with path.open("a") as file:
        for job, repeat in jobs[len(lines) :]:
            if time.perf_counter() > until:
                break
            key = dict(zip(("temperature", "kind", "prompt"), job, strict=True)) | {"repeat": repeat}
            lines.append(json.dumps([key | one for one in run(job, tokens)]) + "\n")
            file.write(lines[-1])
            file.flush()
    return [one for line in lines[: len(jobs)] for one in json.loads(line)], len(lines) >= len(jobs)


def by_prompt(runs):
    """All repeats of each (method, temperature, kind, prompt), fastest first."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["seconds"]):
        groups.setdefault((run["method"], run["temperature"], run["kind"], run["prompt"]), []).append(run)
    return groups


def middle(group):
    """The run of median time; of an even number the faster of the two."""
    return group[(len(group) - 1) // 2]


def speed(runs):
    """New tokens a second, pooled."""
    return sum(len(row) for run in runs for row in run["new_tokens"]) / sum(run["seconds"] for run in runs)


def over(runs, partners):
    """Speedup: pooled, and over calls side by side the median and the quartiles."""
    each = [speed([run]) / speed([partner]) for run, partner in zip(runs, partners, strict=True)]
    low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"pooled": speed(runs) / speed(partners), "median": median, "quartiles": [low, high]}


def summarise(runs, methods, temperatures, kinds):
    """A row for every batch size, temperature, kind and method, from the middle run of each prompt."""
    groups, rows = by_prompt(runs), []
    shapes = [
        (batched, t, kind, method)
        for batched in (False, True)
        for t in temperatures
        for kind in (*kinds, ALL)
        for method in methods
    ]
    for batched, temperature, kind, method in shapes:
        keys = sorted(
            (
                key
                for key in groups
                if key[:2] == (method, temperature) and kind in (key[2], ALL) and (key[3] is None) == batched
            ),
            key=str,
        )
        if not keys:
            continue
        chosen = [middle(groups[key]) for key in keys]
        stats = None if method == PLAIN else pool([RoundStats(**run["stats"]) for run in chosen])
        row = {
            "method": method,
            "batch": max(len(run["new_tokens"]) for run in chosen),
            "kind": kind,
            "temperature": temperature,
            "calls": len(chosen),
            "repeats": min(len(groups[key]) for key in keys),
            "tokens_per_second": speed(chosen),
            "tokens_per_round": stats and stats.tokens_per_round,
            "overhead": stats and stats.overhead,
        }
        for name, other in (("over_ours", OURS), ("over_transformers", PLAIN)):
            partners = [groups.get((other, *key[1:])) for key in keys]
            row[name] = None if None in partners else over(chosen, [middle(group) for group in partners])
        rows.append(row)
    return rows


def records(runs):
    """Every prompt of every method for a result file: tokens, rounds, and the seconds of all repeats."""
    return [
        dict(zip(("method", "temperature", "kind", "prompt"), key, strict=True))
        | {
            "new_tokens": sum(map(len, group[0]["new_tokens"])),
            "rounds": group[0]["stats"] and len(group[0]["stats"]["emitted"]),
            "seconds": [round(run["seconds"], 5) for run in group],
        }
        for key, group in by_prompt(runs).items()
    ]


@torch.inference_mode()
def differences(model, tokenizer, runs, prompts, pairs):
    """How many greedy texts of batch 1 are equal for each pair of methods, and the logits where others first differ.

    A `margin` near zero, the distance between the two largest logits, says that rounding may decide.
    """
    groups, found = by_prompt(runs), []
    for one, other in pairs:
        keys, first = [key[1:] for key in groups if key[:2] == (one, 0.0) and key[3] is not None], []
        for _, kind, number in keys:
            (mine,), (theirs,) = (middle(groups[method, 0.0, kind, number])["new_tokens"] for method in (one, other))
            if (parted := first_difference(mine, theirs)) is None:
                continue
            place = parted[0]
            prefix = tokenizer(prompts[kind][number]).input_ids + mine[:place]
            logits = model(torch.tensor([prefix], device=model.device)).logits[0, -1].float()
            best = logits.topk(2)
            sides = [
                None if len(row) == place else {"token": row[place], "logit": logits[row[place]].item()}
                for row in (mine, theirs)
            ]
            first.append(
                {
                    "kind": kind,
                    "prompt": number,
                    "position": place,
                    "margin": (best.values[0] - best.values[1]).item(),
                    "best_two": best.indices.tolist(),
                    "sides": sides,
                }
            )
        found.append(
            {
                "methods": [one, other],
                "texts": len(keys),
                "identical": len(keys) - len(first),
                "first_differences": first,
            }
        )
    return found


def show(rows, found):
    """Print the table, and in how many greedy texts the methods agree."""
    number = lambda value: "-" if value is None else f"{value:.2f}"
    ratio = lambda of: (
        "-" if of is None else "{:.2f} ({:.2f}, {:.2f} … {:.2f})".format(of["pooled"], of["median"], *of["quartiles"])
    )
    header = [
        "method",
        "batch",
        "kind",
        "temp",
        "tok/s",
        "tokens per round",
        "overhead",
        "over ours (median, quartiles)",
        "over transformers",
    ]
    lines = [
        [
            row["method"],
            str(row["batch"]),
            row["kind"],
            f"{row['temperature']:g}",
            f"{row['tokens_per_second']:.1f}",
            number(row["tokens_per_round"]),
            number(row["overhead"]),
            ratio(row["over_ours"]),
            ratio(row["over_transformers"]),
        ]
        for row in rows
    ]
    print("\n" + table(header, lines) + "\n")
    for pair in found:
        margins = sorted(first["margin"] for first in pair["first_differences"])
        said = f", margins at the first differences {margins[0]:.3f} … {margins[-1]:.3f}" if margins else ""
        print(f"{' and '.join(pair['methods'])}: {pair['identical']} of {pair['texts']} greedy texts identical{said}")
