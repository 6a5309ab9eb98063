"""What training needs beside inputs, results and gradients: the states at chunk starts, no more."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

PEAK = """
import torch
import nbdelta

def call(T):
    torch.manual_seed(0)
    H, HV, K, V = {sizes}
    q, k = (torch.nn.functional.normalize(torch.randn(1, T, H, K), dim=-1) for _ in "qk")
    tensors = dict(q=q, k=k, v=torch.randn(1, T, HV, V), g=-torch.rand(1, T, HV))
    tensors.update(beta=torch.rand(1, T, HV), initial_state=torch.randn(1, HV, K, V))
    return {{n: x.requires_grad_() for n, x in tensors.items()}}, torch.ones(1, T, HV, V)

def train(tensors, do):
    o, state = nbdelta.gated_delta_rule(**tensors, output_final_state=True)
    torch.autograd.backward([o, state], [do, torch.ones_like(state)])
    return [o, state, *[x.grad for x in tensors.values()]]

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

train(*call(64))  # compiles and starts the threads
inputs = call({T})
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = status("VmRSS")
results = train(*inputs)
print(status("VmHWM") - before - sum(x.nbytes for x in results))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
@pytest.mark.parametrize("T", [2048, 8192])
def test_peak_of_training(T):
    H, HV, K, V = 4, 8, 128, 128
    code = PEAK.format(T=T, sizes=(H, HV, K, V))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    states = 4 * (T // 64) * HV * K * V
    assert int(run.stdout) <= states + (32 << 20)
