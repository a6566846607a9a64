"""Axes to draw on; every test's figure can also be drawn."""

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    figure.canvas.draw()
    pyplot.close(figure)
