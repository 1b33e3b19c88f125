import os
import signal
import subprocess
import sys
import textwrap
from multiprocessing import active_children

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from ksuit_runner.data import stream as stream_module
from ksuit_runner.data.batch_plan import evaluation_requests
from ksuit_runner.data.fetch_batch import BatchRequest
from ksuit_runner.data.stream import LocalStream, WorkerStream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with a single core


class Numbers:
    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return np.array(indices)


@pytest.fixture(params=[0, 1, 2])
def make_stream(request):
    streams = []

    def make(plan, dataset=None):
        arguments = {"train": dataset or Numbers()}, 0, plan
        streams.append(LocalStream(*arguments) if request.param == 0 else WorkerStream(*arguments, request.param, 2))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def plan(batches):
    return evaluation_requests("train", batches, 1)


def test_take_drop_and_the_end(make_stream):
    stream = make_stream(plan(4))
    assert stream.head == BatchRequest("train", 0, 0, np.array([0]), begins=True)
    assert stream.take().tolist() == [0]
    stream.drop()
    assert stream.head.batch == 2
    assert [stream.take().tolist() for _ in range(2)] == [[2], [3]]
    assert stream.head is None


def test_batches_keep_their_type(make_stream):
    assert isinstance(make_stream(plan(1)).take(), np.ndarray)


def test_memory_is_pinned_only_if_the_run_is_on_a_gpu(maker, monkeypatch):
    """Pinning starts CUDA, and takes time and memory on another GPU."""
    given = []

    def loader(*args, pin_memory, **kwargs):
        given.append(pin_memory)
        return DataLoader(*args, **kwargs)

    monkeypatch.setattr(stream_module, "DataLoader", loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = maker.trainer(device="cpu", num_workers=1).data_container
    data.open(data.new_counter(max_updates=1))
    data.next_training_batch()
    data.pins_memory = True
    data.open(data.new_counter(max_updates=1))
    data.close()
    assert given == [False, True]


def test_only_a_few_requests_are_taken_ahead(make_stream):
    taken = []
    stream = make_stream(request for request in plan(1000) if taken.append(request) is None)
    for _ in range(10):
        stream.take()
    assert len(taken) <= 10 + 2 * 2 + 1


def test_closing_ends_the_stream_and_may_be_repeated(make_stream):
    stream = make_stream(plan(1000))
    stream.take()
    stream.close()
    assert stream.head is None
    assert not active_children()
    stream.close()


def test_starting_and_taking_does_not_draw_from_the_generator_of_the_run():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    stream = WorkerStream({"train": Numbers()}, 0, plan(3), 1, 2)
    stream.take()
    stream.close()
    assert torch.rand(()) == expected


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals cannot be told apart by their sender")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_the_signals_of_a_terminal_or_a_scheduler(number):
    stream = WorkerStream({"train": Numbers()}, 0, plan(100), 2, 2)
    stream.take()
    for _ in range(2):
        for worker in active_children():
            subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    assert [stream.take().tolist() for _ in range(99)] == [[index] for index in range(1, 100)]
    stream.close()


def test_a_worker_that_hangs_is_ended_by_its_parent():
    stream = WorkerStream({"train": Numbers()}, 0, plan(100), 1, 2)
    stream.take()
    (worker,) = active_children()
    worker.terminate()
    worker.join(timeout=30)
    assert not worker.is_alive()
    with pytest.raises(RuntimeError, match="worker"):
        for _ in range(99):
            stream.take()
    stream.close()


SCRIPT = """
    import sys
    from multiprocessing import active_children
    from ksuit_runner.data.batch_plan import evaluation_requests
    from ksuit_runner.data.stream import WorkerStream

    if __name__ == "__main__":
        stream = WorkerStream({"train": list(range(9))}, 0, evaluation_requests("train", 9, 1), 2, 2)
        stream.take()
        print(*(worker.pid for worker in active_children()), flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_do_not_outlive_their_parent(tmp_path, kill):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-W", "ignore", str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True) as process:
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if kill:
            process.kill()
        else:
            process.stdin.close()  # an end without close()
        process.wait(timeout=60)
    assert not psutil.wait_procs(workers, timeout=60)[1]
