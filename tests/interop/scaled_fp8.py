"""Scaled FP8 checkpoints as their own libraries write or read them, and what these make of them.

make FOLDER   a folder for each spelling, with plain.safetensors: the weights as its library dequantizes them, float32.

Prints the spellings as JSON.
"""
import json
import sys
from pathlib import Path

import comfy_kitchen
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

ROWS, COLS = 256, 384
NAME = "model.layers.0.mlp.up_proj"


def weight(rows=ROWS, cols=COLS):
    return torch.randn(rows, cols) * torch.exp(torch.randn(rows, 1))


def by_compressed_tensors(strategy, shape, block=None, cols=COLS):
    """Weights that the library compresses, with scales of largest weight / largest code."""
    w = weight(cols=cols)
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, block_structure=block)
    scheme = QuantizationScheme(targets=[NAME], weights=args)
    parts = FloatQuantizationCompressor.compress({"weight": w, "weight_scale": w.abs().max() / 448 * (0.5 + torch.rand(shape))}, scheme)
    plain = FloatQuantizationCompressor.decompress(parts, scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": "float-quantized",
              "config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    return {f"{NAME}.{part}": value for part, value in parts.items()}, plain, config


def fine_grained(scale_dtype=torch.float32):
    """DeepSeek's and transformers' blocks of 128 by 128."""
    codes, scales = weight().clamp(-400, 400).to(torch.float8_e4m3fn), (0.01 + torch.rand(2, 3)).to(scale_dtype)
    plain = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    return {f"{NAME}.weight": codes, f"{NAME}.weight_scale_inv": scales}, plain, config


def comfy(dtype, scale_name, marker):
    """ComfyUI's one scale for a weight, in both of its spellings."""
    codes, scale = weight().clamp(-400, 400).to(dtype), torch.tensor(0.037)
    plain = comfy_kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    return {f"{NAME}.weight": codes, f"{NAME}.{scale_name}": scale, **marker}, plain, None


def experts():
    """FBGEMM's rows of experts in one tensor, as transformers' Llama 4 has them: codes times scales."""
    codes, scales = torch.randn(3, 64, 48).to(torch.float8_e4m3fn), 0.01 + torch.rand(3, 1, 48)
    name = "model.layers.0.experts.gate_up_proj"
    return {name: codes, f"{name}_scale": scales}, {name: codes.float() * scales}, {"quant_method": "fbgemm_fp8"}


MARKER = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
SPELLINGS = {
    "compressed-tensors, tensor": lambda: by_compressed_tensors("tensor", (1,)),
    "compressed-tensors, channel": lambda: by_compressed_tensors("channel", (ROWS, 1)),
    "compressed-tensors, block": lambda: by_compressed_tensors("block", (2, 3), [128, 128]),
    "compressed-tensors, blocks cut off": lambda: by_compressed_tensors("block", (2, 4), [128, 128], cols=450),
    "weight_scale_inv": fine_grained,
    "weight_scale_inv in bfloat16": lambda: fine_grained(torch.bfloat16),
    "scale_weight": lambda: comfy(torch.float8_e4m3fn, "scale_weight", MARKER),
    "scale_weight of E5M2": lambda: comfy(torch.float8_e5m2, "scale_weight", MARKER),
    "comfy_quant": lambda: comfy(torch.float8_e4m3fn, "weight_scale", {
        f"{NAME}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}),
    "experts in one tensor": experts,
}

if __name__ == "__main__":
    for seed, (name, make) in enumerate(SPELLINGS.items()):
        torch.manual_seed(seed)
        tensors, plain, config = make()
        own = Path(sys.argv[2]) / name
        own.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, own / "model.safetensors")
        (own / "config.json").write_text(json.dumps({"model_type": "x"} | ({"quantization_config": config} if config else {})))
        plain = plain if isinstance(plain, dict) else {f"{NAME}.weight": plain}
        save_file({key: value.float().contiguous() for key, value in plain.items()}, own / "plain.safetensors")
    print(json.dumps(list(SPELLINGS)))
