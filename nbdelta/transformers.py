"""Make Hugging Face transformers models use the kernels.

``enable()`` puts nbdelta behind the functions that the models call for their linear attention,
``disable()`` takes it away again. Both act on the modules of transformers, so a model made
before or after behaves the same, and a model class imported later is served too.
"""

import contextlib
import functools
import importlib
import importlib.util
import re
import sys
import threading
import warnings
from importlib.machinery import PathFinder

import nbdelta
from nbdelta.dispatch import rejection_reason
from nbdelta.forks import wait_for

__all__ = ["disable", "enable"]

_MODELING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
_REQUIRED = ("query", "key", "value", "g", "beta")
_OPTIONAL = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
# how models name the boundaries of packed sequences: some rename, some hand their own on
_PACKED = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")
# where a seq_idx keeps the boundaries that were made of it
_BOUNDARIES = "_nbdelta_boundaries"
# what torch._dynamo.mark_static_address() leaves on the states of a transformers cache
_STATIC_ADDRESS = "_dynamo_static_input_type"

_lock = threading.RLock()
wait_for(_lock)
_held = []  # what enable() returned, until the end of its block or disable()
_patches = []  # (module, function name, original, served)
_said = set()


class _Enabled:
    """What ``enable()`` returns; a block of it that ends takes back that call of ``enable()``."""

    def __init__(self):
        self._entered = False

    def __enter__(self):
        with _lock:
            first, self._entered = not self._entered, True
            counted = first and self in _held
        if not counted:
            _hold(self)
        return self

    def __exit__(self, *error):
        _release(self)


def _hold(enabled):
    """Patch all models for what ``enable()`` returned, or, if that fails, leave all as it was."""
    try:
        with _lock:
            _held.append(enabled)
            if _hook not in sys.meta_path:
                # before the scan, so that a module imported meanwhile is not missed
                sys.meta_path.insert(0, _hook)
        for module in _modeling_modules():
            if getattr(getattr(module, "__spec__", None), "_initializing", False):
                # another thread had begun to import it, and may need the lock to end that; if that
                # fails, it fails there
                with contextlib.suppress(Exception):
                    importlib.import_module(module.__name__)
        with _lock:
            if enabled in _held:  # no other thread has disabled it meanwhile
                for module in _modeling_modules():
                    _patch(module)
    except BaseException:
        _release(enabled)
        raise


def _modeling_modules():
    """Models of transformers that are imported, or about to be."""
    modules = sys.modules.copy().items()
    return [x for name, x in modules if x is not None and _MODELING.fullmatch(name)]


def _release(enabled):
    """Restore every function unless someone else holds them."""
    with _lock:
        if enabled in _held:
            _held.remove(enabled)
            if not _held:
                disable()


def enable():
    """Let transformers models run their linear attention through nbdelta.

    Serves every model of the installed transformers that calls the gated delta rule or Kimi delta
    attention by the library's usual names: Qwen3-Next, Qwen3.5 (dense and MoE), OLMo-Hybrid,
    Kimi-Linear, GLM-5-Next and relatives. Models made before the call are served as well.

    Training works as generation does, with gradient checkpointing too. Packed sequences
    (``cu_seq_lens_q`` or ``seq_idx`` in the model's call), which the PyTorch functions of
    transformers refuse or mix up, are kept apart, in the short convolution before the rule too.
    On a GPU ``cu_seq_lens_q`` is not looked at by the host; of a ``seq_idx`` it has to find the
    boundaries first, for which it waits once per tensor.
    Calls with tensors on a device that cannot be served go to the function that was there before,
    and a warning says so once.

    Returns
    -------
    context manager
        ``with enable(): ...`` ends with the block. As a plain call, whose result may be dropped, it
        lasts until ``disable()``. Models are served as long as one of either is in force, in
        whatever thread; ``disable()`` ends all of them.

    See Also
    --------
    disable : restore every function.

    Examples
    --------
    >>> import nbdelta.transformers
    >>> with nbdelta.transformers.enable():
    ...     model.generate(input_ids)  # doctest: +SKIP
    """
    if "transformers" not in sys.modules and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            "nbdelta.transformers.enable() needs transformers: pip install transformers"
        )
    enabled = _Enabled()
    _hold(enabled)
    return enabled


