"""Draws a run and a sweep as the terminal shows them: docs/pictures/terminal.svg and sweep.svg."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).parent
COMMANDS = {  # by the name of the picture, with the text before which it is taken; None for the end
    "terminal": ("ksuit-runner 'callbacks=[ema,accuracy,best_checkpoint]'", None),
    "sweep": ("ksuit-runner sweep=lr_and_seed launcher=joblib launcher.max_jobs=2", "job 4/6"),
}
WIDTH, MOST_LINES = 100, 40


def main() -> None:
    """Run each command in a terminal, and draw what is on the screen."""
    for name, (command, until) in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            draw(name, command, screen(command, folder, until))


def draw(name: str, command: str, shown: list[str]) -> None:
    """Draw a command and the lines that it has left."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "dim"), (command, "bold")), soft_wrap=True)
    for line in shown[-MOST_LINES:]:
        console.print(Text.from_ansi(line), soft_wrap=True)
    text = console.export_svg(title="ksuit_runner", font_aspect_ratio=0.61)
    # without the web font that rich names, which a page on the web would not load from elsewhere anyway
    (FOLDER / f"{name}.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL))


def screen(line: str, folder: str, until: str | None) -> list[str]:
    """Return the lines, with their colours, that a command has on a terminal of WIDTH columns before a text appears."""
    program, *arguments = shlex.split(line)
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH), "LINES": "40"}
    environment.pop("NO_COLOR", None)
    script = shutil.which("script")
    if script is None:
        sys.exit("'script' of util-linux is needed")
    done = subprocess.run(
        [script, "-qec", f"stty cols {WIDTH} rows 40; {shlex.join(command)}", "/dev/null"],
        check=True,
        cwd=folder,
        capture_output=True,
        env=environment,
    )
    output = done.stdout.decode().replace(f"{folder}/", "")
    if until is not None:  # without the codes that remove the bar, for the text
        output = re.sub(r"\r\x1b\[2K(\x1b\[1A\x1b\[2K)*(\x1b\[1m)?$", "", output[: output.index(until)])
    return last_screen(output)


def last_screen(output: str) -> list[str]:
    """Play the codes that move the cursor, which a live bar is redrawn with, and return the lines that are left."""
    lines, row = [""], 0
    output = re.sub(r"^starting\r", "", output)  # the first sign, which is written over
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r\n|\n|\r|[^\x1b\r\n]+|\x1b", output):
        if token in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            continue
        elif token.startswith("\x1b[") and token[-1] == "A":
            row = max(0, row - int(token[2:-1] or 1))
        elif token.startswith("\x1b[") and token[-1] == "K":
            lines[row] = ""
        elif token.startswith("\x1b[") and token[-1] != "m":
            continue
        else:
            lines[row] += token
    is_blank = [not re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines] + [True]
    return ["" if is_blank[at] else line for at, line in enumerate(lines) if not (is_blank[at] and is_blank[at + 1])]


if __name__ == "__main__":
    main()
