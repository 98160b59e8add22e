"""Two processes that share each batch train like one process that accumulates it (gloo, on this machine)."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrun_worker import train

WORKER = Path(__file__).parent.with_name("torchrun_worker.py")


def torchrun(*arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", *map(str, arguments)],
                          capture_output=True, text=True, env=environment, timeout=timeout)


def test_two_processes_equal_one_with_accumulation(tmp_path):
    done = torchrun(WORKER, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    two, one = torch.load(tmp_path / "two.pt", weights_only=True), train(16, 2)
    for name, tensor in one["weights"].items():
        assert torch.allclose(two["weights"][name], tensor, atol=1e-6, rtol=0), name
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6) and two["accuracy"] == one["accuracy"]


def test_another_step_size_is_noticed():
    "The comparison above is no empty one: half the batch a step gives other weights"
    one, other = train(16, 2)["weights"], train(16, 1)["weights"]
    assert not all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