def disable():
    """Restore every function that ``enable()`` replaced; without effect when nothing is enabled.

    It ends plain calls of ``enable()`` and blocks in any thread; such a block then ends without
    effect on what was enabled since.
    """
    with _lock:
        _held.clear()
        if _hook in sys.meta_path:
            sys.meta_path.remove(_hook)
        for module, name, original, served in _patches:
            # someone else may have replaced the function since: theirs stays
            if vars(module).get(name) is served:
                setattr(module, name, original)
        _patches.clear()
        _said.clear()


class _ImportHook:
    """Patches the modeling modules of transformers that are imported while enabled."""

    def find_spec(self, fullname, path=None, target=None):
        if not _MODELING.fullmatch(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                with _lock:
                    if self in sys.meta_path:
                        _patch(module)

            spec.loader.exec_module = exec_module
        return spec


_hook = _ImportHook()


def _patch(module):
    rules = {name: serve for name, serve in _RULES.items() if name in vars(module)}
    if not rules:
        return
    for name, serve in {**rules, "causal_conv1d_fn": _serve_packed_convolution}.items():
        original = vars(module).get(name)
        if original is None or any(original is patch[3] for patch in _patches):
            continue
        served = serve(original)
        _patches.append((module, name, original, served))
        setattr(module, name, served)


def _serve_rule(function, positional):
    """Make the decorator that puts the public function of that name before the original."""

    def serve(original):
        @functools.wraps(original)
        def served(*args, **kwargs):
            given = dict(zip(positional, args))
            given.update(kwargs)
            # nothing is patched: someone kept this function beyond disable()
            if not _patches or not all(name in given for name in _REQUIRED):
                return original(*args, **kwargs)
            reason = _rejection_reason(given)
            if reason is not None:
                _say_once(reason)
                return original(*args, **kwargs)
            state = given.get("initial_state")
            query = given["query"]
            if state is not None and state.dtype not in _state_dtypes(query):
                # the functions of transformers keep the state in float32 whatever they are given
                state = state.float()
            options = {}
            if function != "gated_delta_rule" and hasattr(state, _STATIC_ADDRESS):
                # the cache's own memory, which the model overwrites with the result next
                wanted = bool(given.get("output_final_state"))
                options["inplace_final_state"] = wanted and not _is_recorded(given)
            return getattr(nbdelta, function)(
                query,
                given["key"],
                given["value"],
                given["g"],
                given["beta"],
                initial_state=state,
                output_final_state=bool(given.get("output_final_state")),
                use_qk_l2norm_in_kernel=bool(given.get("use_qk_l2norm_in_kernel")),
                cu_seqlens=_boundaries(given),
                **options,
            )

        return served

    return serve


def _serve_packed_convolution(original):
    """Keep packed sequences apart in the short convolution; any other call is the original's.

    Zeros between the sequences, as many as the convolution looks back, make one call of the
    original on the spread-out row equal to a call for each sequence.
    """

    @functools.wraps(original)
    def served(hidden_states, weight, *args, **kwargs):
        cu_seqlens = _boundaries(kwargs)
        served_here = rejection_reason(str(hidden_states.device)) is None
        alone = hidden_states.shape[0] == 1 and served_here
        if cu_seqlens is None or not alone or not _patches or _is_tracing():
            return original(hidden_states, weight, *args, **kwargs)
        torch = _torch()
        length, look_back = hidden_states.shape[-1], weight.shape[-1] - 1
        # a cache puts what it kept of earlier tokens in front: that belongs to the first sequence
        starts = (cu_seqlens[1:-1] + (length - cu_seqlens[-1])).to(hidden_states.device)
        if cu_seqlens.device.type == "cpu":
            if cu_seqlens[-1] > length or (starts < 0).any() or (starts > length).any():
                raise ValueError(
                    f"cu_seqlens: boundaries from 0 to the number of tokens ({length}) expected, "
                    f"got {cu_seqlens.tolist()}"
                )
        else:  # looking would wait for the device
            starts = starts.clamp(0, length)
        token = torch.arange(length, dtype=starts.dtype, device=starts.device)
        place = token + look_back * torch.searchsorted(starts, token, right=True)
        spread = hidden_states.new_zeros(*hidden_states.shape[:2], length + look_back * len(starts))
        spread[..., place] = hidden_states
        kwargs = {name: value for name, value in kwargs.items() if name not in _PACKED}
        return original(spread, weight, *args, **kwargs)[..., place]

    return served


_CHUNK = (*_REQUIRED, "chunk_size", *_OPTIONAL)
_RECURRENT = (*_REQUIRED, *_OPTIONAL)
_RULES = {
    "torch_chunk_gated_delta_rule": _serve_rule("gated_delta_rule", _CHUNK),
    "torch_recurrent_gated_delta_rule": _serve_rule("fused_recurrent_gated_delta_rule", _RECURRENT),
    "chunk_kimi_delta_attention": _serve_rule("gated_delta_rule", _CHUNK),
    "recurrent_kimi_delta_attention": _serve_rule("fused_recurrent_kda", _RECURRENT),
}


def _rejection_reason(given):
    """Say why nbdelta does not serve this call, or ``None``."""
    torch = _torch()
    tensors = [given[name] for name in _REQUIRED]
    if given.get("initial_state") is not None:
        tensors.append(given["initial_state"])
    for x in tensors:
        # subclasses (fake, distributed, quantised) have no memory to hand to a kernel
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            return f"got a {type(x).__name__} where a plain tensor is needed"
        reason = rejection_reason(str(x.device))
        if reason is not None:
            return f"the tensors are on {x.device}: {reason}"
    dtypes = {given[name].dtype for name in ("query", "key", "value")}
    if len(dtypes) > 1:
        return f"query, key and value have different dtypes ({', '.join(map(str, dtypes))})"
    if len(given["query"]) != 1 and any(given.get(name) is not None for name in _PACKED):
        return f"packed sequences need a batch of 1, got {len(given['query'])}"
    if _is_tracing():
        return "torch is compiling or tracing the model"
    return None


def _is_recorded(given):
    torch = _torch()
    tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _state_dtypes(query):
    torch = _torch()
    wide = (torch.float32, torch.float64)
    return wide if query.dtype == torch.float64 else wide[:1]


def _boundaries(given):
    """``cu_seqlens`` from whichever way the model has of saying it, or ``None``."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if given.get(name) is not None:
            return given[name]
    seq_idx = given.get("seq_idx")
    if seq_idx is None:
        return None
    # inference tensors do not say when they were changed
    version = None if seq_idx.is_inference() else seq_idx._version
    of_version, boundaries = getattr(seq_idx, _BOUNDARIES, (None, None))
    if version is None or of_version != version:
        torch = _torch()
        # how many there are is known to the device alone: on a GPU the host waits here, once for
        # all layers. (As many as there are tokens, most of them empty, need no look, but a block of
        # threads each.)
        changes = 1 + torch.nonzero(seq_idx[0, 1:] != seq_idx[0, :-1]).flatten()
        ends = changes.new_zeros(1), changes, changes.new_tensor([seq_idx.shape[1]])
        boundaries = torch.cat(ends)
        setattr(seq_idx, _BOUNDARIES, (version, boundaries))
    return boundaries


def _is_tracing():
    torch = _torch()
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _say_once(reason):
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"nbdelta: {reason}; the function that transformers had before enable() runs instead",
            RuntimeWarning,
            stacklevel=3,
        )


def _torch():
    # nothing is served before transformers has imported torch
    return sys.modules["torch"]
