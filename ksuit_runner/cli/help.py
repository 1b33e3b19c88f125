"""The text of ``--help``. Hydra's own takes twice the time, as it loads every group of the config again."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from ksuit_runner.config.compose import choices, compose_config, groups

_COMMANDS = """\
ksuit-runner trains a model as the config says, tracks it, and resumes it exactly after whatever happened.

  python -m ksuit_runner callbacks=[ema,accuracy]         choose callbacks
  python -m ksuit_runner model=mlp optimizer.lr=3e-4      any group, any value
  python -m ksuit_runner -m seed=0,1,2                    a sweep; or sweep=NAME
  python -m ksuit_runner resume=RUN_ID                    resume, bit for bit; also fork= and evaluate=
  python -m ksuit_runner list=10                          the newest runs; also the words `runs`, `show RUN` ...
  python -m ksuit_runner show=RUN_ID                      its config, metrics, checkpoints and commands
  python -m ksuit_runner compare=[RUN_ID,RUN_ID]          where runs differ
  python -m ksuit_runner export=RUN_ID@best/ema           its weights as one file, which the plain module loads
  python -m ksuit_runner sync=RUN_ID                      send what the tracker does not know of a run
  python -m ksuit_runner leaderboard=SWEEP_ID             what a sweep has found; resume=SWEEP_ID resumes it

RUN_ID is a run's id, its first 6 or more characters, its name, or `last`; SWEEP_ID likewise, without `last`.
"""
_FLAGS = """\
Any value can be given as PATH=VALUE, such as trainer.max_epochs=20; +PATH=VALUE adds a key, and ~PATH removes one.
--cfg job prints the config and exits; --hydra-help shows the flags of Hydra, which composes the config.
"""


def print_help(overrides: Sequence[str]) -> int:
    """Print the commands, the groups with their choices, and the config that the overrides make; return 0.

    Raises:
        ConfigError: The overrides make none.
    """
    config = OmegaConf.to_yaml(compose_config(overrides))
    offered = ((group, choices(group)) for group in groups())
    listed = "".join(f"{group}: {', '.join(names)}\n" for group, names in offered if names)
    print(f"{_COMMANDS}\n== Groups: GROUP=CHOICE ==\n\n{listed}\n== Config ==\n\n{config}\n{_FLAGS}", end="")
    return 0
