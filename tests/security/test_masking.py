"""Passwords and tokens: in nothing that is printed, stored or recorded, and asked for when they are needed again."""

import logging
import sys

import pytest
from command import SMALL, run_dir
from omegaconf import OmegaConf
from test_hostile import commands

from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import Launch, store
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.security.masking import mask_config, mask_text, masked_values
from ksuit_runner.security.reveal import PASSWORD_VARIABLE, URI_VARIABLE, reveal
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.ui.command_line import command_line
from ksuit_runner.ui.logs import setup_logging
from ksuit_runner.ui.terminal import make_console, print_error, print_pairs, print_traceback

SECRETS = [
    "http://me:{}@host:5000/x",
    "postgresql+psycopg2://me:{}@host/db?sslmode=require",
    "mysql://:{}@host/db",
    "https://{}@github.com/me/project.git",
    "git+https://me:{}@github.com/me/project.git",
    "https://host/data?password={}&x=1",
    "https://host/data?x=1&token={}",
    "https://bucket/x?X-Amz-Signature={}",
    "data.api_key={} seed=1",
    "MLFLOW_TRACKING_PASSWORD={} python",
    "{{'password': '{}', 'x': 1}}",
    '"aws_secret_access_key": "{}"',
]


@pytest.mark.parametrize("secret", ["hunter2", "p%40ss", "a-b_c.d", "12345"])
@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_is_masked_in_any_text(form, secret):
    text = f"it failed at {form.format(secret)} as said"
    masked = mask_text(text)
    assert secret not in masked and "***" in masked and masked.endswith(" as said")
    assert mask_text(masked) == masked


@pytest.mark.parametrize("password", ["p@ss", "a/b#c", "x:y", "über"])
def test_a_password_ends_at_the_last_at(password):
    assert mask_text(f"uri=postgresql://me:{password}@host/db,") == "uri=postgresql://me:***@host/db,"


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/path@v1",
        "git@github.com:me/project.git",
        "ssh://git@github.com/me/project",
        "abfss://box@account.dfs.core.windows.net/x",
        "sqlite:///outputs/mlflow.db?mode=ro",
        "model.pad_token=[PAD] tokenizer=bert max_tokens=3 key=loss/test",
        "loss: 0.5 at 12:30, see http://example.org",
    ],
)
def test_what_is_no_secret_stays(text):
    assert mask_text(text) == text


def test_a_config_is_masked_by_names_and_addresses_and_its_masks_are_found():
    config = {
        "tracker": {"uri": "http://me:x@host", "timeout_s": 5, "api_key": "x", "password": None},
        "data": {"urls": ["https://x@host/a", "https://host/b"], "token": "<pad>", "note": "*** of x"},
    }
    masked = mask_config(config)
    assert masked["tracker"] == {"uri": "http://me:***@host", "timeout_s": 5, "api_key": "***", "password": None}
    assert masked["data"] == {"urls": ["https://***@host/a", "https://host/b"], "token": "<pad>", "note": "*** of x"}
    assert [path for path, _ in masked_values(masked)] == ["tracker.uri", "tracker.api_key", "data.urls[0]"]
    assert not list(masked_values(config))


STORED = {"tracker": {"uri": "http://me:***@host"}}


def uri(*overrides):
    return reveal(STORED, overrides)["tracker"]["uri"]


def test_the_real_uri_comes_from_where_the_user_has_it(monkeypatch):
    with pytest.raises(ConfigError, match=rf"^tracker.uri: .*http://me:\*\*\*@host.* Set {URI_VARIABLE} or"):
        uri()
    assert uri("tracker.uri=http://me:said@host") == "http://me:said@host"
    with pytest.raises(ConfigError):
        uri("tracker.uri=http://me:said@other")
    monkeypatch.setenv(PASSWORD_VARIABLE, "p@ss/w")
    assert uri() == "http://me:p%40ss%2Fw@host"
    monkeypatch.setenv(URI_VARIABLE, "http://me:known@host")
    assert uri() == "http://me:known@host"
    monkeypatch.setenv(URI_VARIABLE, "http://me:known@other")
    assert uri() == "http://me:p%40ss%2Fw@host"
    with pytest.raises(ConfigError, match=r"^data.url: .* Give data.url= again$"):
        reveal({"data": {"url": "https://***@host"}}, [])


def test_a_password_that_is_said_again_changes_nothing_of_the_past(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    store(
        paths, {"data": {"url": "https://me:x@host"}, "tracker": {"uri": None}}, Launch("x", ["data.url=http://a:x@b"])
    )
    assert "x@" not in paths.config.read_text() + paths.launch.read_text()
    composed = compose_stored("resume", paths, ["data.url=https://me:y@host"])
    assert OmegaConf.to_container(composed.config)["data"] == {"url": "https://me:y@host"}
    with pytest.raises(ConfigError, match=r"data\.url"):
        compose_stored("resume", paths, [])


def test_nothing_that_is_printed_or_logged_has_it(tmp_path, capsys, monkeypatch):
    secret = "http://me:hunter2@host"
    with setup_logging(tmp_path / "run.log", make_console()) as logger:
        logger.warning("cannot reach %s", secret)
        try:
            raise OSError(secret)
        except OSError as error:
            logger.exception("failed: %s", error)
            print_traceback(OSError, error, error.__traceback__)
    logging.getLogger("ksuit_runner").handlers.clear()
    print_error(make_console(), ConfigError(f"tracker.uri: {secret}"))
    print_pairs(make_console(), {"tracked": secret})
    monkeypatch.setattr(sys, "argv", ["ksuit-runner", f"tracker.uri={secret}"])
    said = capsys.readouterr()
    text = said.out + said.err + (tmp_path / "run.log").read_text() + command_line()
    assert "hunter2" not in text and text.count("http://me:***@host") == 10


def test_an_error_of_the_server_has_it_neither(paths, monkeypatch):
    tracker = MlflowTracker(paths, uri="http://me:hunter2@127.0.0.1:9", timeout_s=1)
    with pytest.raises(TrackerError) as caught:
        tracker.start_run("x", {})
    assert "hunter2" not in str(caught.value) + tracker.where()


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


def test_a_run_leaves_its_password_nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    quiet = ("default_callbacks=none", "callbacks=[]", "checkpoint=at_end", "trainer.max_updates=2", *SMALL[:1])
    away = ("tracker.require=false", "tracker.close_timeout_s=0.2", "tracker.timeout_s=1")
    first = [*quiet, *away, "tracker.uri=http://me:hunter2@127.0.0.1:9"]
    results = commands(tmp_path, [first, ["resume=last"], ["sync=last"], ["resume=last", first[-1]]])
    assert [status for status, _ in results] == [0, 2, 2, 0], results
    assert all(PASSWORD_VARIABLE in said for _, said in results[1:3])
    for path in (file for file in run_dir(tmp_path).rglob("*") if file.is_file()):
        assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in "".join(said for _, said in results)
