#!/usr/bin/env python3
"""The blocks of `python` in our pages run: check_python.py, from the top of the repository.

PyTorch is not needed: a model that stands in for one has a layer with the packed projection of nn.MultiheadAttention.
What the block writes must then be what diffattn reads: names, shapes and values.
"""

import json
import os
import pathlib
import re
import struct
import sys
import tempfile
import types


class Tensor:
    """As much of a tensor as the script asks for: rows of numbers, or numbers."""

    def __init__(self, values):
        self.values = values
        self.shape = (len(values), len(values[0])) if isinstance(values[0], list) else (len(values),)

    def itself(self):
        return self

    detach = float = cpu = contiguous = itself

    def numel(self):
        return len(self.flatten().tolist())

    def flatten(self):
        return Tensor([x for row in self.values for x in row]) if len(self.shape) == 2 else self

    def tolist(self):
        return self.values

    def chunk(self, parts):
        size = len(self.values) // parts
        return [Tensor(self.values[i * size:(i + 1) * size]) for i in range(parts)]


class Layer:
    def state_dict(self):
        return {"in_proj_weight": Tensor([[10.0 * i, 10.0 * i + 1] for i in range(6)]),
                "in_proj_bias": Tensor([float(i) for i in range(6)]),
                "out_proj.weight": Tensor([[1.0, 2.0], [3.0, 4.0]]), "out_proj.bias": Tensor([5.0, 6.0])}


EXPECTED = {"weight.q_proj.weight": [0, 1, 10, 11], "weight.k_proj.weight": [20, 21, 30, 31],
            "weight.v_proj.weight": [40, 41, 50, 51], "weight.q_proj.bias": [0, 1], "weight.k_proj.bias": [2, 3],
            "weight.v_proj.bias": [4, 5], "weight.out_proj.weight": [1, 2, 3, 4], "weight.out_proj.bias": [5, 6]}


def tensors_of(path):
    """{name: (shape, values)} of a safetensors file of float32."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    body = data[8 + length:]
    found = {}
    for name, info in json.loads(data[8:8 + length]).items():
        begin, end = info["data_offsets"]
        found[name] = (info["shape"], list(struct.unpack(f"<{(end - begin) // 4}f", body[begin:end])))
    return found


def main():
    sys.dont_write_bytecode = True
    root = pathlib.Path.cwd()
    sys.path.insert(0, str(root / "examples/from_pytorch"))
    blocks = 0
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            blocks += 1
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                exec(compile(block, str(page), "exec"),
                     {"model": types.SimpleNamespace(layers=[types.SimpleNamespace(attention=Layer())])})
                found = tensors_of(pathlib.Path("layer.safetensors"))
                os.chdir(root)
            for name, (shape, values) in found.items():
                assert values == EXPECTED.get(name), f"{page.name}: {name} is {values}"
                assert shape == ([2] if name.endswith("bias") else [2, 2]), f"{page.name}: {name} has shape {shape}"
            assert set(found) == set(EXPECTED), f"{page.name}: writes {sorted(found)}"
    assert blocks > 0, "no page has a block of python"
    print(f"{blocks} blocks")


if __name__ == "__main__":
    main()
