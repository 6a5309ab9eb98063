"""``python -m nbdelta demo``: the main job, a transformers model with and without nbdelta.

The model has the real head geometry and layer pattern of its family; hidden size, depth and
experts are those of a laptop, and the weights are random. It reads a text, a byte is a token,
and goes on greedily, once as transformers runs it and once with ``nbdelta.transformers``.
"""

import functools
import importlib
import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbdelta import console as out

BOUND = 1e-4
_REPEATS, _ENOUGH_SECONDS = 3, 4.0
_COMMON = {
    "vocab_size": 256,
    "max_position_embeddings": 1 << 20,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class _Family:
    """One choice of ``--model``."""

    title: str
    module: str
    prefix: str
    heads: str
    tokens: int
    rules: tuple[str, str]
    config: dict


# every token goes to all experts: a choice among them would turn on the last bit of a near tie,
# and that would say nothing about the kernels
_FAMILIES = {
    "qwen3-next": _Family(
        "Qwen3-Next",
        "qwen3_next",
        "Qwen3Next",
        "16 key and 32 value heads of 128",
        1024,
        ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        {
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_experts": 4,
            "shared_expert_intermediate_size": 256,
        },
    ),
    "kimi-linear": _Family(
        "Kimi-Linear",
        "kimi_linear",
        "KimiLinear",
        "32 heads of 128",
        192,
        ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
        {
            "linear_num_heads": 32,
            "linear_head_dim": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "num_local_experts": 4,
            "intermediate_size": 1024,
        },
    ),
}


@dataclass
class _Run:
    """What one way of running the model gave."""

    logits: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    prefill: float = 0.0
    prefill_rule: float = 0.0
    decode: float = 0.0
    decode_rule: float = 0.0


class _Watch:
    """Time spent in the functions of a module that it is put on."""

    def __init__(self):
        self.seconds = 0.0

    @contextmanager
    def on(self, module, names):
        before = {name: vars(module)[name] for name in names}
        for name, function in before.items():
            setattr(module, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(module, name, function)

    def _timed(self, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed

    def take(self):
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def demo(options):
    """Run the main job and print its table.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments of the command.

    Returns
    -------
    int
        0, or 1 when tokens or logits differ, or 2 when the text cannot be read.
    """
    console = out.console("demo")
    torch = out.need("torch", "demo")
    transformers = out.need("transformers", "demo")
    transformers.utils.logging.set_verbosity_error()
    family = _FAMILIES[options.model]
    try:
        ids, source = _text(options.text, options.tokens or family.tokens)
    except (OSError, ValueError) as error:
        console.print(out.plain(f"demo: {error}"))
        return 2
    # torch's number is the process's: whoever calls from Python gets theirs back
    kept = torch.get_num_threads()
    torch.set_num_threads(options.threads or kept)
    try:
        with torch.inference_mode():
            plain, ours, parameters = _run_both(console, torch, family, options, ids)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(kept)
    console.print(
        f"[bold]{family.title}[/] ({family.heads}), {options.layers} layers, hidden size "
        f"{options.hidden_size}, {parameters / 1e6:.1f} M random weights, float32"
    )
    text = (
        f"{source}: {len(ids)} bytes as tokens, {options.new_tokens} more generated; "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
    console.print(out.plain(text))
    console.print(_table(plain, ours))
    return _compare(console, plain, ours)


def _text(path, count):
    """Return the first bytes of a text and where it is from."""
    if path is None:
        from pydoc_data.topics import topics

        text, source = "\n".join(topics.values()).encode(), "Python's help texts"
    else:
        text, source = Path(path).read_bytes(), path
    if len(text) < 2:
        raise ValueError(f"{source}: a text of at least 2 bytes is needed")
    return list(text[:count]), source


def _run_both(console, torch, family, options, ids):
    import nbdelta.transformers

    steps = 2 * (1 + _REPEATS + options.new_tokens)
    with out.progress(console, steps + 1) as step:
        step("building the model", 0)
        module = importlib.import_module(
            f"transformers.models.{family.module}.modeling_{family.module}"
        )
        model = _build(torch, family, module, options)
        step("")
        ids = torch.tensor(ids)[None]

        def run(name):
            return _run(model, module, family.rules, ids, options.new_tokens, name, step)

        nbdelta.transformers.disable()
        plain = run("torch")
        with nbdelta.transformers.enable():
            ours = run("nbdelta")
    return plain, ours, sum(x.numel() for x in model.parameters())


def _build(torch, family, module, options):
    layers = options.layers
    # three layers of linear attention, one of full attention, and at least one of each
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    if layers < 4:
        kinds[-1] = "full_attention"
    configuration = importlib.import_module(
        f"transformers.models.{family.module}.configuration_{family.module}"
    )
    config = getattr(configuration, f"{family.prefix}Config")(
        **_COMMON,
        **family.config,
        hidden_size=options.hidden_size,
        num_hidden_layers=layers,
        layer_types=kinds,
    )
    torch.manual_seed(options.seed)
    return getattr(module, f"{family.prefix}ForCausalLM")(config).eval()


def continued(model, ids, output):
    """Call a model on the tokens after those of `output`, with its cache."""
    # transformers 5.24 renamed the argument and the field
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(ids, **{name: output and getattr(output, name)}, use_cache=True)


def _run(model, module, rules, ids, new_tokens, name, step):
    """Prefill and generate; the first, short run compiles, allocates and is not timed."""
    run, watch = _Run(), _Watch()
    step(f"{name}: first call", 0)
    warm = model(ids[:, :70], use_cache=True)
    continued(model, ids[:, :1], warm)
    step("")
    with watch.on(module, rules):
        prefills, spent = [], 0.0
        for _ in range(_REPEATS):
            if spent < _ENOUGH_SECONDS:
                step(f"{name}: prefill", 0)
                begin = time.perf_counter()
                output = model(ids, use_cache=True)
                prefills.append((time.perf_counter() - begin, watch.take()))
                spent += prefills[-1][0]
            step("")
        run.prefill, run.prefill_rule = min(prefills)
        steps = []
        for i in range(new_tokens):
            step(f"{name}: token {i + 1}", 0)
            run.logits.append(output.logits[0])
            token = output.logits[:, -1:].argmax(-1)
            run.tokens.append(int(token))
            begin = time.perf_counter()
            output = continued(model, token, output)
            steps.append((time.perf_counter() - begin, watch.take()))
            step("")
        run.logits.append(output.logits[0])
        run.decode, run.decode_rule = (sorted(x)[len(x) // 2] for x in zip(*steps, strict=True))
    return run


def _table(plain, ours):
    table = out.table("", "milliseconds", ">torch", ">nbdelta", ">speed-up")
    for text, name in (
        ("prefill, the rule in the linear-attention layers", "prefill_rule"),
        ("prefill, whole model", "prefill"),
        ("a generated token, the rule", "decode_rule"),
        ("a generated token, whole model", "decode"),
    ):
        a, b = 1e3 * getattr(plain, name), 1e3 * getattr(ours, name)
        table.add_row(text, f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f} x")
    return table


def _compare(console, plain, ours):
    """Print what differs; after the first different token the logits are those of other texts."""
    pairs = list(zip(plain.tokens, ours.tokens, strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    differences = [
        float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max())
        for a, b in zip(plain.logits[: same + 1], ours.logits[: same + 1], strict=True)
    ]
    # NaN is larger than all numbers here
    difference = max(differences, key=lambda x: (x != x, x))
    good = difference <= BOUND
    console.print(
        f"largest difference of a token's logits, relative: {difference:.1e} "
        f"(bound {BOUND:.0e}) {out.verdict(good)}"
    )
    equal = "yes" if same == len(pairs) else f"no, from the {same + 1}th on"
    console.print(f"same tokens generated: {equal} {out.verdict(same == len(pairs))}")
    return 0 if good and same == len(pairs) else 1
