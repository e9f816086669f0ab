#!/usr/bin/env python3
"""Writes the parameters of a PyTorch attention layer to a safetensors file, under the names that diffattn reads.

In a program:   export_layer(module, "layer.safetensors")
As a command:   makes an nn.MultiheadAttention, and stores with it an input and its outputs, to compare with.

Needs PyTorch; the file is written without further packages.
"""

import argparse
import json
import struct


def parameters_of(module):
    """{our name: tensor} of an nn.MultiheadAttention, or of a module whose parameters have our names already."""
    state = dict(module.state_dict())
    refused = [name for name in ("bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight") if name in state]
    if refused or getattr(module, "add_zero_attn", False):
        raise ValueError(f"add_bias_kv, add_zero_attn, kdim and vdim have no counterpart: {', '.join(refused) or 'add_zero_attn'}")
    for kind in ("weight", "bias"):
        packed = state.pop(f"in_proj_{kind}", None)
        if packed is not None:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), packed.chunk(3)):
                state[f"{name}.{kind}"] = part
    return state


def write_safetensors(tensors, path):
    """The format: the length of a header, the header in JSON, the values. float32, little-endian."""
    header, values, end = {}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu().contiguous()
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        values.append(struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist()))
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(values))


def export_layer(module, path, prefix="weight.", **others):
    """The parameters of `module` behind `prefix`, and tensors beside them."""
    write_safetensors({prefix + name: tensor for name, tensor in parameters_of(module).items()} | others, path)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("path")
    options.add_argument("--embed-dim", type=int, default=16)
    options.add_argument("--num-heads", type=int, default=4)
    options.add_argument("--tokens", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    import torch

    torch.manual_seed(chosen.seed)
    layer = torch.nn.MultiheadAttention(chosen.embed_dim, chosen.num_heads, batch_first=True)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):  # which PyTorch starts with 0
        torch.nn.init.normal_(bias)
    x = torch.randn(chosen.tokens, chosen.embed_dim)
    memory = torch.randn(chosen.tokens + 3, chosen.embed_dim)
    hidden = torch.ones(chosen.tokens, chosen.tokens, dtype=torch.bool).triu(1)
    with torch.no_grad():
        outputs = {
            "y": layer(x, x, x)[0],
            "y_causal": layer(x, x, x, attn_mask=hidden)[0],
            "y_cross": layer(x, memory, memory)[0],
        }
    export_layer(layer, chosen.path, x=x, memory=memory, **outputs)


if __name__ == "__main__":
    main()
