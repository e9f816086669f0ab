#!/usr/bin/env python3
"""Hugging Face's DiffLlama beside ours, on random checkpoints of hidden 2,048 and 4 layers, float32 and bfloat16.

usage: transformers_diffllama.py make FOLDER            the checkpoints and a prompt of 512 tokens; about 1.9 GB
       transformers_diffllama.py time FOLDER THREADS    tokens/s of prefill and decode, and FOLDER/tokens_*.txt
       diffattn_peer_diffllama FOLDER                   ours (diffllama.cpp, a target of its own): the same, and how
                                                        many tokens are the same

Needs torch and transformers: Debian sid's python3-torch and python3-transformers. Set OMP_NUM_THREADS and
OPENBLAS_NUM_THREADS to THREADS. Run it and ours in turns on an idle machine.
"""
import pathlib
import sys
import time

import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

PROMPT, DECODED, ROUNDS = 512, 12, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(folder):
    torch.manual_seed(0)
    config = DiffLlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4,
                             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
                             tie_word_embeddings=True)
    model = DiffLlamaForCausalLM(config).eval()
    for name, dtype in DTYPES.items():
        model.to(dtype).save_pretrained(folder / name)
    prompt = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1))
    write_tokens(folder / "prompt.txt", prompt.tolist())


def write_tokens(path, tokens):
    path.write_text(" ".join(map(str, tokens)) + "\n")


def run(folder, threads):
    torch.set_num_threads(threads)
    prompt = torch.tensor([[int(token) for token in (folder / "prompt.txt").read_text().split()]])
    for name, dtype in DTYPES.items():
        model = DiffLlamaForCausalLM.from_pretrained(folder / name, dtype=dtype, attn_implementation="sdpa").eval()
        prefill, decode = [], []
        with torch.no_grad():
            for _ in range(ROUNDS):
                start = time.perf_counter()
                out = model(prompt, use_cache=True, logits_to_keep=1)
                prefill.append(time.perf_counter() - start)
                cache, tokens = out.past_key_values, [out.logits[:, -1:].argmax(-1)]
                for _ in range(DECODED):
                    start = time.perf_counter()
                    out = model(tokens[-1], past_key_values=cache, use_cache=True)
                    decode.append(time.perf_counter() - start)
                    tokens.append(out.logits[:, -1:].argmax(-1))
        write_tokens(folder / f"tokens_{name}.txt", [token.item() for token in tokens])
        print(f"{name}, {threads} thread(s): prefill of {PROMPT} {PROMPT / min(prefill):.1f} tokens/s, "
              f"decode {1 / min(decode):.2f} tokens/s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "make":
        make(pathlib.Path(sys.argv[2]))
    elif len(sys.argv) == 4 and sys.argv[1] == "time":
        run(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(__doc__)
