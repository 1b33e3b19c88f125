"""Any command line ends in a checked config or in a clear error."""

import os

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, refuse_lost_overrides
from ksuit_runner.errors import KsuitError
from ksuit_runner.resume.request import requested

KEYS = """
    name seed model model.x callbacks callbacks.ema callbacks.x._target_ optimizer.lr schedule trainer.max_epochs data
    data.datasets experiment sweep hydra.run.dir loss._target_ tracker
"""
WORDS = r"""
    null cnn ema [ema,accuracy] {a:1} ${seed} ${oc.env:HOME} ${oc.env:NOT_THERE} ${name} ??? os.system torch.nn.Linear
    ../../x 1e400 0x1 [[1] choice(1,2) range(3) ' " \ é { ${ $ @ : -1 true
"""
keys = st.sampled_from(KEYS.split())
words = st.sampled_from(WORDS.split()) | st.sampled_from(
    ["{_target_: os.system, _args_: [touch canary]}", "a b", "\n", "1" * 5000]
)
overrides = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "+", "++", "~"]),
    keys | st.text(max_size=12),
    st.sampled_from(["=", "=", "=", "", "@x=", "=="]),
    st.lists(words | st.text(max_size=8), max_size=2).map("".join),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(items=st.lists(overrides, min_size=1, max_size=3))
@example(["name=" + "[" * 3000])
@example(["+model.x=" + "[" * 60 + "]" * 60])
@example(["~name"])
@example(["name=" + "1" * 5000])
def test_an_override_ends_in_a_checked_config_or_in_an_error(tmp_path_factory, items):
    here = os.getcwd()
    empty = tmp_path_factory.getbasetemp() / "empty"
    empty.mkdir(exist_ok=True)
    os.chdir(empty)
    try:
        refuse_lost_overrides(items)
        requested(items)
        check_config(compose_config(items))
    except KsuitError as error:
        assert str(error).strip()
        assert len(str(error)) < 4000
    finally:
        os.chdir(here)
    assert list(empty.iterdir()) == []
