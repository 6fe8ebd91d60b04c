from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.errors import InvalidInput
from workers import runtime


def test_importing_the_module_does_not_load_torch() -> None:
    code = "import sys, workers.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cpu_is_taken_as_it_is_and_auto_finds_a_device() -> None:
    assert runtime.choose_device("cpu") == "cpu"
    assert runtime.choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("setting", ["", "gpu", "cuda:", "cuda:-1", "mps", "CPU"])
def test_an_unknown_device_is_refused(setting: str) -> None:
    with pytest.raises(InvalidInput, match="Use 'auto'"):
        runtime.choose_device(setting)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"torch sees \d+ GPUs"):
        runtime.choose_device("cuda:99")


def test_the_same_seed_gives_the_same_numbers() -> None:
    drawn = []
    for _ in range(2):
        runtime.seed_everything(7)
        drawn.append((np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_a_job_counts_numbers_that_no_processor_multiplies_fast_as_0_in_all_its_threads() -> None:
    code = """
from types import SimpleNamespace
import torch, workers.runner, workers.worker
from workers import __main__ as program

def product(job_id, **_):
    torch.set_num_threads(2)
    small = torch.full((512, 512), 1e-21)
    print(int((small @ small).count_nonzero()))

workers.runner.run_job = product
workers.runner.open_services = lambda *_, **__: SimpleNamespace(database=SimpleNamespace(engine=None))
workers.worker.serve = lambda services, run, device: run("job", "worker")
program.upgrade = lambda engine: None
program._work(SimpleNamespace(device="cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
