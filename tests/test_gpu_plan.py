"""Plans of a step for a GPU that is not there: what is counted, and the bundled potential's."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_plan.py"

PROGRAM = """
HloModule jit_step

%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[100]{0} get-tuple-element(%p), index=1
  %y = f32[100]{0} fusion(%x), kind=kLoop, calls=%add
  ROOT %t = (s32[], f32[100]{0}) tuple(%i, %y)
}

%cond (p: (s32[], f32[100])) -> pred[] {
  %p.1 = (s32[], f32[100]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[100], b: f32[10,5]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[10,5]{1,0} parameter(1)
  %sorted = f32[100]{0} sort(%a), dimensions={0}
  %own = f32[100]{0} custom-call(%sorted, %b), output_to_operand_aliasing={{}: (0, {})}
  %matrix = (f32[10,5]{1,0}, s8[4194304]{0}) custom-call(%b, %b), custom_call_target="matmul"
  %start = (s32[], f32[100]{0}) tuple(%own)
  %loop = (s32[], f32[100]{0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %result = f32[100]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def gpu_plan():
    spec = importlib.util.spec_from_file_location("gpu_plan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_plan"] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_turns_and_bytes_are_counted(gpu_plan):
    counts = gpu_plan.count(PROGRAM)
    assert counts.kernels == 3 + 7
    assert counts.loop_turns == 7
    assert counts.traffic == {
        "y": 7 * 800,  # each turn reads and writes
        "sorted": 800,
        "own": 400 + 200,  # what is written in place counts once
        "matrix": 3 * 200,  # workspaces do not count
    }


@pytest.mark.gpu_plan
def test_the_plan_of_the_bundled_potential(tmp_path):
    if importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("no CUDA compiler is installed (extra cuda12 or cuda13)")
    file = tmp_path / "plan.json"
    command = [sys.executable, str(SCRIPT), "--model", "organics-gfn2", "--atoms", "300"]
    subprocess.run([*command, "--json", str(file)], check=True, capture_output=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["kernels"] <= 300
    assert found["loop_turns"] <= 32
    assert found["gigabytes"] <= 0.2
    assert found["spills"] == 0
    names = {name.partition("__")[0] for name in found["our_kernels"]}
    assert {"mlip_md_sum_messages", "mlip_md_pull_to_edges", "mlip_md_pull_to_senders"} <= names
