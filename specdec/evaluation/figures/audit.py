"""The figure of an audit's samples. Needs matplotlib."""

from collections.abc import Iterator, Mapping
from typing import Any

from specdec.report.comparison_plots import plot_losslessness


def figures_of_audit(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The p-values of an audit's samples and of its control, if there were samples."""
    from matplotlib import pyplot

    found: dict[str, list[float]] = {}
    for one in result["records"]:
        if "p_value" in one:
            found.setdefault(one["part"], []).append(one["p_value"])
    if found:
        (level,) = [one["level_of_each"] for one in result["methods"] if one["name"] == "sampled"]
        figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
        plot_losslessness(axes, found, level)
        yield "losslessness", figure
