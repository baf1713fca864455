"""`dstrain doctor`: versions, devices and the table of kernels, for people and as plain values."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from dstrain.api import diagnose
from dstrain.build import doctor
from dstrain.cli.main import main
from dstrain.errors import ArgumentError
from dstrain.ops.kernels import OPS
from tests.kernels import kernels_here


def test_every_op_has_a_chosen_kernel_and_the_others_a_reason() -> None:
    found = diagnose("cpu", "bf16")
    assert (found.device, found.precision) == ("cpu", "bf16")
    assert found.kernels.keys() == OPS.keys()
    for states in found.kernels.values():
        assert any(state.is_chosen for state in states.values())
        assert all(state.is_chosen or state.reason for state in states.values())


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert main(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch          {version('torch')}" in lines
    assert "no-such-package not installed" in lines
    assert any("(OMP_NUM_THREADS=3)" in line for line in lines)
    assert "kernels on cpu in fp32" in lines
    rows = [" ".join(line.split()) for line in lines]
    limits = "batched_products up to 400 scores per head"
    if "native" in kernels_here("training_attention"):
        limits = f"native up to 16,384 scores per head, else {limits}"
    assert any(row.startswith(f"training_attention {limits}, else scaled_dot_product_attention") for row in rows)
    assert "packed_attention padded_rows (varlen: for cuda only)" in rows


def test_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--precision", "fp32", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["versions"]["torch"], tree["device"], tree["precision"]) == (version("torch"), "cpu", "fp32")
    assert tree["kernels"]["packed_alibi_attention"] == {"chosen": ["padded_rows"], "not_chosen": {"flex": "for cuda only"}}


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArgumentError, match="device cuda: no GPU is visible here; use cpu or auto"):
        diagnose("cuda")
