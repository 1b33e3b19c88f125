"""Jobs of several tasks, which are the ranks of a run, start again once one is lost.

The machines of a Ray cluster are raylets here, each with an address of this machine.
"""

import os
import signal
import time
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
from command import checkpoint_bytes, journal, ksuit, query, run_dir, start, wait_until

from ksuit_runner.errors import ConfigError
from ksuit_runner.launchers.ray import RayLauncher

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")

FATE = """
import os
import signal
import time
from pathlib import Path

from ksuit_runner import CallbackBase


class Fate(CallbackBase):
    '''Kills rank 1 once, and later waits once, in both ranks, until the test has done something.'''

    def _before_every_update(self, update_counter):
        rank, update = os.environ.get("RANK"), update_counter.update
        if rank == "1" and update == 30 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank is not None and update == 50 and not Path("goes-on").exists():
            Path(f"waits-{rank}").write_text(str(os.getpid()))
            while not Path("goes-on").exists():
                time.sleep(0.05)
"""
RUN = ("model=linear", "trainer.max_epochs=3", "trainer.accumulation_steps=2", "callbacks=[ema,accuracy,fate]")


@pytest.fixture(scope="module")
def cluster():
    """Return a cluster of two machines with a core each; the driver is at the first one."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
    yield cluster
    cluster.shutdown()


@pytest.fixture
def project(tmp_path):
    (tmp_path / "conf/callbacks").mkdir(parents=True)
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/fate.py").write_text(FATE)
    (tmp_path / "conf/callbacks/fate.yaml").write_text("fate:\n  _target_: callbacks.fate.Fate\n")
    return tmp_path


def start_on(cluster, project):
    on_ray = ("launcher=ray", f"launcher.address={cluster.address}", "launcher.nodes=2")
    return start(project / "outputs", "-m", *on_ray, "ranks=2", "strategy=ddp", *RUN, cwd=project)


def check_as_if_undisturbed(project):
    outputs = project / "outputs"
    assert set(query(outputs, "select status from runs")) == {("FINISHED",)}
    ksuit(project / "alone", *RUN, cwd=project)
    found, alone = run_dir(outputs), run_dir(project / "alone")
    assert journal(found) == journal(alone)
    ours, expected = checkpoint_bytes(found), checkpoint_bytes(alone)
    last = [name for name in expected if name.startswith("E3_U60") and name.endswith(".safetensors")]
    assert len(last) > 1
    assert [ours[name] for name in last] == [expected[name] for name in last]


@needs_submitit
@pytest.mark.soak
def test_a_job_of_two_tasks_goes_on_after_one_was_killed(project):
    (project / "goes-on").touch()
    tasks = ("launcher=submitit", "launcher.executor=local", "+launcher.parameters={tasks_per_node: 2}")
    output = ksuit(project / "outputs", "-m", *tasks, "ranks=2", "strategy=ddp", *RUN, cwd=project)
    assert "rank 1 is lost (task 1 of job" in output and "start again (1 of at most 3 times)" in output
    check_as_if_undisturbed(project)


@needs_ray
@pytest.mark.soak
def test_a_job_on_two_machines_goes_on_after_a_rank_and_a_machine_were_lost(cluster, project):
    process = start_on(cluster, project)
    wait_until(lambda: (project / "waits-0").exists() and (project / "waits-1").exists(), process)
    (lost,) = cluster.worker_nodes
    cluster.remove_node(lost, allow_graceful=False)
    (project / "goes-on").touch()
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "rank 1 is lost (the worker died unexpectedly" in output
    assert "all ranks start again (1 of at most 3 times)" in output
    assert "all ranks start again (2 of at most 3 times)" in output
    check_as_if_undisturbed(project)


@needs_ray
@pytest.mark.soak
def test_the_ranks_end_with_what_has_started_them(cluster, project):
    (project / "killed").touch()
    process = start_on(cluster, project)
    wait_until(lambda: all((project / f"waits-{rank}").exists() for rank in (0, 1)), process)
    ranks = [int((project / f"waits-{rank}").read_text()) for rank in (0, 1)]
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_room(machines, **needs):
    launcher = RayLauncher(**needs)
    launcher._ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": has} for has in machines])
    return launcher._capacity()


@needs_ray
def test_a_job_has_room_if_its_machines_have():
    eight, two = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 2.0}
    assert has_room([eight, two, {"CPU": 64.0}], num_gpus=1) == 10
    assert has_room([eight, two], num_gpus=4) == 2
    assert has_room([eight, two], num_gpus=1, nodes=2) == 2
    assert has_room([eight, eight, two], num_gpus=1, nodes=2, tasks_per_node=2) == 4
    with pytest.raises(ConfigError, match="a machine with 1 CPU and 16 GPUs, and the Ray cluster has none"):
        has_room([eight, eight], num_gpus=16)
    with pytest.raises(ConfigError, match="needs 2 machines with 4 CPUs and 4 GPUs each, and the Ray cluster has 1 of"):
        has_room([eight, two], num_gpus=1, nodes=2, tasks_per_node=4)
    with pytest.raises(ConfigError, match=r"nodes: a whole number of at least 1 is needed"):
        RayLauncher(nodes=0)
