"""Every transformers model with a gated delta rule, in a size for tests."""

import importlib
import importlib.util

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
_INDEXED = ["linear_attention", "indexed_attention", "linear_attention"]
# one key head serves two value heads, and K != V
_GDA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": _LAYERS,
}
_KDA = {
    "linear_num_heads": 3,
    "linear_head_dim": 24,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "layer_types": _LAYERS,
}
_GLM = {
    **_KDA,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 0,
    "n_routed_experts": 4,
    "index_topk": 32,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_kpool": 4,
    "layer_types": _INDEXED,
    "indexer_types": ["full", "full", "full"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_GLM.pop("num_local_experts")
_QSA = {
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "layer_types": _INDEXED,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 48,
    "projection_intermediate_size": 32,
}

# module -> configuration class, model class, arguments of the (text) configuration
_MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _GDA | _MOE),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _GDA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _GDA | _MOE),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        _GDA | _MOE | _QSA,
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", _GDA),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", _KDA),
    "glm5_next": ("Glm5NextConfig", "Glm5NextForConditionalGeneration", _GLM),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", _KDA | {"head_dim": 24}),
}


def installed():
    """Names of the models that the installed transformers has."""
    if importlib.util.find_spec("transformers") is None:
        return []
    return [name for name in _MODELS if importlib.util.find_spec(f"transformers.models.{name}")]


def modeling(name):
    """The module that holds the model."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def build(name, seed=0):
    """A model with random weights of a size that lets the linear attention show in the logits."""
    import torch

    config_name, model_name, arguments = _MODELS[name]
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    arguments = _COMMON | arguments
    if name == "glm5_next":
        arguments = {"text_config": arguments, "vision_config": _VISION}
    config = getattr(configuration, config_name)(**arguments)
    torch.manual_seed(seed)
    model = getattr(modeling(name), model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model
