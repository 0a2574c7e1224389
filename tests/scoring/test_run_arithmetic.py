from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stpm.method.arithmetic import Capabilities
from stpm.options import ClusterOptions
from stpm.scoring import pipeline
from stpm.scoring.pipeline import choose_and_record_arithmetic
from stpm.scoring.run_state import RunState, ScoringConfig

CPU, OLD_CPU = Capabilities(False, True, True), Capabilities(False, False, True)
RUN = cast(Any, SimpleNamespace(cluster=ClusterOptions()))


def calibrated_by(backend: str, precision: str) -> Any:
    return SimpleNamespace(precision=precision, fit=SimpleNamespace(backend=backend))


@pytest.mark.parametrize("alike", [True, False])
def test_a_run_records_what_computes_it_and_warns_once_where_that_changes(
    alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    RunState(str(tmp_path)).start(ScoringConfig((), 0.01))
    models = {"in float32": calibrated_by("openvino", "float32")}
    if not alike:
        models |= {"a": calibrated_by("pytorch", "bfloat16"), "b": calibrated_by("pytorch", "bfloat16")}

    def settle(device: Capabilities) -> list[str]:
        caplog.clear()
        monkeypatch.setattr(pipeline, "examine_devices", lambda gpus: [device])
        found = choose_and_record_arithmetic(RUN, RunState(str(tmp_path)), models, gpus=False)
        assert RunState(str(tmp_path)).record.arithmetic == found
        return [str(found), *caplog.messages]

    first, *warnings = settle(CPU)
    assert first == "openvino in bfloat16"
    assert ["models that pytorch in bfloat16 calibrated: " in warning for warning in warnings] == [True] * (not alike)
    assert settle(CPU) == [first]
    second, resumed, *warnings = settle(OLD_CPU)
    assert second == "openvino in float32"
    assert resumed.endswith(
        "slightly other scores: openvino in bfloat16 has computed them, and now openvino in float32"
    )
    assert len(warnings) == (not alike)
    # Once in float32, it stays there.
    assert settle(CPU) == [second]
