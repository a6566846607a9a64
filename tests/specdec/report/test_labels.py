import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from specdec.report.labels import label_points


def covered(boxes):
    return [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i]) if one.overlaps(other)]


@pytest.mark.covering
@pytest.mark.parametrize("dpi", [72, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 8, 14])
def test_labels_of_points_in_one_place_do_not_overlap(count, dpi):
    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=dpi, layout="constrained")
    places = [(0.5 + 0.004 * i, 0.5) for i in range(count)]
    axes.plot(*zip(*places, strict=True), "o", label="points")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    labels = [f"label {i}" for i in range(count)]
    texts = label_points(axes, places, labels, ["black"] * count)
    figure.canvas.draw()
    assert [text.get_text() for text in texts] == labels and [text.xy for text in texts] == places
    boxes = [text.get_window_extent() for text in texts]
    assert not covered([*boxes, axes.get_legend().get_window_extent()])
    for x, y in axes.transData.transform(places):
        assert not [box for box in boxes if box.contains(x, y)]
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    pyplot.close(figure)


def test_a_lone_label_stands_right_of_its_point_without_a_line():
    figure, axes = pyplot.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    (text,) = label_points(axes, [(0.5, 0.5)], ["alone"], ["red"])
    assert list(axes.texts) == [text] and text.get_color() == "red"
    assert text.get_window_extent().x0 > axes.transData.transform((0.5, 0.5))[0]
    pyplot.close(figure)


def test_a_label_moves_off_a_line_and_away_from_the_edge():
    figure, axes = pyplot.subplots()
    axes.plot([0.5, 1], [0.5, 0.5])  # where the label would stand
    axes.set(xlim=(0, 1), ylim=(0, 1))
    crossed, edge = label_points(axes, [(0.5, 0.5), (1, 0.2)], ["crossed", "edge"], ["black"] * 2)
    assert not crossed.get_window_extent().overlaps(axes.get_lines()[0].get_window_extent())
    assert edge.get_window_extent().x1 <= axes.bbox.x1
    pyplot.close(figure)


def test_no_points_no_labels():
    figure, axes = pyplot.subplots()
    assert label_points(axes, [], [], []) == []
    pyplot.close(figure)
