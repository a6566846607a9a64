"""Figures of comparisons: speedup against batch size and over prompts, in colours that the colour-blind tell apart.

Needs matplotlib. All begin at zero, have a line at 1.0 and leave out what was not measured."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import exp, log
from textwrap import fill

from specdec.report.intervals import Estimate, spread
from specdec.report.plots import plot_comparison

# Okabe and Ito 2008, with a grey for the yellow, which is too light for lines; black and grey come last
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


@contextmanager
def palette() -> Iterator[None]:
    """Figures made inside use `PALETTE`."""
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.prop_cycle": pyplot.cycler(color=PALETTE)}):
        yield


def plot_speedup_by_batch(axes, values: Mapping[str, Mapping[int, Estimate]]):
    """Speedup of each method against the batch size, with intervals; a star where it falls to 1, see `crossover`."""
    for number, (method, by_batch) in enumerate(values.items()):
        batches = sorted(by_batch)
        found = [by_batch[batch] for batch in batches]
        at = [batch * 1.03 ** (number - len(values) / 2) for batch in batches]  # bars beside each other
        style = dict(marker=MARKERS[number % len(MARKERS)], capsize=3, label=method)
        drawn = axes.errorbar(at, [one.value for one in found], yerr=spread(found), **style)
        ends = crossover({batch: one.value for batch, one in by_batch.items()})
        if ends is not None:
            axes.plot([ends], [1], "*", markersize=14, color=drawn[0].get_color(), zorder=5)
    sizes = sorted({batch for by_batch in values.values() for batch in by_batch})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="prompts at a time (star: where it falls to 1)", ylabel="speedup over plain decoding")
    axes.set_ylim(bottom=0)
    return axes


def crossover(speedups: Mapping[int, float]) -> float | None:
    """The first batch size at which a speedup falls to 1, linear in its logarithm between sizes; None: it does not.

    >>> round(crossover({1: 2.0, 4: 1.5, 16: 0.5}), 3)
    8.0
    """
    sizes = sorted(speedups)
    for left, right in zip(sizes, sizes[1:], strict=False):
        high, low = speedups[left], speedups[right]
        if high > 1 >= low:
            return exp(log(left) + (log(right) - log(left)) * (high - 1) / (high - low))
    return None


def plot_beside_one(axes, values: Mapping[str, Mapping[str, Estimate | None]], ylabel: str):
    """The bars of `plot_comparison` from zero, with a line at 1.0: of speedups, and of tokens per round."""
    plot_comparison(axes, values, "", ylabel)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    return axes


def plot_ecdf(axes, ratios: Mapping[str, Sequence[float]]):
    """For each method the share of prompts with at most each speedup; a line at 1.0."""
    for number, (method, found) in enumerate(ratios.items()):
        values = sorted(found)
        shares = [place / len(values) for place in range(len(values) + 1)]
        axes.step([0, *values], shares, where="post", label=method, linestyle=("-", "--", "-.", ":")[number % 4])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="speedup of a prompt over plain decoding", ylabel="share of prompts", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    return axes


def caption(figure, text: str) -> None:
    """Write `text`, the environment say, below a figure."""
    width = int(figure.get_size_inches()[0] * 17)
    figure.supxlabel(fill(text, width), fontsize=7, color="#444444")


def plot_losslessness(axes, p_values: Mapping[str, Sequence[float]], level: float):
    """P-values of an audit's tests and of its negative control, in rising order, beside the level of each test.

    Those of a lossless method lie around the dashed line, where they are spread evenly; the control's must not."""
    for number, (name, found) in enumerate(p_values.items()):
        rising = sorted(max(p, 1e-18) for p in found)
        places = [(place + 0.5) / len(rising) for place in range(len(rising))]
        axes.plot(places, rising, marker=MARKERS[number % len(MARKERS)], linestyle="", label=name)
    places = [place / 1000 for place in range(1, 1001)]  # a curve, since the axis is logarithmic
    axes.plot(places, places, "--", color="grey", linewidth=0.8, label="evenly spread")
    axes.axhline(level, color="black", linewidth=0.8, label=f"level of a test, {level:.1g}")
    axes.set(xlabel="tests in order, as a share", ylabel="p-value", yscale="log", xlim=(0, 1))
    axes.set_title("Losslessness, with the negative control")
    axes.legend(fontsize=8)
    return axes
