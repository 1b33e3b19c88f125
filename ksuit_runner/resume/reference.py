"""References to checkpoints, ``RUN[@CHECKPOINT][/WEIGHTS]``, as they are written wherever one can be named."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError, suggest
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.recovery import recover_idle
from ksuit_runner.record.stored_run import find_local, unknown_run

LATEST = "latest"
"""Stands for the newest intact checkpoint, and is what a reference means that names none."""
_LISTED = 4


@dataclass(frozen=True)
class Reference:
    """What a text refers to.

    Attributes:
        key: Config path or override that it was written for, for messages.
        text: The text.
        outputs: The output folder.
        run_id: Id of the run.
        rest: What follows the run: ``@CHECKPOINT``, ``/WEIGHTS``, both or nothing.
    """

    key: str
    text: str
    outputs: OutputPaths
    run_id: str
    rest: str = ""

    @property
    def paths(self) -> PathProvider:
        """Paths of the run."""
        return PathProvider(self.outputs.output_dir, self.run_id)

    def checkpoint_and_weights(self) -> tuple[str | None, str | None]:
        """Return the name of the checkpoint, None for the newest intact one, and the name of the weights, if any.

        What a dead process had handed over is committed first: it may be what is meant.

        Raises:
            ConfigError: The run has no such checkpoint.
        """
        if not self.rest:
            recover_idle(self.paths)
            return None, None
        if self.rest.startswith("/"):
            return None, self.rest[1:]
        recover_idle(self.paths)
        whole, tags = self.rest[1:], read_tags(self.paths)
        name, _, weights = (whole, "", "") if whole in tags else whole.partition("/")  # a tag may have a slash
        if name == LATEST:
            return None, weights or None
        found = tags.get(name, name)
        if found not in names(self.paths):
            raise ConfigError(f"{self}: run {self.run_id} has no checkpoint '{name[:50]}'. {self._near(name, tags)}")
        return found, weights or None

    def _near(self, name: str, tags: dict[str, str]) -> str:
        there = [*tags, LATEST, *names(self.paths)]
        if Progress.parse(name) is None and (near := suggest(name, there)):
            return f"Did you mean '{near}'?"
        return f"There are: {', '.join(there[:_LISTED])}{' ...' if len(there) > _LISTED else ''}"

    def __str__(self) -> str:
        return f"{self.key}={self.text}"


def find_run(
    key: str, text: str, outputs: OutputPaths, look_up: Callable[[str], str | None] = lambda query: None
) -> Reference:
    """Find the run that a reference names.

    The name of a run may have an @ or a slash itself: the longest name that a run has is meant.

    Args:
        key: Config path or override that it was written for, for messages.
        text: The reference.
        outputs: The output folder.
        look_up: Looks a run up elsewhere, and brings it here.

    Raises:
        ResumeError: There is no such run, or several match.
    """
    for find in (lambda query: find_local(outputs, query), look_up):
        for query, rest in _readings(text):
            if (run_id := find(query)) is not None:
                return Reference(key, text, outputs, run_id, rest)
    *_, (query, _) = _readings(text)
    raise unknown_run(outputs, query, key)


def _readings(text: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to read a text as a run and the rest of the reference, the longest run first."""
    yield text, ""
    for end in range(len(text) - 1, 0, -1):
        if text[end] in "@/":
            yield text[:end], text[end:]
