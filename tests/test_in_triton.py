"""The Triton kernels: interpreted, compiled for cards, and on a card if there is one.

Triton reads TRITON_INTERPRET when it is imported: each way has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eql_repro import equalization_loss, softmax_equalization_loss

pytest.importorskip("triton", reason="no Triton for this system")
FILE = Path(__file__).with_name("in_interpreter.py")


def run(*command, **env):
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env=own | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_numbers_in_the_interpreter():
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist"
    assert "passed" in run("-m", "pytest", *options, str(FILE), TRITON_INTERPRET="1")


def test_each_launch_compiles_for_cards(tmp_path):
    out = run("-W", "ignore", str(FILE), TRITON_CACHE_DIR=str(tmp_path))
    assert "sm_80" in out and "sm_90" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_on_a_card(monkeypatch, dtype):
    monkeypatch.setenv("EQL_TRITON", "1")
    z = (4 * torch.randn(1024, 1230) - 4).to("cuda", dtype)
    labels = torch.randint(0, 1231, (1024,), device="cuda")
    tail = torch.arange(1230, device="cuda") >= 300
    one = torch.ones((), device="cuda")
    for call, target, options in (
        (equalization_loss, labels, {}),
        (softmax_equalization_loss, labels % 1230, {"gamma": 1.0}),
    ):
        results = []
        for x in (z, z.cpu().float()):
            leaf = x.clone().requires_grad_()
            value = call(leaf, target.to(x.device), tail.to(x.device), **options)
            (value * (3 * one.to(x.device))).backward()
            results.append((value.cpu(), leaf.grad.cpu().float()))
        assert torch.isclose(results[0][0], results[1][0], rtol=1e-4)
        exact = {torch.float32: 1e-5}.get(dtype, 2e-2)
        assert torch.allclose(results[0][1], results[1][1], rtol=exact, atol=1e-6)
