"""Opens exported folders with the programs that they are for, and saves the weights as those see them.

Arguments: triples of a kind, a folder and a file for the weights in float32. Prints how many tensors each file has.
"""
import importlib.machinery
import json
import sys
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file

# AutoRound imports it for calibration alone.
datasets = MagicMock(__version__="4.0.0")
datasets.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
sys.modules["datasets"] = datasets


def of_quant_linear(module):
    """The weights of a layer that only multiplies: what it makes of the identity."""
    module.scales = module.scales.float()  # else it multiplies in half precision
    bias, module.bias = module.bias, None
    weights = module(torch.eye(module.infeatures)).T
    module.bias = bias
    return weights


def with_transformers(folder):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = json.load(open(f"{folder}/config.json"))["quantization_config"]
    more = {}
    # Packed integer zero points are read by the path that unpacks everything at once alone.
    if how["quant_method"] == "compressed-tensors" and not how["config_groups"]["group_0"]["weights"]["symmetric"]:
        more = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.no_grad():
        model(torch.arange(8)[None])  # packed weights are decompressed by the first pass
        weights = {}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                weights[f"{name}.weight"] = of_quant_linear(module)
            elif isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                weights[f"{name}.weight"] = module.weight
    return weights


def with_diffusers(folder):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16)
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    return {f"{name}.weight": of_quant_linear(module) for name, module in modules.items()}


def with_mlx(folder):
    import mlx.core as mx
    import numpy as np

    tensors = mx.load(f"{folder}/model.safetensors")
    quantization = json.load(open(f"{folder}/config.json"))["quantization"]
    weights = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" in tensors:
            how = {**quantization, **quantization.get(module, {})}
            scales, biases = (tensors[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, how["group_size"], how["bits"], how["mode"])
        weights[name] = torch.from_numpy(np.array(value.astype(mx.float32)))
    return weights


def with_gptq(folder):
    """GPTQ v2 stores zero points as they are, as this layer of AutoRound reads them."""
    from auto_round_extension.torch.qlinear_torch import QuantLinear

    tensors = load_file(f"{folder}/model.safetensors")
    config = json.load(open(f"{folder}/config.json"))["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2" and not config["desc_act"]
    weights = {}
    for name, value in tensors.items():
        module = name.removesuffix(".qweight")
        if module != name:
            cols, rows = tensors[f"{module}.g_idx"].numel(), value.shape[1]
            group = cols // tensors[f"{module}.qzeros"].shape[0]
            assert torch.equal(tensors[f"{module}.g_idx"], (torch.arange(cols) // group).int())
            layer = QuantLinear(value.shape[0] * 32 // cols, group, cols, rows, bias=False)
            layer.qweight, layer.qzeros = value, tensors[f"{module}.qzeros"]
            layer.scales = tensors[f"{module}.scales"]
            weights[f"{module}.weight"] = of_quant_linear(layer)
        elif not name.endswith((".qzeros", ".scales", ".g_idx")):
            weights[name] = value.float()
    return weights


def with_comfy(folder):
    from comfy_kitchen.tensor import awq_w4a16, int8

    tensors = load_file(f"{folder}/model.safetensors")
    weights = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if f"{module}.comfy_quant" in tensors and name.endswith(".weight"):
            how = json.loads(bytes(tensors[f"{module}.comfy_quant"].tolist()))
            scale = tensors[f"{name}_scale"]
            if how["format"] == "int8_tensorwise":
                rotation = {key: how[key] for key in ("convrot", "convrot_groupsize") if key in how}
                params = int8.TensorWiseINT8Layout.Params(
                    scale=scale, orig_dtype=torch.float32, orig_shape=tuple(value.shape), **rotation)
                value = int8.TensorWiseINT8Layout.dequantize(value, params)
            else:
                layout = awq_w4a16.TensorCoreAWQW4A16Layout
                params = layout.Params(
                    scale=scale, zeros=tensors[f"{name}_zero"], orig_dtype=torch.float32,
                    orig_shape=(value.shape[0], value.shape[1] * 2), group_size=how["group_size"])
                value = layout.dequantize(value, params)
        elif name.endswith((".comfy_quant", "_scale", "_zero")):
            continue
        weights[name] = value.float()
    return weights


def save(folder, tensors, config):
    import os

    os.makedirs(folder)
    save_file(tensors, f"{folder}/model.safetensors")
    json.dump(config, open(f"{folder}/config.json", "w"))


def made_by_mlx(folder):
    """A folder of MLX's own quantizer, in bfloat16, with every number of bits."""
    import mlx.core as mx
    import numpy as np

    mx.random.seed(1)
    tensors, weights, quantization = {}, {}, {"group_size": 64, "bits": 4, "mode": "affine"}
    for bits in (2, 3, 4, 5, 6, 8):
        name, group = f"model.layers.{bits}.mlp.up_proj", 32 if bits == 5 else 64
        if bits != 4:
            quantization[name] = {"group_size": group, "bits": bits}
        codes, scales, biases = mx.quantize(mx.random.normal((7, 192)).astype(mx.bfloat16), group, bits)
        parts = {"weight": codes, "scales": scales, "biases": biases}
        tensors.update({f"{name}.{part}": value for part, value in parts.items()})
        plain = mx.dequantize(codes, *(part.astype(mx.float32) for part in (scales, biases)), group, bits)
        weights[f"{name}.weight"] = torch.from_numpy(np.array(plain))
    save(folder, {"placeholder": torch.zeros(1)}, {"model_type": "x", "quantization": quantization})
    mx.save_safetensors(f"{folder}/model.safetensors", tensors)
    return weights


def made_by_compressed_tensors(folder):
    """A folder of compressed-tensors' own compressor."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(1)
    tensors, weights, groups = {}, {}, {}
    for bits in (2, 3, 4, 5, 8):
        name, symmetric = f"model.layers.{bits}.mlp.up_proj", bits != 4
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
        scheme = QuantizationScheme(targets=[name], weights=args)
        state = {"weight": torch.randn(16, 96), "weight_scale": torch.rand(16, 3) / 2 ** bits + 0.1}
        least = -(2 ** (bits - 1))
        if not symmetric:
            state["weight_zero_point"] = torch.randint(least, -least, (16, 3), dtype=torch.int8)
        packed = Compressor.compress(state, scheme)
        tensors.update({f"{name}.{part}": value.contiguous() for part, value in packed.items()})
        weights[f"{name}.weight"] = Compressor.decompress(packed, scheme)["weight"]
        groups[f"group_{bits}"] = json.loads(scheme.model_dump_json())
    packing = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    save(folder, tensors, {"model_type": "x", "quantization_config": packing})
    return weights


READERS = {
    "mlx's own": made_by_mlx,
    "compressed-tensors' own": made_by_compressed_tensors,
    "transformers": with_transformers,
    "diffusers": with_diffusers,
    "mlx": with_mlx,
    "gptq": with_gptq,
    "comfy": with_comfy,
}
counts = []
for kind, folder, output in zip(*[iter(sys.argv[1:])] * 3):
    weights = READERS[kind](folder)
    save_file({name: value.detach().float().contiguous().clone() for name, value in weights.items()}, output)
    counts.append(len(weights))
print(json.dumps(counts))
