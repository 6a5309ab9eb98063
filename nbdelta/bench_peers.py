"""Who takes part in ``python -m nbdelta bench``: nbdelta and the peers that are installed.

`prepare` brings the inputs, NumPy arrays, into a contender's own form outside of the clock and
returns a call; `results` reads what a call returned as NumPy arrays, the states as ``[N, HV, K,
V]``. All calls normalise q and k, begin from states and return the final ones.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

import nbdelta

OPTIONS = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}


def contenders(device):
    """Return the contenders on a device, nbdelta first."""
    if device == "cpu":
        found = [Nbdelta(), *if_there(Transformers), *if_there(Ggml)]
    else:
        found = [NbdeltaOnCuda(), *if_there(FlashLinearAttention)]
    return found


def if_there(peer):
    """Return a list of the peer, empty where it is not installed."""
    try:
        return [peer()]
    except (ImportError, OSError, AttributeError):  # not installed, or not with this operator
        return []


def version(package):
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Nbdelta:
    """The public functions on NumPy arrays; a decode step works on the states in place."""

    name = "nbdelta"

    def prepare(self, shape, inputs, threads):
        """Return a call."""
        if shape.T > 1:
            return lambda: nbdelta.chunk_gated_delta_rule(**inputs, **OPTIONS)
        inputs = {**inputs, "initial_state": inputs["initial_state"].copy()}
        return lambda: nbdelta.fused_recurrent_gated_delta_rule(
            **inputs, **OPTIONS, inplace_final_state=True
        )

    def results(self, result):
        """Return output and states."""
        return result


class Transformers:
    """The PyTorch functions that models of transformers run without other kernels."""

    name = "torch"

    def __init__(self):
        self.torch = importlib.import_module("torch")
        # or it says four times that other kernels would be faster
        importlib.import_module("transformers").logging.set_verbosity_error()
        models = "transformers.models"
        gda = importlib.import_module(f"{models}.qwen3_next.modeling_qwen3_next")
        kda = importlib.import_module(f"{models}.kimi_linear.modeling_kimi_linear")
        self.functions = {
            ("gda", True): gda.torch_chunk_gated_delta_rule,
            ("gda", False): gda.torch_recurrent_gated_delta_rule,
            ("kda", True): kda.chunk_kimi_delta_attention,
            ("kda", False): kda.recurrent_kimi_delta_attention,
        }

    def prepare(self, shape, inputs, threads):
        """Return a call."""
        tensors = {name: self.torch.from_numpy(x) for name, x in inputs.items()}
        q, k, v = (tensors.pop(name) for name in "qkv")
        function = self.functions[shape.gate, shape.T > 1]

        def call():
            with self.torch.inference_mode():
                return function(q, k, v, **tensors, **OPTIONS)

        return call

    def results(self, result):
        """Return output and states."""
        return tuple([x.numpy() for x in result])


class _Pool(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("empty", ctypes.c_bool))


class Ggml:
    """The operator of ggml, in the libraries that llama-cpp-python brings along.

    Its arrays lie as those of nbdelta do, but for the states, ``[N, HV, V, K]``, and the order of
    the value heads, "tiled". q and k are normalised by an operator before it, as llama.cpp does.
    """

    name = "ggml"

    def __init__(self):
        package = importlib.util.find_spec("llama_cpp")
        if package is None:
            raise ImportError("llama-cpp-python")
        folder = Path(package.submodule_search_locations[0]) / "lib"
        libraries = []
        for name in ("ggml-base", "ggml-cpu"):
            path = min(folder.glob(f"*{name}.*"), default=folder / name)
            libraries.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        base, cpu = libraries
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.init = _function(base.ggml_init, pointer, _Pool)
        self.free = _function(base.ggml_free, None, pointer)
        self.tensor = _function(
            base.ggml_new_tensor_4d, pointer, pointer, ctypes.c_int, *[number] * 4
        )
        self.data = _function(base.ggml_get_data, pointer, pointer)
        self.l2_norm = _function(base.ggml_l2_norm, pointer, pointer, pointer, ctypes.c_float)
        self.rule = _function(base.ggml_gated_delta_net, pointer, *[pointer] * 7, number)
        self.graph = _function(base.ggml_new_graph, pointer, pointer)
        self.expand = _function(base.ggml_build_forward_expand, None, pointer, pointer)
        self.compute = _function(base.ggml_backend_graph_compute, ctypes.c_int, pointer, pointer)
        self.backend = _function(cpu.ggml_backend_cpu_init, pointer)()
        self.set_threads = _function(
            cpu.ggml_backend_cpu_set_n_threads, None, pointer, ctypes.c_int
        )

    def prepare(self, shape, inputs, threads):
        """Return a call."""
        groups = shape.H, shape.HV // shape.H
        x = {name: inputs[name] for name in ("q", "k", "v", "g", "beta")}
        for name in ("v", "g", "beta"):
            x[name] = _tiled(x[name], 2, groups)
        x["g"] = x["g"].reshape(*x["beta"].shape, -1)
        x["beta"] = x["beta"][..., None]
        x["state"] = _tiled(inputs["initial_state"], 1, groups).swapaxes(2, 3)
        outputs = x["v"].size + x["state"].size
        size = 4 * (sum(array.size for array in x.values()) + 2 * x["q"].size + outputs)
        pool = _Memory(self, size + 2**20)
        q, k, v, g, beta, state = (pool.tensor(array) for array in x.values())
        q, k = (self.l2_norm(pool.address, tensor, 1e-6) for tensor in (q, k))
        rule = self.rule(pool.address, q, k, v, g, beta, state, 1)
        graph = self.graph(pool.address)
        self.expand(graph, rule)
        self.set_threads(self.backend, threads)

        def call():
            if self.compute(self.backend, graph):
                raise RuntimeError("ggml: the graph was not computed")
            return pool, rule, x["v"].shape, x["state"].shape, groups

        return call

    def results(self, result):
        """Return output and states."""
        pool, rule, o_shape, state_shape, (H, r) = result
        sizes = [int(np.prod(shape)) for shape in (o_shape, state_shape)]
        packed = pool.numbers(rule, sum(sizes))
        o, state = packed[: sizes[0]].reshape(o_shape), packed[sizes[0] :].reshape(state_shape)
        return _tiled(o, 2, (r, H)), _tiled(state, 1, (r, H)).swapaxes(2, 3)


class _Memory:
    """Memory of a graph and its arrays, freed with this object."""

    def __init__(self, ggml, size):
        self.ggml, self.address = ggml, ggml.init(_Pool(size, None, False))

    def tensor(self, array):
        float32 = 0
        made = self.ggml.tensor(self.address, float32, *array.shape[::-1])
        self.numbers(made, array.size)[:] = array.reshape(-1)
        return made

    def numbers(self, tensor, size):
        pointer = ctypes.cast(self.ggml.data(tensor), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (size,))

    def __del__(self):
        self.ggml.free(self.address)


def _function(function, result, *arguments):
    function.restype, function.argtypes = result, arguments
    return function


def _tiled(x, axis, groups):
    """Reorder an axis of heads, ``groups[0]`` times ``groups[1]``, with the second one first."""
    parts = x.reshape(*x.shape[:axis], *groups, *x.shape[axis + 1 :])
    return np.ascontiguousarray(parts.swapaxes(axis, axis + 1)).reshape(x.shape)


class NbdeltaOnCuda(Nbdelta):
    """The public functions on torch tensors in device memory."""

    def __init__(self):
        self.torch = importlib.import_module("torch")

    def prepare(self, shape, inputs, threads):
        """Return a call."""
        tensors = {name: self.tensor(x) for name, x in inputs.items()}
        if shape.T > 1:
            return lambda: nbdelta.chunk_gated_delta_rule(**tensors, **OPTIONS)
        return lambda: nbdelta.fused_recurrent_gated_delta_rule(
            **tensors, **OPTIONS, inplace_final_state=True
        )

    def tensor(self, x):
        """Bring an array to the device."""
        if x.dtype.name == "bfloat16":
            return self.torch.from_numpy(x.view(np.uint16)).view(self.torch.bfloat16).cuda()
        return self.torch.from_numpy(x).cuda()

    def results(self, result):
        """Return output and states."""
        return tuple([x.float().cpu().numpy() for x in result])


class FlashLinearAttention(NbdeltaOnCuda):
    """flash-linear-attention's Triton kernels."""

    name = "fla"

    def __init__(self):
        super().__init__()
        gda = importlib.import_module("fla.ops.gated_delta_rule")
        kda = importlib.import_module("fla.ops.kda")
        self.functions = {
            ("gda", True): gda.chunk_gated_delta_rule,
            ("gda", False): gda.fused_recurrent_gated_delta_rule,
            ("kda", True): kda.chunk_kda,
            ("kda", False): kda.fused_recurrent_kda,
        }

    def prepare(self, shape, inputs, threads):
        """Return a call."""
        function = self.functions[shape.gate, shape.T > 1]
        if "HV" not in (function.__doc__ or ""):  # a version before grouped heads
            r = shape.HV // shape.H
            inputs = {**inputs, **{name: np.repeat(inputs[name], r, axis=2) for name in "qk"}}
        tensors = {name: self.tensor(x) for name, x in inputs.items()}
        return lambda: function(**tensors, **OPTIONS)
