"""Each figure that a result holds the numbers of is drawn, from the result alone."""

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.container import BarContainer

from specdec.cli.results import make_result
from specdec.evaluation.diagnosis import Diagnosis, ShapeCosts
from specdec.evaluation.figures.diagnosis import figures_of_diagnosis
from specdec.evaluation.figures.draw import draw_result, figures_in
from specdec.evaluation.figures.rounds import choices_of
from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import Run, record_of, run_of
from specdec.planning.costs import Costs
from specdec.report.comparison_plots import palette
from specdec.report.stats import RoundStats

STEPS = RoundStats((0,) * 6, (0,) * 6, (1,) * 6, seconds=(0.01,) * 5)
TREE = RoundStats((3, 3), (2, 1), (3, 2), (0.02,), depths=(2, 2), ranks=(((2, 1), (1, 0)), ((2, 0), (1, None))))
PIECES = (("ab", "c"), ("d", "e"))


@pytest.fixture(autouse=True)
def closed():
    with palette():
        yield
    pyplot.close("all")


def bench(**more):
    runs = [
        Run(OURS, "code", 0.0, 0, 0, 6, "x", 0.1, STEPS, group="code 0", pieces=(("", "a"), ("", "b"))),
        Run("tree", "code", 0.0, 0, 0, 6, "x", 0.05, TREE, group="code 0", pieces=PIECES),
        Run("theirs", "code", 0.0, 0, 0, 6, "x", 0.3, group="code 0"),
    ]
    settings = {"drafter": ["tree"], "repeats": 1, "max_new_tokens": 6}
    return make_result("bench", settings, [], [record_of(run) for run in runs], **more)


def test_a_bench_has_choices_texts_and_costs():
    costs = {"tree": {"draft": 0.2, "sizes": [1, 4], "verify": [1.0, 1.2]}}
    found = dict(figures_in(bench(costs=costs)))
    assert found.keys() == {
        "speedup_by_task", "tokens_by_task", "acceptance_conditional", "acceptance_marginal", "ecdf",
        "tokens_by_budget", "choices", "text_code", "costs",
    }  # fmt: skip
    labels = [text.get_text() for text in found["choices"].axes[0].texts]
    assert labels == ["0.50\nof 2", "0.50\nof 2", "0.50\nof 2"]
    assert [axes.get_title(loc="left") for axes in found["text_code"].axes] == ["tree: 6 tokens in 2 rounds"]
    left, right = found["costs"].axes
    assert [line.get_ydata()[-1] for line in left.get_lines()[:1]] == [1.2]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in right.containers}
    assert widths["verifying"] == [pytest.approx(10), pytest.approx(12)]
    assert widths["drafting"] == [0, pytest.approx(4)] and widths["the rest"] == [0, pytest.approx(4)]


def test_a_method_of_which_ranks_are_missing_has_no_heat_map():
    """Files keep no ranks of chains: what is left would be the texts with branches alone."""
    texts = [Run("lookup", "code", 0.0, n, 0, 6, "x", 0.05, rounds, group=f"code {n}") for n, rounds in
             enumerate((TREE, RoundStats((2, 2), (2, 1), (3, 2), (0.02,))))]  # fmt: skip
    assert list(choices_of(texts)) == [] and len(list(choices_of(texts[:1]))) == 1


def test_pieces_survive_a_file_and_older_results_have_none():
    run = Run("tree", "code", 0.0, 0, 0, 6, "x", 0.05, TREE, pieces=PIECES)
    assert run_of(record_of(run)).pieces == PIECES
    without = record_of(Run("tree", "code", 0.0, 0, 0, 6, "x", 0.05, TREE))
    assert "pieces" not in without and run_of(without).pieces == ()


def doctor(ranks=(0.7, 0.1), check=()):
    shape = lambda name, levels, nodes, parents: ShapeCosts(
        name, levels, nodes, (2.0, 3.0, 2.5), {1: 0.02}, {1: 0.03}, parents
    )
    shapes = (shape("own", 3, 3, None), shape("chain 1", 1, 1, (None, 0)), shape("tree 4 x 2", 2, 3, (None, 0, 0, 1)))
    plain = ShapeCosts("plain", 0, 0, (1.0, 1.0, 1.0), {1: 0.01}, {1: 0.02})
    costs = {1: Costs(0.01, 0.1, (1, 4), (1.0, 1.2))}
    found = Diagnosis(plain, shapes, costs, {"code": [0.7, None]}, 20.0, ranks)
    settings = {"drafter": "d", "target": "t", "max_new_tokens": 20}
    return make_result("doctor", settings, found.lines(), [], diagnosis=found.as_dict(), check=list(check), notes=[])


def test_a_diagnosis_has_its_tree_budgets_and_prediction(tmp_path):
    row = {"batch": 1, "predicted": 1.4, "tokens_per_round": 2.0, "off": 0.0}
    check = [row | {"name": "own", "speedup": 1.5, "speedup_interval": [1.4, 1.7]},
             row | {"name": "chain 1", "speedup": 1.1, "speedup_interval": None}]  # fmt: skip
    result = doctor(check=check)
    found = dict(figures_of_diagnosis(result))
    assert list(found) == ["doctor", "tree", "tokens_by_budget", "prediction"]
    assert "tree 4 x 2" in found["tree"].get_suptitle()
    (axes,) = found["tokens_by_budget"].axes
    assert {c.get_label(): list(c[0].get_xdata()) for c in axes.containers} == {"chain": [2, 4], "best tree": [4]}
    bars = [one for one in found["prediction"].axes[0].containers if isinstance(one, BarContainer)]
    assert [[bar.get_height() for bar in one] for one in bars] == [[1.4, 1.4], [1.5, 1.1]]
    files = draw_result(result, tmp_path)
    assert [path.name for path in files] == ["doctor.png", "tree.png", "tokens_by_budget.png", "prediction.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_an_older_diagnosis_has_no_ranks():
    result = doctor()
    del result["diagnosis"]["ranks"]
    assert [name for name, _ in figures_of_diagnosis(result)] == ["doctor", "tree"]


def test_the_environment_stands_below_each_figure(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("specdec.evaluation.figures.draw.caption", lambda figure, text: said.append(text))
    files = draw_result(bench(), tmp_path)
    assert len(said) == len(files) and all("1 repeats" in text and "torch" in text for text in said)
