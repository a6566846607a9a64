"""What `scripts.bench_generate` asks of its figures, and whether a run meets it: from its rows alone."""

from collections.abc import Sequence

from scripts.generate_bench.methods import COSTS, LONG_RUN, NODES
from scripts.generate_bench.peers import ASSISTED, EAGER, STATIC
from scripts.generate_bench.quantised import NONE, kinds_of

FAST = ("graph", "compile")  # the modes whose rounds run on the device; a bar takes the faster one
# the settings for which the bars on speed are judged
JUDGED = {
    "device": "cuda", "shape": "llama-3.1-8b", "model": None, "dtype": "bfloat16", "prompt": 128, "new_tokens": 256,
    "length": 5, "draft_layers": 2, "acceptance": None,
}  # fmt: skip


def row_of(rows: Sequence[dict], method: str, batch: int | None = 1) -> dict:
    """The row of a method; {} where there is none, or it failed."""
    return next((row for row in rows if (row["method"], row["batch"]) == (method, batch) and not row.get("error")), {})


def fastest(rows: Sequence[dict], kind: str, batch: int = 1) -> dict:
    """The faster row of `FAST`, or {}."""
    found = [row_of(rows, f"{kind}-{mode}", batch) for mode in FAST]
    return max(found, key=lambda row: row.get("tokens_per_second", 0.0))


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`; None where either is missing."""
    return one / other if one is not None and other else None


def predicted(rows: Sequence[dict], batch: int, length: int) -> float | None:
    """Tokens a second that the parts promise: tokens per round / (γ c + v) times our own autoregressive speed."""
    chain, plain = fastest(rows, "chain", batch), fastest(rows, "autoregressive", batch)
    costs = row_of(rows, f"{COSTS}-graph", batch)
    if not (costs and chain and plain) or costs["draft_seconds"] is None:
        return None
    step = costs["forward_seconds"]["1"]
    c, v = costs["draft_seconds"] / step, costs["forward_seconds"][str(length + 1)] / step
    return chain["tokens_per_round"] / (length * c + v) * plain["tokens_per_second"]


def bars(rows: Sequence[dict], compared: Sequence[dict], settings: dict) -> list[dict]:
    """What is asked, and what was measured.

    `met` is None where nothing was measured, or where the run is not the one that the bar is for (`judged` False)."""
    plain = set(kinds_of(settings)) == {NONE}
    fits = plain and all(settings[name] == value for name, value in JUDGED.items())
    at_shape = plain and all(settings[name] == JUDGED[name] for name in ("device", "shape", "model"))
    found = [bar | {"judged": fits} for bar in [*speed_bars(rows, settings), *resource_bars(rows)]]
    # counting texts would not show a difference
    judged = at_shape and settings["weights"] == "random"
    found.append(equality_bar(compared, settings["dtype"]) | {"judged": judged})
    found.append(growth_bar(rows) | {"judged": at_shape})
    verdict = lambda bar: bar["judged"] and met(bar) if bar["value"] is not None and bar["judged"] else None
    return [bar | {"met": verdict(bar)} for bar in found]


def speed_bars(rows: Sequence[dict], settings: dict) -> list[dict]:
    """Speeds over transformers', and what the parts of a round cost."""
    speed = lambda row: row.get("tokens_per_second")
    over = lambda row, method: ratio(speed(row), speed(row_of(rows, method)))
    least = lambda what, value, bound: {"what": what, "value": value, "at_least": bound}
    most = lambda what, value, bound: {"what": what, "value": value, "at_most": bound}
    plain, chain, medusa = (fastest(rows, kind) for kind in ("autoregressive", "chain", "medusa"))
    forwards = row_of(rows, f"{COSTS}-graph").get("forward_seconds", {})
    planted, length = settings["acceptance"], settings["length"]
    exact = settings["model"] is None and len(set(kinds_of(settings))) == 1
    draft = f"planted acceptance {planted:g}" if planted is not None else "exact draft" if exact else "given draft"
    shares = [ratio(r.get("parts", {}).get("host"), r.get("round_seconds")) for r in on_device(rows) if r["batch"] == 1]
    host = max((x for x in shares if x is not None), default=None)
    costs = lambda name: ratio(forwards.get(name), forwards.get("1"))
    medusa_round = ratio(medusa.get("round_seconds"), plain.get("round_seconds"))
    static = "autoregressive over transformers static cache + compile, batch 1"
    return [
        least("autoregressive, batch 1, tok/s", speed(plain), 225.0),
        least("autoregressive over transformers eager, batch 1", over(plain, EAGER), 5.0),
        least(static, over(plain, STATIC), 1.5),
        least(f"chain, {draft}, γ {length}, batch 1, tok/s", speed(chain), 750.0),
        least("chain over transformers assisted, batch 1", over(chain, ASSISTED), 6.0),
        most("host share of a round, batch 1, worst method", host, 0.05),
        most(f"verify {length + 1} tokens over 1, batch 1", costs(str(length + 1)), 1.08),
        most(f"verify a tree of {NODES} over 1 token, batch 1", costs(f"tree {NODES}"), 1.2),
        most("Medusa round over an autoregressive step, batch 1", medusa_round, 1.25),
        *(
            least(
                f"chain over what its parts predict, batch {batch}",
                ratio(speed(fastest(rows, "chain", batch)), predicted(rows, batch, length)),
                0.75,
            )
            for batch in (8, 32)
        ),
    ]


def resource_bars(rows: Sequence[dict]) -> list[dict]:
    """What capturing graphs costs: seconds, and memory over all batch sizes."""
    captures = [row["capture_seconds"] for row in on_device(rows) if row.get("capture_seconds") is not None]
    pools: dict[str, int] = {}
    for row in on_device(rows):
        if row.get("graph_bytes") is not None:
            pools[row["method"]] = pools.get(row["method"], 0) + row["graph_bytes"]
    gigabytes = ratio(max(pools.values(), default=None), 1e9)
    return [
        {"what": "capture of one more round, worst method, s", "value": max(captures, default=None), "at_most": 1.0},
        {"what": "graphs of all batch sizes, worst method, GB", "value": gigabytes, "at_most": 1.0},
    ]


def on_device(rows: Sequence[dict]) -> list[dict]:
    """The rows whose rounds run on the device."""
    return [row for row in rows if row["method"].endswith(FAST) and not row.get("error")]


def met(bar: dict) -> bool:
    """Whether a bar's value is within it."""
    return bar.get("at_least", float("-inf")) <= bar["value"] <= bar.get("at_most", float("inf"))


def equality_bar(compared: Sequence[dict], dtype: str) -> dict:
    """Share of the greedy texts of device rounds that equal the reference's; in 16 bits a near-tie may part them."""
    ours, exact = [entry for entry in compared if entry["method"].endswith(FAST)], dtype == "float32"
    near = 0 if exact else sum(one.get("near_tie", False) for entry in ours for one in entry["differences"])
    what = "greedy texts of graph and compile equal to eager's" + ("" if exact else ", or parting at a near-tie")
    texts = sum(entry["texts"] for entry in ours)
    return {"what": what, "value": ratio(sum(entry["identical"] for entry in ours) + near, texts), "at_least": 1.0}


def growth_bar(rows: Sequence[dict]) -> dict:
    """How much more memory of the card is allocated after a long run than before it."""
    row = next((row for row in rows if row["method"].startswith(LONG_RUN) and not row.get("error")), None)
    known = row is not None and row["after"]["allocated"] is not None
    grown = (row["after"]["allocated"] - row["before"]["allocated"]) / 2**20 if known else None
    what = f"memory that {row['rounds'] if row else 'many'} rounds leave behind, MiB"
    return {"what": what, "value": grown, "at_most": 1.0}
