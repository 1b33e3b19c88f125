"""The picture of a leaderboard: what is on its axes, and that all of it can be read."""

import math
import struct

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ksuit_runner.sweep.leaderboard import Leaderboard, Row
from ksuit_runner.sweep.leaderboard_plot import draw_leaderboard

OBJECTIVE = "accuracy/test"


def board(keys, results, objective=OBJECTIVE, name="mine", status="finished"):
    """Return a leaderboard of jobs, each given as its values, in the order of the keys, and its result."""
    rows = [
        Row(index, dict(zip(keys, values, strict=True)), status, f"run{index}", 1.0, {OBJECTIVE: result})
        for index, (*values, result) in enumerate(results)
    ]
    return Leaderboard(name, objective, "higher", list(keys), rows)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw into a file and return the figure that was saved, and the size in the file's head."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **kwargs: (saved.append(self), save(self, *given, **kwargs))
    )

    def draw(*arguments, **kwargs):
        path = tmp_path / "plot.png"
        assert draw_leaderboard(path, board(*arguments, **kwargs))
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG\r\n\x1a\n")
        return saved[-1], struct.unpack(">II", head[16:24])

    return draw


def assert_readable(figure):
    """No text leaves the picture, and no two names at an axis touch each other."""
    renderer = figure.canvas.get_renderer()
    axes = figure.axes[0]
    low, high = axes.get_xlim()  # a label outside of them is not drawn
    names = [[label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high], axes.texts]
    texts = [*names[0], *names[1], axes.xaxis.label, axes.yaxis.label, figure._suptitle]
    for text in filter(Text.get_text, texts):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
    for group in names:
        boxes = [(text, text.get_window_extent(renderer)) for text in group if not text.get_rotation()]
        for index, (text, box) in enumerate(boxes):
            for other, other_box in boxes[:index]:
                assert not box.overlaps(other_box), (text, other)


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def points(axes):
    """Return the places and means that are drawn."""
    container = axes.containers[0]
    return [tuple(point) for point in container.lines[0].get_xydata()]


def bars(axes):
    """Return the lengths of the bars around the means, without those of a single value."""
    (collection,) = axes.containers[0].lines[2]
    lengths = [(part[1, 1] - part[0, 1]) / 2 for part in collection.get_segments() if len(part)]
    return [length for length in lengths if not math.isnan(length)]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (("1e-4", "1e-3", "1e-2"), "log"),
        (("0.1", "0.2", "0.3"), "linear"),
        (("0", "1e-3", "1e-1"), "linear"),
        (("-100", "1", "100"), "linear"),
    ],
)
def test_numbers_that_span_decades_are_spread_by_their_logarithm(draw, values, scale):
    figure, size = draw(["optimizer.lr"], [(value, 0.5) for value in values])
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.get_suptitle()) == ("optimizer.lr", OBJECTIVE, "mine")
    assert size == (720, 540)
    assert_readable(figure)


def test_mean_and_deviation_over_seeds_at_each_value(draw):
    results = [("10", "0", 0.6), ("2", "0", 0.4), ("10", "1", 0.8), ("2", "1", 0.5), ("2", "2", 0.6), ("5", "0", 0.1)]
    figure, _ = draw(["+model.depth", "seed"], results)
    axes = figure.axes[0]
    assert points(axes) == [(2, pytest.approx(0.5)), (5, 0.1), (10, pytest.approx(0.7))]
    assert bars(axes) == pytest.approx([0.1, 0.2 / 2**0.5])
    assert axes.get_xlabel() == "model.depth"
    assert {text.get_text() for legend in figure.legends for text in legend.texts} == {"run", "mean ± deviation"}
    assert all(float(tick.replace("\N{MINUS SIGN}", "-")).is_integer() for tick in ticks(axes))


def test_one_run_per_value_needs_no_bars_and_no_legend(draw):
    figure, _ = draw(["model.depth"], [("2", 0.5), ("3", 0.6)])
    assert bars(figure.axes[0]) == [] and figure.legends == []


def test_names_stand_below_their_points(draw):
    figure, _ = draw(["model", "seed"], [("mlp", "0", 0.9), ("cnn", "0", 0.8), ("mlp", "1", 0.7)])
    axes = figure.axes[0]
    assert ticks(axes) == ["mlp", "cnn"]
    assert points(axes) == [(0, pytest.approx(0.8)), (1, 0.8)]
    assert axes.containers[0].lines[0].get_linestyle() == "None"
    assert_readable(figure)


