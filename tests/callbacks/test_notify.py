import json
import logging
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch

from callbacks.loss import Loss
from callbacks.notify import Notify
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.errors import ConfigError

pytest.importorskip("apprise")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of some of its services


@pytest.fixture
def messages(monkeypatch):
    """Receive messages in a real server, to whose address the environment points."""
    received = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("KSUIT_NOTIFY_URLS", f"json://127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


class Failing(CallbackBase):
    def _after_update(self, update_counter):
        raise ValueError("no luck with postgresql://me:secret@host")


LOSS = partial(Loss, dataset_key="test", every_n_updates=2)


def test_it_says_how_a_run_has_ended(new_run, messages):
    run = new_run({"loss": LOSS, "notify": Notify}, max_updates=2).train()
    [message] = messages
    assert message["title"] == "run tiny finished"
    first, second = message["message"].splitlines()
    assert first == "update 2/2" and second.startswith("loss/test ")
    assert float(second.split()[1]) == pytest.approx(run.metric("loss/test")[2], rel=1e-3)
    alone = new_run({}, "alone", max_updates=2).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in run.weights.items())
    new_run({"notify": Notify}, "stopped", max_updates=9, stop_at=3).train()
    assert (messages[1]["title"], messages[1]["message"]) == ("run stopped interrupted", "by SIGTERM\nupdate 3/9")
    with pytest.raises(ValueError):
        new_run({"fails": Failing, "notify": Notify}, "failed", max_updates=9).train()
    assert messages[2]["title"] == "run failed failed"
    assert messages[2]["message"].splitlines()[0] == "ValueError: no luck with postgresql://me:***@host"


def test_only_chosen_ends_are_told_and_a_lost_message_is_a_warning(new_run, messages, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    new_run({"notify": partial(Notify, ends=["failed"])}, max_updates=2).train()
    assert messages == [] and not caplog.messages
    monkeypatch.setenv("KSUIT_NOTIFY_URLS", "json://127.0.0.1:1")
    new_run({"notify": Notify}, "lost", max_updates=2).train()
    assert "the message could not be sent" in caplog.messages


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ("", "KSUIT_NOTIFY_URLS has to have an address"),
        ("json://host secret", "address 2 in KSUIT_NOTIFY_URLS"),
    ],
)
def test_addresses_are_checked_before_training(new_run, monkeypatch, addresses, message):
    monkeypatch.setenv("KSUIT_NOTIFY_URLS", addresses)
    with pytest.raises(ConfigError, match=message):
        new_run({"notify": Notify})


def test_an_end_that_there_is_not_is_refused_with_the_config():
    with pytest.raises(ConfigError, match=r"callbacks.notify.ends: expects .*\['finish'\]"):
        check_config(compose_config(["callbacks=[notify]", "callbacks.notify.ends=[finish]"]))
