#!/usr/bin/env python3
"""Writes one small random checkpoint a folder with Hugging Face's own DiffLlama, and the logits it gives for 40 tokens.

usage: make_checkpoints.py        needs transformers and torch (Debian sid: python3-transformers, python3-torch)

Weights are stored as float32 and evaluated in float64, but for what transformers does in float32 whatever it is told:
the angles of the rotary embedding and the softmax.
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

FOLDER = pathlib.Path(__file__).parent
SHAPE = dict(vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=64)

CASES = {
    "odd_kv_heads": dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    "one_kv_head": dict(num_attention_heads=4, num_key_value_heads=1),
    "bias_tied_head": dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True),
    "wide_heads": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=12, rms_norm_eps=1e-3),
    "rope_linear": dict(num_attention_heads=4, num_key_value_heads=2,
                        rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "rope_dynamic": dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
                         rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "rope_llama3": dict(num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0,
                        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
}


def main():
    for seed, (name, changes) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**{**SHAPE, **changes}, attn_implementation="eager")).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, SHAPE["vocab_size"], (1, 40))
        with torch.no_grad():
            logits = model.double()(tokens, use_cache=False).logits[0]
        save_file({"tokens": tokens[0].contiguous(), "logits": logits.contiguous()},
                  FOLDER / name / "expected.safetensors")


if __name__ == "__main__":
    main()
