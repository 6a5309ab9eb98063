"""A small language model of gated delta net blocks: trained in chunks, then run token by token.

It learns Python's help texts byte by byte, or ``--text FILE``: a million parameters on the CPU, in
minutes. The layers are those of Gated DeltaNet (arXiv 2412.06464) and, with ``--gate kda``, of Kimi
Linear (2510.26692). ``--backend torch`` trains with the functions of transformers, to compare.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import nbdelta

BYTES = 256  # the vocabulary: text needs no tokenizer
H, HV, K, V = 2, 4, 64, 64  # key heads, value heads and their sizes
WIDTH = 4  # of the short convolution
# what the kernels do besides the rule, forward and backward
IN_KERNEL = dict.fromkeys(
    ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True
)
LEARNING_RATE = 4e-3  # the highest; it rises for a tenth of the steps, then falls
BOUND = 1e-4  # for the difference between chunks and single tokens


@dataclass
class State:
    """All that a layer remembers of a text, however long."""

    conv: torch.Tensor  # [B, WIDTH - 1, channels]
    rule: torch.Tensor  # [B, HV, K, V]


def nbdelta_rule(q, k, v, g, beta, A_log, dt_bias, state):
    """Apply the rule in chunks, with gradients; a single token with a state by a recurrent step."""
    inputs, options = (q, k, v, g, beta), {"A_log": A_log, "dt_bias": dt_bias, **IN_KERNEL}
    if state is None:
        o, _ = nbdelta.chunk_gated_delta_rule(*inputs, **options)
    elif q.shape[1] > 1:
        o, state.rule = nbdelta.chunk_gated_delta_rule(
            *inputs, initial_state=state.rule, output_final_state=True, **options
        )
    else:
        o, _ = nbdelta.fused_recurrent_gated_delta_rule(
            *inputs, initial_state=state.rule, inplace_final_state=True, **options
        )
    return o


def transformers_rule(q, k, v, g, beta, A_log, dt_bias, state):
    """Apply the rule in chunks as transformers does where there is no kernel."""
    assert state is None, "for training alone"
    if g.ndim == 3:
        from transformers.models.qwen3_next import modeling_qwen3_next

        rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    else:
        from transformers.models.kimi_linear import modeling_kimi_linear

        rule, A_log = modeling_kimi_linear.chunk_kimi_delta_attention, A_log[:, None]
    g = -A_log.exp() * F.softplus(g + dt_bias.view(g.shape[2:]))
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    return rule(q, k, v, g, beta.sigmoid(), use_qk_l2norm_in_kernel=True)[0]


class GatedDeltaNet(nn.Module):
    """Mixes tokens: short convolution, gated delta rule, gated norm."""

    def __init__(self, dim, gate, rule):
        super().__init__()
        self.rule = rule
        self.gate_shape = (HV, K) if gate == "kda" else (HV,)
        self.channels = 2 * H * K + HV * V
        self.widths = [self.channels, HV * V, math.prod(self.gate_shape), HV]
        self.project = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(WIDTH, self.channels).uniform_(-0.5, 0.5))
        # as the papers have it: heads that forget within ten tokens, and some that hardly do
        self.A_log = nn.Parameter(torch.empty(HV).uniform_(1, 16).log())
        steps = torch.empty(self.widths[2]).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(steps.expm1().log())  # softplus of it is `steps`
        self.norm = nn.RMSNorm(V, eps=1e-6)
        self.output = nn.Linear(HV * V, dim, bias=False)

    def forward(self, x, state=None):
        T = x.shape[1]
        qkv, z, g, beta = self.project(x).split(self.widths, -1)
        if state is None:
            qkv = F.pad(qkv, (0, 0, WIDTH - 1, 0))
        else:
            qkv = torch.cat([state.conv, qkv], 1)
            state.conv = qkv[:, T:]
        # four products: for so few taps faster than a convolution's rearranged memory
        qkv = F.silu(sum(qkv[:, i : i + T] * self.conv[i] for i in range(WIDTH)))
        q, k, v = qkv.split([H * K, H * K, HV * V], -1)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
        g = g.unflatten(-1, self.gate_shape)
        o = self.rule(q, k, v, g, beta, self.A_log, self.dt_bias, state)
        return self.output(self.norm(o).flatten(-2) * F.silu(z))


class Block(nn.Module):
    """A layer: tokens mixed, then channels, each after a norm and beside the residual stream."""

    def __init__(self, dim, gate, rule):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(dim, eps=1e-6), GatedDeltaNet(dim, gate, rule)
        self.mlp_norm, self.up = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, 5 * dim, bias=False)
        self.down = nn.Linear(5 * dim // 2, dim, bias=False)

    def forward(self, x, state=None):
        x = x + self.mixer(self.mixer_norm(x), state)
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out; with states the text goes on from call to call."""

    def __init__(self, dim, layers, gate, rule=nbdelta_rule):
        super().__init__()
        self.config = {"dim": dim, "layers": layers, "gate": gate}
        self.embedding = nn.Embedding(BYTES, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, gate, rule) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, tokens, states=None):
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, states and states[i])
        return F.linear(self.norm(x), self.embedding.weight)

    def new_states(self):
        channels = self.blocks[0].mixer.channels
        return [
            State(torch.zeros(1, WIDTH - 1, channels), torch.zeros(1, HV, K, V))
            for _ in self.blocks
        ]

    def bits(self, windows):
        """Mean bits per byte, of all but the first of each window."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)

    def save(self, path):
        save_file(self.state_dict(), path, {"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path):
        with safe_open(path, "pt") as file:
            model = cls(**json.loads(file.metadata()["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return model


def read_text(path):
    """Return the bytes to train on, those held out (the last tenth), and what they are."""
    if path is None:
        from pydoc_data.topics import topics

        # topics quote each other: a paragraph that comes twice must not be on both sides
        paragraphs = dict.fromkeys("\n".join(topics.values()).split("\n\n"))
        text, name = "\n\n".join(paragraphs).encode(), "Python's help texts"
    else:
        text, name = path.read_bytes(), str(path)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], name


def baselines(train, windows):
    """Return the bits per byte of smoothed byte and byte pair frequencies."""
    unigram = (torch.bincount(train, minlength=BYTES) + 1) / (len(train) + BYTES)
    pairs = torch.bincount(train[:-1] * BYTES + train[1:], minlength=BYTES**2).view(BYTES, BYTES)
    # as if every byte had been followed four times more, by what the unigram says
    bigram = (pairs + 4 * unigram) / (pairs.sum(1, keepdim=True) + 4)
    last, byte = windows[:, :-1], windows[:, 1:]
    return {
        "unigram": float(-unigram[byte].log2().mean()),
        "bigram": float(-bigram[last, byte].log2().mean()),
    }


@torch.no_grad()
def evaluate(model, windows):
    """Return the bits per byte on windows that were held out."""
    parts = windows.split(16)
    return sum(float(model.bits(part)) * len(part) for part in parts) / len(windows)


def train(model, text, windows, options, console):
    """Train, print how it goes, and return rows of step, bits on the batches, bits held out."""
    # decay is for matrices, not for gates and norms
    groups = [
        {"params": [x for x in model.parameters() if x.ndim == 2]},
        {"params": [x for x in model.parameters() if x.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, options.steps, pct_start=0.1, cycle_momentum=False
    )
    window = torch.arange(options.length + 1)
    rows, batch_bits, begin = [], [], time.perf_counter()
    every = max(1, options.steps // 10)
    columns = BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn()
    # a thread that redraws the bar would take its time from the kernels
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=options.steps)
        console.print("  step   train  held out  ms/step")
        for step in range(1, options.steps + 1):
            starts = torch.randint(len(text) - options.length, (options.batch, 1))
            loss = model.bits(text[starts + window])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            batch_bits.append(loss.item())
            if step % every == 0 or step == options.steps:
                count = len(batch_bits)
                ms = 1e3 * (time.perf_counter() - begin) / count
                rows.append((step, sum(batch_bits) / count, evaluate(model, windows)))
                console.print("{:6d}{:8.3f}{:10.3f}{:9.0f}".format(*rows[-1], ms))
                batch_bits, begin = [], time.perf_counter()
            bar.update(task, advance=1, refresh=True)
    return rows


@torch.no_grad()
def generate(model, prompt, count):
    """Yield bytes after a prompt, which is read in chunks; every new one is a recurrent step."""
    states = model.new_states()
    logits = model(prompt[None], states)
    for _ in range(count):
        token = torch.multinomial((logits[0, -1] / 0.7).softmax(-1), 1)
        yield int(token)
        logits = model(token[None], states)


@torch.no_grad()
def step_difference(model, tokens):
    """Return the relative difference of the logits, in chunks or from the middle on one by one."""
    states, half = model.new_states(), len(tokens) // 2
    chunked = model(tokens[None])
    parts = [tokens[:half], *tokens[half:].split(1)]
    stepped = torch.cat([model(part[None], states) for part in parts], 1)
    return float((stepped - chunked).norm() / chunked.norm())


def plot(path, rows, levels):
    """Draw the loss over the steps, and the baselines as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps, batches, held_out = zip(*rows, strict=True)
    axes.plot(steps, batches, ".-", label="training text")
    axes.plot(steps, held_out, ".-", label="held-out text")
    for style, (name, level) in zip((":", "--"), levels.items(), strict=True):
        axes.axhline(level, color="gray", ls=style, label=f"{name}, held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def parse():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--gate", choices=["gda", "kda"], default="gda", help="a gate per head or per key channel")
    add("--backend", choices=["nbdelta", "torch"], default="nbdelta", help="torch: of transformers")
    add("--text", type=Path, metavar="FILE", help="instead of Python's help texts")
    add("--checkpoint", type=Path, metavar="FILE", default=Path("language_model.safetensors"))
    add("--plot", type=Path, metavar="FILE.png", help="draw the loss over the steps")
    add("--seed", type=int, default=0)
    for name, default, text in (
        ("steps", 800, "of training"),
        ("batch", 8, "windows of text per step"),
        ("length", 256, "bytes per window"),
        ("layers", 4, "of the model"),
        ("dim", 128, "channels of the residual stream"),
        ("generate", 400, "bytes to generate"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    return parser.parse_args()


def main():
    """Train, save, load, generate."""
    options, console = parse(), Console(highlight=False, markup=False)
    torch.manual_seed(options.seed)
    text, held_out, name = read_text(options.text)
    count = len(held_out) // (options.length + 1)
    windows = held_out[: count * (options.length + 1)].view(count, -1)
    rule = nbdelta_rule if options.backend == "nbdelta" else transformers_rule
    model = LanguageModel(options.dim, options.layers, options.gate, rule)
    parameters = sum(x.numel() for x in model.parameters())
    levels = baselines(text, windows)
    console.print(
        f"{name}: {len(text)} bytes to train on, {len(held_out)} held out\n"
        f"{parameters / 1e6:.2f} M parameters, {options.layers} layers, {options.gate}, "
        f"{options.backend}, {torch.get_num_threads()} threads\n"
        "bits per byte, held out: "
        + ", ".join(f"{kind} {level:.3f}" for kind, level in levels.items())
    )
    begin = time.perf_counter()
    rows = train(model, text, windows, options, console)
    console.print(f"trained in {time.perf_counter() - begin:.0f} s")
    if options.plot:
        plot(options.plot, rows, levels)

    model.save(options.checkpoint)
    model = LanguageModel.load(options.checkpoint)
    prompt = held_out[:100]
    difference = step_difference(model, prompt)
    verdict = "ok" if difference <= BOUND else "MISS"
    console.print(f"logits token by token and in chunks differ by {difference:.1e} {verdict}")
    begin = time.perf_counter()
    written = bytes(generate(model, prompt, options.generate))
    ms = 1e3 * (time.perf_counter() - begin) / max(1, options.generate)
    console.print(f"{options.generate} bytes from {options.checkpoint}, {ms:.1f} ms each:\n")
    console.print((bytes(prompt.tolist()) + written).decode(errors="replace"))
    return 0 if difference <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
