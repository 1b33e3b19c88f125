"""The connection between the ranks of a run, which have to agree in their configs and versions."""

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ksuit_runner import __version__
from ksuit_runner.config.flatten import flatten
from ksuit_runner.config.schema import LATER_DEFAULTS
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.world import World


def connect_ranks(config: Mapping[str, Any]) -> World:
    """Return the world of this process: it alone, or all the ranks that its environment speaks of.

    Args:
        config: Config of the run as plain values.

    Raises:
        ConfigError: The ranks have different configs or versions; on rank 0, and a ``PeerError`` on the others.
        PeerError: Not all ranks are there in time.
    """
    versions = {"ksuit_runner": __version__, "torch": str(torch.__version__), "Python": platform.python_version()}
    settings = {path: json.dumps(value, default=str) for path, value in flatten(config).items()}
    device = str(config.get("trainer", {}).get("device", "auto"))
    return connect(versions | settings, float(config.get("rank_timeout_s", LATER_DEFAULTS["rank_timeout_s"])), device)
