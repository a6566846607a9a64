"""Labels of points that do not lie on each other. Needs matplotlib."""

from collections.abc import Iterator, Sequence
from math import cos, pi, sin

import numpy as np

FARTHEST = 100  # points (1/72 inch) from a label to its point
MARKER = 4  # points that are kept clear around each labelled point


def label_points(axes, places: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]) -> list:
    """Write each label in its colour beside its place, in data coordinates; returns the annotations.

    A label goes to the nearest spot where it covers no other label, no labelled point and no legend, and as little of
    the lines and error bars as possible; a thin line leads to one that had to move away. Call it last: the spots are
    those of the figure's present size, limits and layout."""
    if not labels:
        return []
    axes.figure.draw_without_rendering()  # settles limits and layout
    scale, frame = axes.figure.dpi / 72, axes.bbox.extents
    centres = axes.transData.transform(np.asarray(places, dtype=float))
    taken = [np.concatenate([centre - MARKER * scale, centre + MARKER * scale]) for centre in centres]
    taken += [axes.get_legend().get_window_extent().extents] if axes.get_legend() is not None else []
    drawn, annotations = _drawn(axes), []
    for place, centre, label, colour in zip(places, centres, labels, colours, strict=True):
        text = axes.annotate(label, place, xytext=(0, 0), textcoords="offset points", fontsize=8, color=colour,
                             ha="center", va="center")  # fmt: skip
        size = np.asarray(text.get_window_extent().size)
        spots = [(away, centre + offset * scale) for away, offset in _offsets(size / scale)]
        boxes = [np.concatenate([middle - size / 2 - scale, middle + size / 2 + scale]) for _, middle in spots]
        costs = [_cost(box, away, taken, drawn, frame) for box, (away, _) in zip(boxes, spots, strict=True)]
        box, (away, middle) = boxes[int(np.argmin(costs))], spots[int(np.argmin(costs))]
        text.set_position(tuple((middle - centre) / scale))
        if away > 2 * MARKER:
            edge = (np.clip(centre, box[:2], box[2:]) - centre) / scale
            line = dict(arrowstyle="-", color=colour, linewidth=0.5, shrinkA=0, shrinkB=0)
            axes.annotate("", place, xytext=tuple(edge), textcoords="offset points", zorder=1, arrowprops=line)
        taken.append(box)
        annotations.append(text)
    return annotations


def _offsets(size: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Distances of a label's edge from its point, and where its middle then lies, in points; to the right first."""
    for away in np.arange(MARKER + 2, FARTHEST, 6.0):
        for turn in range(16):
            direction = np.array([cos(turn * pi / 8), sin(turn * pi / 8)])
            yield float(away), direction * (away + size / 2)


def _cost(box: np.ndarray, away: float, taken: list, drawn: np.ndarray, frame: np.ndarray) -> float:
    """How bad a label in `box` is; boxes are (x0, y0, x1, y1) in pixels. A covered piece of line costs 20 points."""
    covered = sum(_overlaps(box, other) for other in taken)
    outside = bool((box[:2] < frame[:2]).any() or (box[2:] > frame[2:]).any())
    crossed = ((drawn > box[:2]) & (drawn < box[2:])).all(1).sum() if len(drawn) else 0
    return 1e6 * covered + 1e5 * outside + 20.0 * crossed + away


def _overlaps(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:2] < other[2:]).all() and (other[:2] < one[2:]).all())


def _drawn(axes) -> np.ndarray:
    """Points along the lines and error bars of `axes`, some pixels apart, in pixels `[n, 2]`."""
    paths = [(line.get_transform(), line.get_xydata()) for line in axes.get_lines()]
    for collection in axes.collections:
        paths += [(collection.get_transform(), path.vertices) for path in collection.get_paths()]
    pieces = [np.zeros((0, 2))]
    for transform, vertices in paths:
        corners = transform.transform(vertices)
        for start, end in zip(corners[:-1], corners[1:], strict=True):
            steps = max(2, int(np.hypot(*(end - start)) // 4)) if np.isfinite([start, end]).all() else 0
            pieces.append(start + np.linspace(0, 1, steps)[:, None] * (end - start))
    return np.concatenate(pieces)
