"""Imported by every Python process that has this folder in its PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from watched_calls import join_at_start

join_at_start()
