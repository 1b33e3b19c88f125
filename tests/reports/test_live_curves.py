"""Curves that are drawn while a run trains: how often, and of what; ``test_notebook`` sees them in a notebook."""

from unittest.mock import Mock

import pytest

from ksuit_runner.reports import live_curves
from ksuit_runner.ui import notebook


@pytest.fixture
def shown(monkeypatch):
    """Collect what is shown, with a clock that goes on by 10 ms whenever it is looked at."""
    clock, pictures = {"now": 0.0}, []

    def monotonic():
        clock["now"] += 0.01
        return clock["now"]

    monkeypatch.setattr(live_curves, "monotonic", monotonic)
    monkeypatch.setattr(notebook, "_show", lambda handle, content: pictures.append(content) or "handle")
    return clock, pictures


def test_drawing_takes_a_twentieth_of_the_time_and_the_end_is_drawn(shown, monkeypatch):
    clock, pictures = shown
    monkeypatch.setattr(live_curves, "_FIRST_S", 0.1)
    monkeypatch.setattr(live_curves, "curves", lambda *arguments: Mock())
    curves = live_curves.LiveCurves("first")
    for update in range(1000):
        curves.add(update, {"loss/train": 1 / (1 + update)})
        curves.draw()
    assert len(pictures) == pytest.approx(0.05 * clock["now"] / 0.02, abs=3), "each takes 20 ms by this clock"
    curves.add(1000, {"loss/train": 0.0})
    before = len(pictures)
    curves.draw(at_end=True)
    curves.draw(at_end=True)
    assert len(pictures) == before + 1


def test_a_short_run_draws_nothing(shown):
    _, pictures = shown
    curves = live_curves.LiveCurves("first")
    for update in range(50):
        curves.add(update, {"loss/train": 1.0})
        curves.draw()
    curves.draw(at_end=True)
    assert not pictures


def test_of_many_points_every_second_one_is_dropped_and_the_last_one_kept(shown):
    clock, pictures = shown
    curves = live_curves.LiveCurves("first")
    for update in range(5000):
        curves.add(update, {"loss/train": float(update), "accuracy/test": float("nan")})
    points = curves._points["loss/train"]
    assert len(points) <= 1001 and 4999 in points and max(points) - min(points) > 4900
    clock["now"] = 10.0
    curves.draw()
    assert set(pictures[0]) == {"text/plain", "image/png"}


def test_dollars_in_a_key_are_no_formula(shown):
    clock, pictures = shown
    curves = live_curves.LiveCurves("first")
    for update in range(2):
        curves.add(update, {"loss/$a$$b^$": float(update)})
    clock["now"] = 10.0
    curves.draw()
    assert len(pictures) == 1


def test_an_error_of_the_notebook_ends_the_drawing_and_not_the_training(shown, monkeypatch, caplog):
    clock, _ = shown
    monkeypatch.setattr(notebook, "_show", Mock(side_effect=RuntimeError("no browser")))
    curves, view = live_curves.LiveCurves("first"), notebook.NotebookView()
    for update in range(3):
        clock["now"] += 10.0
        curves.add(update, {"loss/train": 1.0})
        curves.draw()
        view.update("a bar")
    curves.draw(at_end=True)
    curves_warning, view_warning = sorted(caplog.messages)
    assert "curves" in curves_warning and "progress" in view_warning and "no browser" in view_warning
    assert notebook._show.call_count == 2
