"""transformers' models of two small layers, with PEFT's adapters that do something."""

import warnings

import peft
import torch
import transformers
from torch import nn

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "granite": transformers.GraniteConfig,
    "olmo2": transformers.Olmo2Config,
}


MIXTURES = {
    "glm4_moe": transformers.Glm4MoeConfig,
    "gpt_oss": transformers.GptOssConfig,
    "mixtral": transformers.MixtralConfig,
    "olmoe": transformers.OlmoeConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
# What they call the same, each something else.
OF_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "eos_token_id": None,
}


_DERIVED = ("granite", "head_dim")  # which its configuration does not take


def base(family="llama", **config):
    given = {name: value for name, value in SMALL.items() if (family, name) != _DERIVED}
    options = {}
    if family in MIXTURES:
        given |= OF_EXPERTS
        options = {"experts_implementation": "eager"}  # the others take no fp64
    config = (FAMILIES | MIXTURES)[family](**given | config, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_config(config, **options)


# In fp64: the depth of a model enlarges what another order of a sum rounds otherwise. In fp32 one
# seed in 90 was more than 1e-4 away under MKL's generic kernels (AMD's, or MKL_CBWR=COMPATIBLE).
def adapted(model, targets, dtype=torch.float64, std=1.0, **config):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def outputs(model, ids, **kwargs):
    """The logits, and every gradient of the loss, by name."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **kwargs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | grads


def assert_same(got, expected, rtol=1e-4, atol=1e-5):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=name, rtol=rtol, atol=atol)
