"""What `scripts.bench_serving` asks of its figures, and whether a run meets it: from its rows alone."""

from collections.abc import Sequence

from scripts.serving_bench.experiments import IDLE, INT8, PREFIX, REQUESTS, SWEEP
from scripts.serving_bench.methods import PARTIAL, PEER, PLAIN, TOTAL

OF_PEER, OF_STATIC, OF_ROOFLINE, OF_STATIC_ON_CPU = 8.0, 2.5, 0.65, 1.5
NEVER_BELOW, SMALL_BATCHES = 0.97, (1, 8)
GAINS = {TOTAL: 2.2, PARTIAL: 1.35}  # at small batches, over the engine without drafts
PREFIX_AT_MOST, INT8_AT_LEAST, IDLE_AT_MOST = 1.05, 1.9, 0.05
AT_SHAPE = {"device": "cuda", "shape": "llama-3.1-8b", "model": None, "dtype": "bfloat16"}
LENGTHS = {"prompt": [32, 2048], "output": [32, 512], "trace": None}
SHIPPED = {"device": "cpu", "model": "tiny", "output": [16, 256], "requests": 32, "rows": 32, "trace": None}


def bars(rows: Sequence[dict], roofline: dict | None, settings: dict) -> list[dict]:
    """What is asked, and what was measured: "what", "value" (None: not measured), "at_least" or "at_most".

    "judged" says whether the run is the one that the bar is for, "met" is None where it is not judged."""
    fits = lambda wanted: all(settings.get(name) == value for name, value in wanted.items())
    at_shape, on_cpu = fits(AT_SHAPE), fits(SHIPPED)
    whole = at_shape and fits(LENGTHS | {"requests": 256, "rows": 256})
    found = _requests_bars(rows, roofline, whole, on_cpu)
    found += _sweep_bars(rows, at_shape and fits(LENGTHS | {"length": 5, "draft_layers": 2}))
    found += _special_bars(rows, at_shape)
    return [bar | {"met": _met(bar)} for bar in found]


def _met(bar: dict) -> bool | None:
    if bar["value"] is None or not bar["judged"]:
        return None
    return bar["value"] >= bar["at_least"] if "at_least" in bar else bar["value"] <= bar["at_most"]


def _speed(rows: Sequence[dict], **wanted) -> float | None:
    """Tokens a second of the row with these values; None where there is none, or it failed."""
    fits = lambda row: all(row.get(name) == value for name, value in wanted.items())
    return next((row.get("tokens_per_second") for row in rows if fits(row)), None)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _requests_bars(rows: Sequence[dict], roofline: dict | None, whole: bool, on_cpu: bool) -> list[dict]:
    found: list[dict] = []
    mine = [row for row in rows if row["experiment"] == REQUESTS]
    if not mine:
        return found
    plain = _speed(mine, method=PLAIN)
    over = lambda method: _ratio(plain, _speed(mine, method=method))
    least = lambda what, value, asked, judged: found.append(
        {"what": what, "value": value, "at_least": asked, "judged": judged}
    )
    if on_cpu:
        least("engine without drafts over static batches of 8", over("static-8"), OF_STATIC_ON_CPU, True)
    else:
        least("engine without drafts over generate_batch", over(PEER), OF_PEER, whole)
        least("engine without drafts over static batches of 64", over("static-64"), OF_STATIC, whole)
        least("share of the roofline", roofline and roofline["share"], OF_ROOFLINE, whole)
    texts = [row["texts"] for row in mine if row.get("texts") and row["texts"]["ours"]]
    share = min((one["equal"] / one["of"] for one in texts), default=None)
    least("share of greedy texts equal to those of the engine without drafts, all of ours", share, 1.0, True)
    return found


def _sweep_bars(rows: Sequence[dict], judged: bool) -> list[dict]:
    found: list[dict] = []
    mine = [row for row in rows if row["experiment"] == SWEEP]
    for batch in dict.fromkeys(row["batch"] for row in mine):
        plain = _speed(mine, batch=batch, method=PLAIN)
        for row in mine:
            if row["batch"] != batch or row["method"] == PLAIN:
                continue
            gain = GAINS.get(row["method"]) if batch in SMALL_BATCHES else None
            bar = {
                "what": f"{row['title']} over the engine without drafts, batch {batch}",
                "value": _ratio(row.get("tokens_per_second"), plain), "at_least": gain or NEVER_BELOW,
                "judged": judged and row["method"] in GAINS,
            }  # fmt: skip
            found.append(bar)
    return found


def _special_bars(rows: Sequence[dict], at_shape: bool) -> list[dict]:
    found = []
    for row in rows:
        if row["experiment"] == PREFIX:
            for name, what in (("work", "prompt tokens computed"), ("memory", "KV pages")):
                text = f"{what} over one prefix and the tails, {row['title']}"
                found.append({"what": text, "value": row.get(name), "at_most": PREFIX_AT_MOST, "judged": at_shape})
        elif row["experiment"] == INT8:
            bar = {"what": "pages of int8 over pages of 16 bits", "value": row.get("pages"), "at_least": INT8_AT_LEAST}
            found.append(bar | {"judged": at_shape and row.get("head_dim") == 128})
        elif row["experiment"] == IDLE and not str(row.get("error")).startswith("skipped"):
            bar = {"what": "GPU idle between kernels", "value": row.get("idle"), "at_most": IDLE_AT_MOST}
            found.append(bar | {"judged": at_shape and row.get("rows") == 64})
    return found
