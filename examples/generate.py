"""A Qwen3-Next of transformers that generates with nbdelta: the one line is ``enable()``.

The model here is small and has random weights, so that nothing is downloaded. With real ones,
``AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-Next-80B-A3B-Instruct")`` takes its place.
"""

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import nbdelta.transformers

config = Qwen3NextConfig(
    vocab_size=256,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
)
torch.manual_seed(0)
model = Qwen3NextForCausalLM(config).eval()
prompt = torch.tensor([list(b"The state is a matrix, and every token corrects it.")])

nbdelta.transformers.enable()
output = model.generate(prompt, max_new_tokens=20, do_sample=False)
nbdelta.transformers.disable()

expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
print("generated", output[0, prompt.shape[1] :].tolist())
print("the same as without nbdelta:", torch.equal(output, expected))
