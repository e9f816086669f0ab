#!/usr/bin/env python3
"""Writes one small random checkpoint a folder with Hugging Face's own DiffLlama, and the logits it gives for 40 tokens.

usage: make_checkpoints.py [NAME...]        all of them, or those; needs transformers 5 and torch
                                            (Debian sid: python3-transformers, python3-torch)

Weights are stored as float32 and evaluated in float64, but for what transformers does in float32 whatever it is told:
the angles of the rotary embedding and the softmax.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

FOLDER = pathlib.Path(__file__).parent
SHAPE = dict(vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=64)
SMALL = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8)

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
    "rope_yarn": dict(SMALL, rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                           "original_max_position_embeddings": 16}),
    "rope_yarn_all_fields": dict(SMALL, original_max_position_embeddings=32,
                                 rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 2.0,
                                               "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
                                               "original_max_position_embeddings": 16}),
    "rope_yarn_attention_factor": dict(SMALL, rope_scaling={"type": "yarn", "factor": None, "attention_factor": 1.5,
                                                            "original_max_position_embeddings": 16}),
    "rope_longrope_short": dict(SMALL, rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0],
                                                     "long_factor": [2.0, 3.0, 5.0, 8.0],
                                                     "original_max_position_embeddings": 40}),
    "rope_longrope_long": dict(SMALL, rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0],
                                                    "long_factor": [2.0, 3.0, 5.0, 8.0], "factor": 3.0,
                                                    "original_max_position_embeddings": 39}),
    "rope_proportional": dict(SMALL, partial_rotary_factor=0.5,
                              rope_scaling={"rope_type": "proportional", "factor": 2.0}),
    "rope_both_spellings": dict(SMALL),
    "rope_empty_scaling": dict(SMALL),
    "rope_llama3_default_length": dict(SMALL, rope_scaling={"rope_type": "llama3", "factor": 0.5,
                                                            "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
    "no_type_no_head_dim": dict(SMALL, hidden_size=18, head_dim=None),
    "tied_head_alone": dict(SMALL, tie_word_embeddings=True),
    "tied_but_different": dict(SMALL, tie_word_embeddings=True),
    "base_model_names": dict(SMALL),
    "base_model_tied_head_alone": dict(SMALL, tie_word_embeddings=True),
    "further_tensors": dict(SMALL),
}


def change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}, indent=2) + "\n")


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def base_names(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def head_of_its_own(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def add_others(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    tensors["model.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    tensors["model.layers.0.self_attn.bias"] = torch.ones(2, 2, dtype=torch.bool)
    tensors["score.weight"] = torch.ones(2, 16)
    for name, dtype in {"a": torch.uint8, "b": torch.int16, "c": torch.float8_e4m3fn, "d": torch.uint16}.items():
        tensors["model." + name] = torch.ones(3).to(dtype)


# What happens to a checkpoint after it was saved and before it is loaded again and evaluated.
EDITS = {
    "rope_both_spellings": lambda folder: change_config(
        folder, rope_scaling={"rope_type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
    "rope_empty_scaling": lambda folder: change_config(
        folder, rope_scaling={}, rope_theta=99, rope_parameters={"type": "linear", "factor": 2}),
    "no_type_no_head_dim": lambda folder: change_config(
        folder, model_type="absent", head_dim=None, rope_parameters=None, eos_token_id="absent"),
    "tied_head_alone": lambda folder: change_tensors(folder, head_alone),
    "tied_but_different": lambda folder: change_tensors(folder, head_of_its_own),
    "base_model_names": lambda folder: change_tensors(folder, base_names),
    "base_model_tied_head_alone": lambda folder: change_tensors(folder, lambda t: (head_alone(t), base_names(t))),
    "further_tensors": lambda folder: change_tensors(folder, add_others),
}
GENERATION = {"further_tensors": {"eos_token_id": [5, 6]}, "tied_head_alone": {"eos_token_id": 7},
              "base_model_names": {"do_sample": True}}


def main():
    for seed, (name, changes) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**{**SHAPE, **changes}, attn_implementation="eager")).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too
                parameter.add_(torch.randn_like(parameter) * (0.3 if changes.get("num_hidden_layers") else 0.1))
        folder = FOLDER / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if name in GENERATION:
            (folder / "generation_config.json").write_text(json.dumps(GENERATION[name]) + "\n")
        EDITS.get(name, lambda folder: None)(folder)
        model = DiffLlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        tokens = torch.randint(0, SHAPE["vocab_size"], (1, 40))
        with torch.no_grad():
            logits = model.double()(tokens, use_cache=False).logits[0]
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        save_file({"tokens": tokens[0].contiguous(), "logits": logits.contiguous(),
                   "eos_token_ids": torch.tensor(eos, dtype=torch.int64)}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