def test_many_long_names_do_not_run_into_each_other(draw):
    names = [f"a_model_with_quite_a_long_name_{number}" for number in range(12)]
    figure, (width, height) = draw(["model"], [(name, 0.5) for name in names], name="a long name " * 20)
    assert 720 <= width <= 1500 and height == 540
    labels = figure.axes[0].get_xticklabels()
    assert all(len(label.get_text()) <= 24 and label.get_rotation() for label in labels)
    assert_readable(figure)


@pytest.mark.parametrize("values", [("nan", "1"), ("inf", "1"), ("null", "1"), ("true", "false")])
def test_what_is_no_finite_number_is_a_name(draw, values):
    figure, _ = draw(["trainer.max_norm"], [(value, 0.5) for value in values])
    assert ticks(figure.axes[0]) == list(values)


def test_seeds_alone_are_names_in_their_order(draw):
    figure, _ = draw(["seed"], [("10", 0.9), ("2", 0.8), ("0", 0.7)])
    assert ticks(figure.axes[0]) == ["0", "2", "10"]
    assert [result for _, result in points(figure.axes[0])] == [0.7, 0.8, 0.9]


def test_dollars_are_no_formula(draw):
    figure, _ = draw(["model"], [("'$x^2$'", 0.5), ("mlp", 0.6)], name="$a_b$")
    assert figure.get_suptitle() == r"\$a_b\$"
    assert ticks(figure.axes[0])[0] == r"'\$x^2\$'"


@pytest.mark.parametrize("value", ["1e-2", "mlp"])
def test_a_single_value_is_drawn(draw, value):
    figure, _ = draw(["optimizer.lr"], [(value, 0.5)])
    assert_readable(figure)


def test_several_keys_are_parallel_coordinates(draw):
    results = [("0.001", "mlp", "0", 0.9), ("0.1", "cnn", "0", 0.5), ("0.01", "cnn", "1", 0.7)]
    figure, size = draw(["optimizer.lr", "model", "seed"], results)
    axes, scale = figure.axes
    assert ticks(axes) == ["optimizer.lr", "model", OBJECTIVE]  # the seed is none of them
    assert scale.get_ylabel() == OBJECTIVE
    lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3]
    # The best one was drawn last; the learning rate by its logarithm, the models as they come, and the result.
    assert lines == [[pytest.approx(0.5), 1, pytest.approx(0.5)], [1, 1, 0], [0, 0, 1]]
    assert {text.get_text() for text in axes.texts} >= {"0.001", "0.01", "0.1", "mlp", "cnn", "0.5", "0.7", "0.9"}
    assert size == (720, 540)
    assert_readable(figure)


def test_a_search_with_many_values_can_be_read(draw):
    def result(number):
        values = (10 ** (-4 + number / 20), number**0.5 / 20, 8 * number)
        return *map(repr, values), ("mlp", "a_model_with_quite_a_long_name", "gru")[number % 3], 1 / (1 + number)

    keys = ["optimizer.lr", "callbacks.ema.decays", "model.hidden_features", "model"]
    figure, (width, height) = draw(keys, [result(number) for number in range(60)])
    assert 900 <= width <= 1500 and height == 540
    texts = figure.axes[0].texts
    assert len(texts) <= 5 * 13
    assert {"0.0001", "0.08913", "0", "472", "gru"} <= {text.get_text() for text in texts}
    assert_readable(figure)


def test_only_what_has_finished_counts_at_a_value_and_the_rest_is_dotted_beside_others(draw, tmp_path):
    path = tmp_path / "failed.png"
    assert not draw_leaderboard(path, board(["model"], [("mlp", 0.5)], status="failed"))
    figure, _ = draw(["model", "optimizer.lr"], [("mlp", "1", 0.5), ("cnn", "2", 0.4)], status="pruned")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [line.get_linestyle() for line in lines] == [":", ":"]


@pytest.mark.parametrize(
    "given",
    [
        (["model"], [("mlp", 0.5)], None),
        (["model"], [("mlp", float("nan")), ("cnn", float("inf"))]),
        (["model"], [("mlp", 0.5)], "loss/test"),
        (["model"], []),
        ([], [(0.5,)]),
    ],
    ids=["no objective", "no finite result", "nobody logged it", "no jobs", "nothing varies"],
)
def test_nothing_is_drawn_where_there_is_nothing_to_draw(given, tmp_path):
    path = tmp_path / "plot.png"
    assert not draw_leaderboard(path, board(*given))
    assert not path.exists()
