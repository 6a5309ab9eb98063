"""`nbdelta.transformers`: every model of the installed transformers that has the rule."""

import contextlib
import functools
import importlib
import itertools
import sys

import pytest
import tiny_models

import nbdelta
import nbdelta.transformers as served
from nbdelta.demo import continued

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MODELS = tiny_models.installed()
NAMES = [
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
]
RULES = ["gated_delta_rule", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"]


class Subclass(torch.Tensor):
    """A tensor that may hold its numbers elsewhere."""


@pytest.fixture(autouse=True)
def disabled_afterwards():
    yield
    served.disable()


@pytest.fixture
def calls(monkeypatch):
    """Counts of the calls that reach nbdelta, by function."""
    counts = dict.fromkeys(RULES, 0)

    def count(name, function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(nbdelta, name, counted)

    for name in RULES:
        count(name, getattr(nbdelta, name))
    return counts


@functools.cache
def model_of(name):
    return tiny_models.build(name)


def tokens(*shape, seed=1):
    return torch.randint(2, tiny_models.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rel_l2(x, reference):
    return float((x - reference).norm() / reference.norm())


def functions(module):
    return {
        name: vars(module)[name] for name in (*NAMES, "causal_conv1d_fn") if name in vars(module)
    }


def rule_layer(model):
    """The first linear-attention layer."""
    return next(m for m in model.modules() if hasattr(m, "conv1d") and hasattr(m, "layer_idx"))


def generate(model, ids, count=8, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(2, 37), (1, 130)], ids="B{0[0]}-T{0[1]}".format)
def test_logits_agree(name, shape, calls):
    model, ids = model_of(name), tokens(*shape)
    with torch.no_grad():
        expected = model(ids).logits
        assert sum(calls.values()) == 0
        with served.enable():
            got = model(ids).logits
    assert sum(calls.values()) == 2  # one call per linear-attention layer
    assert rel_l2(got, expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_equal(name, calls):
    model, ids = model_of(name), tokens(2, 20)
    with torch.inference_mode():
        expected = generate(model, ids)
        with served.enable():
            got = generate(model, ids)
    assert torch.equal(got, expected)
    assert sum(calls.values()) == 2 * 8


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_may_pass_between_the_two(name):
    model, ids = model_of(name), tokens(1, 24)
    parts = ids[:, :15], ids[:, 15:21], ids[:, 21:22], ids[:, 22:]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        output, got = None, []
        for i, part in enumerate(parts):
            with served.enable() if i % 2 == 0 else contextlib.nullcontext():
                output = continued(model, part, output)
            got.append(output.logits)
    assert rel_l2(torch.cat(got, dim=1), expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_a_decode_step_updates_the_state_of_a_cache_in_place_and_no_other(name):
    module, model = tiny_models.modeling(name), model_of(name)
    recurrent = functions(module)[next(n for n in functions(module) if "recurrent" in n)]
    with torch.no_grad(), served.enable():
        output = model(tokens(1, 9), use_cache=True)
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        state = cache.layers[0].recurrent_states[0]
        kept, address = state.clone(), state.data_ptr()
        continued(model, tokens(1, 1), output)
        assert cache.layers[0].recurrent_states[0].data_ptr() == address
        assert not torch.equal(state, kept)

        _, HV, K, V = state.shape
        g = -torch.ones((1, 1, HV, K) if name == "kimi_linear" else (1, 1, HV))
        q, v = torch.ones(1, 1, HV, K), torch.ones(1, 1, HV, V)
        arguments = (q, q, v, g, v[..., 0], kept, True)
        before = kept.clone()
        new = vars(module)[recurrent.__name__](*arguments)[1]
        assert torch.equal(kept, before)
        assert rel_l2(new, recurrent(*arguments)[1]) < 1e-5


def test_left_padded_batch():
    model, ids = model_of("qwen3_next"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = generate(model, ids, attention_mask=mask)
        with served.enable():
            got = generate(model, ids, attention_mask=mask)
    assert torch.equal(got, expected)


def test_beams_reorder_the_cache():
    model, ids = model_of("qwen3_next"), tokens(2, 20)
    with torch.no_grad():
        expected = generate(model, ids, num_beams=3)
        with served.enable():
            got = generate(model, ids, num_beams=3)
    assert torch.equal(got, expected)


def test_a_compiled_layer_keeps_the_functions_of_torch(calls):
    layer, hidden = rule_layer(model_of("qwen3_next")), torch.randn(1, 9, 48)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        expected = layer(hidden)
        with served.enable(), pytest.warns(RuntimeWarning, match="compiling"):
            got = compiled(hidden)
    assert sum(calls.values()) == 0
    assert rel_l2(got, expected) < 1e-6


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_bfloat16_model(name, calls):
    model, ids = tiny_models.build(name), tokens(1, 50)
    with torch.no_grad():
        exact = model(ids).logits
        model = model.to(torch.bfloat16)
        expected = model(ids).logits
        with served.enable():
            got = model(ids).logits
    assert got.dtype == torch.bfloat16
    assert sum(calls.values()) > 0
    # rounding moves the choice of experts, so the yardstick is what rounding does by itself
    assert rel_l2(got.float(), exact) < 1.5 * rel_l2(expected.float(), exact) + 1e-2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "seq_idx"])
def test_packed_layer_equals_separate_sequences(name, how):
    layer, lengths = rule_layer(model_of(name)), [9, 1, 2, 30, 7]
    hidden = torch.randn(1, sum(lengths), 48, generator=torch.Generator().manual_seed(3))
    if how == "seq_idx":
        packed = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    else:
        packed = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    with torch.no_grad():
        expected = torch.cat([layer(part) for part in hidden.split(lengths, dim=1)], dim=1)
        with served.enable():
            got = layer(hidden, **{how: packed})
    for a, b in zip(got.split(lengths, 1), expected.split(lengths, 1), strict=True):
        assert rel_l2(a, b) < 1e-5


def test_boundaries_are_looked_for_once_per_tensor(monkeypatch):
    """On a GPU the host waits for the device each time."""
    looks, nonzero = [], torch.nonzero
    monkeypatch.setattr(torch, "nonzero", lambda x: looks.append(x) or nonzero(x))
    layer, hidden = rule_layer(model_of("qwen3_next")), torch.randn(1, 12, 48)
    seq_idx = torch.arange(12)[None] // 5
    with torch.no_grad(), served.enable():
        first = [layer(hidden, seq_idx=seq_idx) for _ in range(2)]
        assert len(looks) == 1 and torch.equal(*first)
        seq_idx[:] = torch.arange(12) // 3
        other = layer(hidden, seq_idx=seq_idx)
        assert len(looks) == 2
        assert torch.equal(other, layer(hidden, seq_idx=torch.arange(12)[None] // 3))
    with torch.inference_mode(), served.enable():
        unseen = torch.arange(12)[None] // 5
        assert torch.equal(layer(hidden, seq_idx=unseen), first[0])
        unseen[:] = torch.arange(12) // 3
        assert torch.equal(layer(hidden, seq_idx=unseen), other)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "olmo_hybrid", "kimi_linear"])
def test_packed_model_equals_separate_sequences(name):
    model, lengths = model_of(name), [9, 1, 30, 7]
    ids = tokens(1, sum(lengths))
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0),
        "use_cache": False,
    }
    with torch.no_grad():
        parts = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
        with served.enable():
            got = model(ids, **packed).logits
    for a, b in zip(got.split(lengths, dim=1), parts, strict=True):
        assert rel_l2(a, b) < 1e-4


def test_packed_prefill_is_refused_without_nbdelta_as_before():
    model, packed = model_of("qwen3_next"), {"cu_seq_lens_q": torch.tensor([0, 3, 8])}
    with served.enable(), torch.no_grad():
        model(tokens(1, 8), use_cache=False, **packed)
    with pytest.raises(ValueError, match="packed"), torch.no_grad():
        model(tokens(1, 8), use_cache=False, **packed)


def test_wrong_boundaries_are_an_error():
    layer = rule_layer(model_of("qwen3_next"))
    with served.enable(), torch.no_grad():
        for wrong in ([0, 3, 9], [0, 3, 7], [0, 5, 3, 8]):
            with pytest.raises(ValueError, match="cu_seqlens"):
                layer(torch.ones(1, 8, 48), cu_seq_lens_q=torch.tensor(wrong))


@pytest.mark.parametrize("name", MODELS)
def test_disable_restores_everything(name):
    module = tiny_models.modeling(name)
    before, finders = functions(module), list(sys.meta_path)
    served.disable()
    assert functions(module) == before
    for _ in range(2):
        served.enable()
    during = functions(module)
    assert len(during) == 3
    assert not set(during.values()) & set(before.values())
    for _ in range(2):
        served.disable()
        assert functions(module) == before
    assert sys.meta_path == finders


def test_nested_blocks_end_with_the_outermost():
    module = tiny_models.modeling("qwen3_next")
    before = functions(module)
    with served.enable():
        during = functions(module)
        with served.enable():
            assert functions(module) == during
        assert functions(module) == during
    assert functions(module) == before
    served.enable()
    with served.enable():
        pass
    assert functions(module) == during | functions(module)
    assert functions(module) != before


def test_an_exception_leaves_nothing_behind():
    module = tiny_models.modeling("kimi_linear")
    before = functions(module)
    with pytest.raises(KeyError), served.enable():
        raise KeyError
    assert functions(module) == before


def test_a_function_replaced_meanwhile_stays():
    module = tiny_models.modeling("qwen3_next")
    before = module.torch_chunk_gated_delta_rule
    try:
        served.enable()
        mine = module.torch_chunk_gated_delta_rule = lambda *args, **kwargs: None
        served.disable()
        assert module.torch_chunk_gated_delta_rule is mine
    finally:
        module.torch_chunk_gated_delta_rule = before


def test_a_function_kept_beyond_disable_is_the_original(calls):
    module = tiny_models.modeling("qwen3_next")
    with served.enable():
        kept = module.torch_chunk_gated_delta_rule
    x, g = torch.ones(1, 3, 4, 8), -torch.ones(1, 3, 4)
    kept(x, x, x, g=g, beta=-g)
    assert sum(calls.values()) == 0


@pytest.mark.parametrize("how", ["imported", "reloaded"])
def test_a_module_that_comes_later_is_served(how, monkeypatch):
    module = tiny_models.modeling("olmo_hybrid")
    kept = dict(vars(module))
    served.enable()
    if how == "imported":
        monkeypatch.delitem(sys.modules, module.__name__)
        module = importlib.import_module(module.__name__)
    else:
        importlib.reload(module)
    during = functions(module)
    served.disable()
    for name, function in functions(module).items():
        assert during[name].__wrapped__ is function
        assert function is not kept[name]
    vars(module).update(kept)


def test_other_models_with_a_short_convolution_are_left_alone():
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    before = dict(vars(module))
    with served.enable():
        assert dict(vars(module)) == before


def gradients(model, ids, first=0, **options):
    """Gradients of all parameters that have one, of a sum of the logits with random weights."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(1, 200, tiny_models.VOCAB, generator=generator)
    model.zero_grad()
    logits = model(ids, use_cache=False, **options).logits
    (logits * weights[:, first : first + ids.shape[1]]).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def token_loop(query, key, value, g, beta, **options):
    """In float64: the functions of transformers have errors of 1e-2 in the gradients of gates."""
    from token_loop import torch_rule

    tensors = {"q": query, "k": key, "v": value, "g": g, "beta": beta}
    l2norm = {"use_qk_l2norm_in_kernel": options["use_qk_l2norm_in_kernel"]}
    o, _ = torch_rule({name: x.double() for name, x in tensors.items()} | l2norm)
    return o.to(query.dtype), None


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_all_parameters(name, calls, monkeypatch):
    model, ids = model_of(name), tokens(1, 70)
    with served.enable():
        got = gradients(model, ids)
    assert sum(calls.values()) == 2
    chunked = next(n for n in functions(tiny_models.modeling(name)) if "chunk" in n)
    monkeypatch.setattr(tiny_models.modeling(name), chunked, token_loop)
    expected = gradients(model, ids)
    assert list(got) == list(expected) and len(got) > 40
    for parameter, x in expected.items():
        assert rel_l2(got[parameter], x) < 1e-4, parameter


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant, calls):
    model, ids = tiny_models.build(name).train(), tokens(1, 75)
    with served.enable():
        expected = gradients(model, ids)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients(model, ids)
    assert sum(calls.values()) == 2 + 2 * 2
    for parameter, x in expected.items():
        assert rel_l2(got[parameter], x) < 1e-4, parameter


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_gradients_of_packed_sequences(name):
    """One packed row has the gradients of its sequences, added up."""
    model, lengths = model_of(name), [70, 1, 30, 7]
    ids = tokens(1, sum(lengths))
    packed = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0),
    }
    with served.enable():
        got = gradients(model, ids, **packed)
        starts = [0, *itertools.accumulate(lengths)]
        parts = [gradients(model, *part) for part in zip(ids.split(lengths, dim=1), starts)]
    for parameter, x in got.items():
        assert rel_l2(x, sum(part[parameter] for part in parts)) < 1e-4, parameter


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: x.as_subclass(Subclass), "Subclass"),
    ],
    ids=["device", "subclass"],
)
def test_other_tensors_fall_through(change, reason, calls):
    module = tiny_models.modeling("qwen3_next")
    q = change(torch.ones(1, 3, 2, 8))
    v, g = change(torch.ones(1, 3, 4, 8)), change(-torch.ones(1, 3, 4))
    with served.enable(), pytest.warns(RuntimeWarning, match=reason):
        o, state = module.torch_chunk_gated_delta_rule(q, q, v, g=g, beta=-g)
    assert o.shape == (1, 3, 4, 8) and state is None
    assert sum(calls.values()) == 0


def test_positional_calls_and_half_states():
    module = tiny_models.modeling("kimi_linear")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    g, beta = -torch.rand(1, 40, 2, 16, generator=generator), torch.rand(1, 40, 2)
    state = torch.randn(1, 2, 16, 16, generator=generator).to(torch.bfloat16)
    kept = state.clone()
    arguments = (q, k, v, g, beta, 64, state, True, True)
    expected = module.chunk_kimi_delta_attention(*arguments)
    with served.enable():
        got = module.chunk_kimi_delta_attention(*arguments)
        with pytest.raises(TypeError):
            module.chunk_kimi_delta_attention(q, k)
    assert got[1].dtype == expected[1].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert rel_l2(a, b) < 1e-5
    assert torch.equal(state, kept)
