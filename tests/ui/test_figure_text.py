"""Text in figures, whose characters a font may lack; warnings are errors here."""

from matplotlib.figure import Figure

from ksuit_runner.ui.figure_text import literal, save_figure


def test_a_name_that_the_font_lacks_is_no_warning(tmp_path):
    figure = Figure()
    figure.add_subplot(title=literal("\u5b57 $x_"), xlabel="\U0001f600")
    save_figure(figure, tmp_path / "name.png", format="png")
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")
