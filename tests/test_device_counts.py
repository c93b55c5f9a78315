"""How often a training step, a scored prompt and a decoded token wait for their device, and what they copy: no more than told."""

import sys

import pytest

from lofit_lens.models import load_model
from tests import pretend
from tests.conftest import HOOKED
from tests.device_cases import in_two

sys.path.insert(0, str(pretend.ROOT / "benchmarks"))  # they import each other by name, as scripts do

import devices as benchmark

# Of each unit: waits of the library's own lines, waits in all, copies.
STEP, SCORED = (2, 4, 6), (1, 6, 15)
ON_ONE = {
    "training step, SFT": STEP, "training step, DPO": STEP, "scored prompt with its answers": SCORED, "decoded token": (1, 2, 0),
}  # fmt: skip
# accelerate hands everything that a layer is given on to its device.
ON_TWO = {
    "training step, SFT": (2, 4, 20), "training step, DPO": (2, 4, 20), "scored prompt with its answers": (1, 6, 50),
    "decoded token": (1, 2, 13),
}  # fmt: skip


@pytest.fixture(scope="module", params=[HOOKED, "bridge", "two devices"])
def counted(request, checkpoint):
    """Bounds, and for each unit what one more of it takes."""
    two = request.param == "two devices"
    with pretend.devices():
        folder = checkpoint("llama")
        model = in_two(folder) if two else load_model(folder, backend=request.param, device="pretend:0")
        return ON_TWO if two else ON_ONE, {u: benchmark.counted(model, run) for u, run in benchmark.UNITS.items()}


def test_no_more_waits_and_copies_than_told(counted):
    bounds, found = counted
    took = {unit: (n["own waits"], n["waits"], n["copies"]) for unit, n in found.items()}
    more = {
        unit: found[unit]
        for unit, bound in bounds.items()
        if any(a > b for a, b in zip(took[unit], bound, strict=True))
    }
    assert not more, more
    assert all(n["waits"] >= 1 for n in found.values())  # they are seen at all
