"""The place of a process among the ranks, as torchrun and Slurm tell it."""

from ksuit_runner.distributed.environment import Place, from_slurm, place

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008,012]-ib,big3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
}


def test_torchrun_tells_the_place():
    found = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    assert place(found) == Place("torchrun", 3, 4, 2)
    assert place({"RANK": "0", "WORLD_SIZE": "1"}) == Place("WORLD_SIZE", 0, 1, None)
    assert place({"WORLD_SIZE": "2"}) is place({"RANK": "", "WORLD_SIZE": ""}) is None


def test_a_task_of_slurm_is_a_rank():
    found = from_slurm(STEP)
    assert found == {
        "KSUIT_STARTER": "srun",
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "12",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu007-ib",
        "MASTER_PORT": "23456",
    }
    assert place(found) == Place("srun", 9, 12, 8)
    given = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "SLURM_STEP_NODELIST": "a1,a2"}
    found = from_slurm(given)
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")
    another = from_slurm(STEP | {"SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "a1,a2"})
    assert another is not None
    assert (another["MASTER_ADDR"], another["MASTER_PORT"]) == ("a1", "23457")


def test_a_single_task_and_a_batch_script_are_no_ranks():
    assert from_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_NTASKS": "12"}
    assert from_slurm(batch) is None
    assert from_slurm({}) is None
