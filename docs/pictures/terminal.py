"""Draws a training run as the terminal shows it: docs/pictures/terminal.svg."""

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

PICTURE = Path(__file__).with_name("terminal.svg")
COMMAND = "ksuit-runner 'callbacks=[ema,accuracy,best_checkpoint]'"
WIDTH, MOST_LINES = 100, 40


def main() -> None:
    """Run the command in a terminal, and write what is on the screen at its end."""
    with tempfile.TemporaryDirectory() as folder:
        shown = screen(folder)
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "dim"), (COMMAND, "bold")), soft_wrap=True)
    for line in shown[-MOST_LINES:]:
        console.print(Text.from_ansi(line), soft_wrap=True)
    text = console.export_svg(title="ksuit_runner", font_aspect_ratio=0.61)
    # without the web font that rich names, which a page on the web would not load from elsewhere anyway
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL))


def screen(folder: str) -> list[str]:
    """Return the lines, with their colours, that the command leaves on a terminal of WIDTH columns."""
    program, *arguments = shlex.split(COMMAND)
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
    return last_screen(done.stdout.decode().replace(f"{folder}/", ""))


def last_screen(output: str) -> list[str]:
    """Play the codes that move the cursor, which a live bar is redrawn with, and return the lines that are left."""
    lines, row = [""], 0
    output = re.sub(r"^starting \.\.\.\r", "", output)  # the first sign, which is written over
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
    return [line for line in lines if re.sub(r"\x1b\[[0-9;]*m", "", line).strip()]


if __name__ == "__main__":
    main()
