import io

import pytest

from ksuit_runner import __main__
from ksuit_runner.cli import dispatch


class Terminal(io.StringIO):
    """An output that a person reads."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "words", "sign"),
    [
        (Terminal, ["model=mlp"], "starting\r"),
        (Terminal, ["-m", "seed=1,2"], "starting\r"),
        (Terminal, ["--version"], ""),
        (io.StringIO, ["model=mlp"], ""),
    ],
)
def test_a_terminal_gets_a_first_sign_before_anything_is_imported(monkeypatch, stream, words, sign):
    output, seen = stream(), []
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.argv", ["ksuit-runner", *words])
    monkeypatch.setattr(dispatch, "main", lambda: seen.append(output.getvalue()))
    __main__.main()
    assert seen == [sign]


def test_an_interrupt_before_anything_has_begun_ends_without_a_traceback(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130
