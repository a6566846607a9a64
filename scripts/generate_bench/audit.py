"""Where the greedy texts of two methods part, and whether rounding alone can have decided there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from specdec.auditing.greedy import first_difference
from specdec.auditing.readings import Readings, judge

REFERENCES = ("autoregressive-eager", "autoregressive-graph", "autoregressive-compile")  # the first that was measured


def compare(rows: Sequence[dict], references: Sequence[str] = REFERENCES) -> list[dict]:
    """How many texts of each row are `identical` to the reference's of its batch size, and where others first differ.

    The reference is the first of `references` that was measured. `tokens` there are those of the method and of the
    reference; None stands behind an end.
    """
    texts = {(row["method"], row["batch"]): row["tokens"] for row in rows if "tokens" in row}
    found = []
    for (method, batch), ours in texts.items():
        reference = next((name for name in references if (name, batch) in texts), None)
        if reference in (None, method):
            continue
        parted = []
        for row, pair in enumerate(zip(ours, texts[reference, batch], strict=True)):
            if (first := first_difference(*pair)) is not None:
                parted.append({"row": row, "position": first[0], "tokens": list(first[1])})
        found.append(
            {
                "method": method,
                "batch": batch,
                "reference": reference,
                "texts": len(ours),
                "identical": len(ours) - len(parted),
                "differences": parted,
            }
        )
    return found


def explain(
    target, prompts_of: Callable[[int], Sequence[Tensor]], compared: Sequence[dict], texts: dict[str, list[list[int]]]
) -> Iterator[dict]:
    """`compared` with what the target's two readings say of every difference, see `specdec.auditing.readings.judge`.

    `texts[batch]` are those of the reference, and `prompts_of(batch)` the token ids `[S]` that they follow. `margins`
    are the distances of the two best tokens in each reading, `behind` how far each side's token lies behind the best.
    """
    readings, known = Readings(target), {}
    for entry in compared:
        prompts = prompts_of(entry["batch"])
        explained = []
        for one in entry["differences"]:
            row, position = one["row"], one["position"]
            key = entry["batch"], row, position
            if key not in known:
                prompt, text = prompts[row], texts[str(entry["batch"])][row][:position]
                known[key] = readings.both(torch.cat([prompt, prompt.new_tensor(text)])[None])[:, 0, 0]
            explained.append(one | asdict(judge(known[key], one["tokens"])))
        yield entry | {"differences": explained}
