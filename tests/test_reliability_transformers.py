"""`nbdelta.transformers` in the programs of other people: every case in a process of its own."""

import importlib.util
import os
from pathlib import Path

import pytest
from processes import run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BEGIN = """
import sys, threading
import tiny_models
import nbdelta, nbdelta.transformers as served
module = tiny_models.modeling("qwen3_next")
NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
def functions():
    return [vars(module)[name] for name in NAMES]
before, finders = functions(), list(sys.meta_path)
def is_served():
    now = functions()
    assert all(f.__wrapped__ is g for f, g in zip(now, before)) or now == before
    assert (sys.meta_path != finders) == (now != before)
    return now != before
"""


def run_here(code, **options):
    return run(BEGIN + code, cwd=Path(__file__).parent, **options)


def test_twice_and_under_exceptions():
    run_here(
        """
import contextlib
# any mixture of plain calls and blocks: in force while one is, and never on top of itself
served.enable(); served.enable()
assert is_served()
served.disable()
assert not is_served()
with served.enable():
    with served.enable():
        assert is_served()
    assert is_served()
    served.enable()
assert is_served()
with served.enable():
    served.disable()
    assert not is_served()
    served.enable()
assert is_served()
served.disable(); served.disable()
assert not is_served()

again = served.enable()
served.disable()
for _ in range(2):
    with again, again:
        assert is_served()
    assert not is_served()

for error in (KeyError, KeyboardInterrupt, SystemExit):
    with contextlib.suppress(error), served.enable():
        with contextlib.suppress(ValueError), served.enable():
            raise ValueError
        assert is_served()
        raise error
    assert not is_served()

# an error while functions are replaced: all of them are restored, unless someone else has them
patch, count = served._patch, 0
def failing(module):
    global count
    count += 1
    patch(module)
    raise KeyboardInterrupt
for outside in (False, True):
    with served.enable() if outside else contextlib.nullcontext():
        served._patch = failing
        with contextlib.suppress(KeyboardInterrupt):
            served.enable()
        served._patch = patch
        assert is_served() == outside
    assert not is_served()
assert count == 2

# what some put there in the place of a module
sys.modules["transformers.models.none.modeling_none"] = None
with served.enable():
    assert is_served()
assert not is_served()
"""
    )


def test_threads():
    """In force as long as one thread is inside, whoever leaves first; imports at the same time."""
    run_here(
        """
import importlib, random
inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]
def stay(n):
    with served.enable():
        inside.wait()
        leave[n].wait()
threads = [threading.Thread(target=stay, args=(n,)) for n in range(2)]
for t in threads: t.start()
inside.wait()
for n in range(2):
    assert is_served()
    leave[n].set()
    threads[n].join()
assert not is_served()

wrong = []
def churn(seed):
    rng = random.Random(seed)
    for _ in range(300):
        with served.enable():
            if functions() == before:
                wrong.append(seed)
            if rng.random() < 0.3:
                with served.enable():
                    pass
            if functions() == before:
                wrong.append(seed)
threads = [threading.Thread(target=churn, args=(n,)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong and not is_served()

# a model whose import had begun when another thread enables
name = "transformers.models.olmo_hybrid.modeling_olmo_hybrid"
slow = importlib.util.find_spec(name)
begun, go_on = threading.Event(), threading.Event()
class Slow:
    def find_spec(self, fullname, path=None, target=None):
        if fullname != name:
            return None
        execute = slow.loader.exec_module
        def exec_module(module):
            begun.set()
            go_on.wait()
            execute(module)
        slow.loader.exec_module = exec_module
        return slow
sys.meta_path.insert(0, Slow())
sys.modules.pop(name, None)
importing = threading.Thread(target=importlib.import_module, args=(name,))
importing.start()
begun.wait()
threading.Timer(0.2, go_on.set).start()
with served.enable():
    late = sys.modules[name].torch_chunk_gated_delta_rule
    assert late.__wrapped__ is not None and any(p[3] is late for p in served._patches)
importing.join()
assert sys.modules[name].torch_chunk_gated_delta_rule is late.__wrapped__
"""
    )


# as transformers sees it: it imports anywhere, and its functions need a GPU
FLA = """
def {name}(q, k, v, g, beta, **options):
    raise RuntimeError("0 active drivers ([]). There should only be one.")
"""
WITHOUT_A_GPU = """
import torch
from token_loop import torch_rule

def token_loop(query, key, value, g, beta, **options):
    tensors = {"q": query, "k": key, "v": value, "g": g, "beta": beta}
    l2norm = {"use_qk_l2norm_in_kernel": options["use_qk_l2norm_in_kernel"]}
    o, _ = torch_rule({name: x.double() for name, x in tensors.items()} | l2norm)
    return o.to(query.dtype), None

torch.set_grad_enabled(False)
ids = torch.arange(2, 42)[None]
for name, chunked in (
    ("qwen3_next", "torch_chunk_gated_delta_rule"), ("kimi_linear", "chunk_kimi_delta_attention")
):
    made_before = tiny_models.build(name)
    try:
        made_before(ids)
    except RuntimeError as error:
        assert "active drivers" in str(error), error
    else:
        raise AssertionError("this fla works without a GPU")
    with served.enable():
        made_after = tiny_models.build(name)
        got = [model(ids, use_cache=False).logits for model in (made_before, made_after)]
        tokens = [
            model.generate(ids, max_new_tokens=4, do_sample=False)
            for model in (made_before, made_after)
        ]
    assert torch.equal(*got) and torch.equal(*tokens)
    module = tiny_models.modeling(name)
    kept = vars(module)[chunked]
    setattr(module, chunked, token_loop)
    expected = made_after(ids, use_cache=False).logits
    setattr(module, chunked, kept)
    assert (got[0] - expected).norm() < 1e-5 * expected.norm()
"""


def test_fla_without_a_gpu(tmp_path):
    """A stand-in of FLA: transformers takes it, and dies by itself, before and after the block."""
    for rule, names in (
        ("gated_delta_rule", ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")),
        ("kda", ("chunk_kda", "fused_recurrent_kda")),
    ):
        folder = tmp_path / "fla" / "ops" / rule
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("".join(FLA.format(name=name) for name in names))
    for package in ("fla", "fla/ops"):
        (tmp_path / package / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run_here(WITHOUT_A_GPU, env={"PYTHONPATH": path})


def test_the_real_fla_without_a_gpu():
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        pytest.skip("flash-linear-attention or Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: FLA works")
    run_here(WITHOUT_A_GPU)
