"""References to checkpoints: RUN[@CHECKPOINT][/WEIGHTS]."""

import json

import pytest

from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import add_to_index
from ksuit_runner.resume.reference import find_run
from ksuit_runner.resume.request import Request, locate, requested

FIRST, SECOND = "E1_U20_S1280", "E2_U40_S2560"
AWKWARD = ("lin@home", "@", "a@b@c", "me@E3", "lin@E1_U2", "größe, x=1", "a/b", "x@best/ema")


@pytest.fixture
def outputs(tmp_path):
    """Runs with two checkpoints each, of which the first one is the best; their files do not matter here."""
    outputs = OutputPaths(tmp_path)
    for number, name in enumerate(("first", *AWKWARD)):
        run = PathProvider(tmp_path, f"{number:032x}")
        for checkpoint in (FIRST, SECOND):
            run.at_checkpoint(checkpoint).checkpoint_dir.mkdir(parents=True)
        run.tags.write_text(json.dumps({"best": FIRST, "best/of": SECOND}))
        run.config.touch()
        run.launch.touch()
        add_to_index(outputs, run.run_id, name, Mode.TRAIN)
    return outputs


@pytest.mark.parametrize(
    ("rest", "meant"),
    [
        ("", (None, None)),
        ("@latest", (None, None)),
        (f"@{SECOND}", (SECOND, None)),
        ("@best", (FIRST, None)),
        ("@best/ema", (FIRST, "ema")),
        ("@best/of", (SECOND, None)),
        ("/ema_0.9", (None, "ema_0.9")),
        ("@latest/ema", (None, "ema")),
    ],
)
def test_a_checkpoint_is_named_by_its_position_or_a_tag(outputs, rest, meant):
    for name in ("first", "0" * 32, "last"):
        assert find_run("fork", name + rest, outputs).checkpoint_and_weights() == meant


def test_the_name_of_a_run_may_look_like_a_reference(outputs):
    for number, name in enumerate(AWKWARD, start=1):
        for rest in ("", f"@{FIRST}", "/ema"):
            found = find_run("fork", name + rest, outputs)
            assert (found.run_id, found.rest) == (f"{number:032x}", rest)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frist@best", "fork=frist: there is no such run .* Did you mean 'first'"),
        ("first@bset", "fork=first@bset: run 0* has no checkpoint 'bset'. Did you mean 'best'"),
        ("first@E3", f"no checkpoint 'E3'. There are: best, best/of, latest, {SECOND} ..."),
        ("first@E9_U9_S9", "no checkpoint 'E9_U9_S9'. There are: "),
        ("first@", "no checkpoint ''. There are: "),
    ],
)
def test_what_does_not_exist_is_explained_with_the_nearest_name(outputs, text, says):
    with pytest.raises(KsuitError, match=says):
        find_run("fork", text, outputs).checkpoint_and_weights()


def test_a_resume_names_a_run_and_what_takes_a_whole_checkpoint_no_weights(outputs):
    here = f"output_dir={outputs.output_dir}"
    assert requested(["fork=first@best"]) == Request("fork", "first@best")
    for mode in ("fork", "evaluate"):
        assert locate(Request(mode, "first@best"), [here]).checkpoint == FIRST
        with pytest.raises(ConfigError, match="not the weights 'ema'; .*initialize.from=first@best/ema"):
            locate(Request(mode, "first@best/ema"), [here])
    assert locate(Request("resume", "lin@home"), [here]).run_id == f"{1:032x}"
    with pytest.raises(ConfigError, match="resumed from its newest checkpoint; from another one: fork=first@best"):
        locate(Request("resume", "first@best"), [here])
