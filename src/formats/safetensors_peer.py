"""The package's side of safetensors_test.cc: reads IN as it was written there, and writes OUT for it.

Both hold tensor number i of each type as arange(6).reshape(2, 3) + i, an empty and a scalar tensor.
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u64": torch.uint64, "u32": torch.uint32, "u16": torch.uint16, "u8": torch.uint8, "bool": torch.bool,
}


def expected(index, dtype):
    values = torch.arange(6).reshape(2, 3) + index
    return (values % 2).to(dtype) if dtype == torch.bool else values.to(dtype)


tensors = {name: expected(i, dtype) for i, (name, dtype) in enumerate(TYPES.items())}
tensors["empty"] = torch.zeros(0, 4)
tensors["scalar"] = torch.tensor(2.5)

with safe_open(sys.argv[1], framework="pt") as file:
    assert set(file.keys()) == set(tensors), file.keys()
    assert file.metadata() == {"format": "pt", "note": 'quotes " and ünïcode'}, file.metadata()
    for name, tensor in tensors.items():
        read = file.get_tensor(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        assert torch.equal(read, tensor), name

save_file(tensors, sys.argv[2], metadata={"format": "pt", "note": 'quotes " and ünïcode'})
