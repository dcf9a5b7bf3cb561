"""Every op with tensors on a device that is not the current one."""

import check
import device
import pytest
import torch

CASES = 12


@pytest.mark.filterwarnings("ignore:entropy_mask is not applied")
@pytest.mark.parametrize("op", check.OPS)
def test_tensors_on_another_device(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "target", "cuda:1")
    assert torch.cuda.current_device() == 0
    for case in range(CASES):
        what, problems = check.run_case(op, case, seed=1, seen=set())
        assert not problems, (case, what, problems)
    assert torch.cuda.current_device() == 0
