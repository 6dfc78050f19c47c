"""Small random image models, made and read back by diffusers.

make FOLDER         a folder for each family, with bfloat16 weights
check FOLDER LIST   LIST: JSON objects of family, gguf (a file of it) and plain (its weights as float32 safetensors)

diffusers and gguf must find in the file the weights of `plain`, bit for bit. Prints JSON.
"""
import inspect
import json
import sys
from pathlib import Path

import diffusers
import gguf
import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders import single_file_model, single_file_utils
from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, GGUFParameter, dequantize_functions
from safetensors.torch import load_file

HEADS = dict(attention_head_dim=64, num_attention_heads=4)
JOINT = dict(num_layers=1, joint_attention_dim=256, **HEADS)
FLUX = dict(patch_size=1, in_channels=16, num_single_layers=1, axes_dims_rope=(16, 24, 24), **JOINT)
SQUARES = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=256,
               caption_projection_dim=256, **HEADS)

FAMILIES = {
    "flux": ("FluxTransformer2DModel", dict(FLUX, pooled_projection_dim=256, guidance_embeds=True)),
    "chroma": ("ChromaTransformer2DModel", dict(FLUX, approximator_num_channels=64, approximator_hidden_dim=256,
                                                approximator_layers=1)),
    "flux2": ("Flux2Transformer2DModel", dict(in_channels=16, num_single_layers=1, timestep_guidance_channels=256,
                                              axes_dims_rope=(16, 16, 16, 16), **JOINT)),
    "sd3": ("SD3Transformer2DModel", dict(SQUARES, num_layers=2, pooled_projection_dim=256, pos_embed_max_size=8,
                                          dual_attention_layers=(0,), qk_norm="rms_norm")),
    "qwen_image": ("QwenImageTransformer2DModel", dict(in_channels=16, out_channels=4, axes_dims_rope=(16, 24, 24), **JOINT)),
    "wan": ("WanTransformer3DModel", dict(in_channels=4, out_channels=4, text_dim=256, ffn_dim=512, num_layers=1,
                                          cross_attn_norm=True, image_dim=256, added_kv_proj_dim=256, **HEADS)),
    "lumina2": ("Lumina2Transformer2DModel", dict(sample_size=8, in_channels=4, hidden_size=256, num_layers=1,
                                                  num_attention_heads=4, num_kv_heads=2, multiple_of=256,
                                                  cap_feat_dim=256, axes_dim_rope=(16, 24, 24), axes_lens=(30, 16, 16))),
    "z_image": ("ZImageTransformer2DModel", dict(in_channels=4, dim=256, n_layers=1, n_refiner_layers=1, n_heads=4,
                                                 n_kv_heads=4, cap_feat_dim=256, axes_dims=[16, 24, 24],
                                                 axes_lens=[64, 64, 64])),
    "ltxv": ("LTXVideoTransformer3DModel", dict(in_channels=8, out_channels=8, cross_attention_dim=256, num_layers=1,
                                                caption_channels=256, **HEADS)),
    "hyvid": ("HunyuanVideoTransformer3DModel", dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
                                                     num_refiner_layers=1, patch_size=1, text_embed_dim=256,
                                                     pooled_projection_dim=256, rope_axes_dim=(16, 24, 24), **HEADS)),
    "aura": ("AuraFlowTransformer2DModel", dict(SQUARES, num_mmdit_layers=1, num_single_dit_layers=1,
                                                pos_embed_max_size=64)),
    "hidream": ("HiDreamImageTransformer2DModel", dict(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, caption_channels=[256, 256],
        text_emb_dim=256, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(32, 16, 16),
        max_resolution=(16, 16), llama_layers=(0, 1), **HEADS)),
    "cosmos": ("CosmosTransformer3DModel", dict(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=256,
                                                adaln_lora_dim=256, max_size=(4, 16, 16), patch_size=(1, 2, 2),
                                                extra_pos_embed_type=None, **HEADS)),
}

# Widths of the published models that diffusers' converters have as constants.
WIDTHS = {
    "FluxTransformer2DModel": {"inner_dim = 3072": "inner_dim = 256"},
    "ChromaTransformer2DModel": {"inner_dim = 3072": "inner_dim = 256"},
    "HunyuanVideoTransformer3DModel": {"hidden_size = 3072": "hidden_size = 256"},
    "Lumina2Transformer2DModel": {"q_dim = 2304": "q_dim = 256", "k_dim = v_dim = 768": "k_dim = v_dim = 128"},
}

# Tensors by which ComfyUI-GGUF (tools/convert.py) and stable-diffusion.cpp (model_loader.cpp) tell a family.
TELLING = {
    "flux": ["double_blocks.0.img_attn.proj.weight"],
    "chroma": ["double_blocks.0.img_attn.proj.weight", "distilled_guidance_layer.in_proj.weight"],
    "flux2": ["double_blocks.0.img_attn.proj.weight", "double_stream_modulation_img.lin.weight"],
    "sd3": ["joint_blocks.0.x_block.attn.qkv.weight"],
    "qwen_image": ["transformer_blocks.0.img_mod.1.weight"],
    "wan": ["blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation",
            "blocks.0.cross_attn.norm_k.weight", "patch_embedding.weight"],
    "lumina2": ["cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"],
    "z_image": ["cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight", "cap_embedder.0.weight"],
    "ltxv": ["adaln_single.emb.timestep_embedder.linear_2.weight", "caption_projection.linear_2.weight"],
    "hyvid": ["double_blocks.0.img_attn_proj.weight", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight"],
    "aura": ["double_layers.0.modX.1.weight"],
    "hidream": ["caption_projection.0.linear.weight", "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight"],
    "cosmos": ["blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"],
}


def make(folder: Path) -> None:
    torch.manual_seed(1)
    for family, (name, config) in FAMILIES.items():
        model = getattr(diffusers, name)(**config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.to(torch.bfloat16).save_pretrained(folder / family)


def shrink_converters() -> None:
    for name, changes in WIDTHS.items():
        entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]
        source = inspect.getsource(entry["checkpoint_mapping_fn"])
        for old, new in changes.items():
            assert old in source, (name, old)
            source = source.replace(old, new)
        names = dict(single_file_utils.__dict__)
        exec(source, names)
        entry["checkpoint_mapping_fn"] = names[entry["checkpoint_mapping_fn"].__name__]


def value(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values, by diffusers' own functions in float32 and by gguf's; both must agree."""
    if not isinstance(parameter, GGUFParameter):
        return parameter.detach().float()
    kind = gguf.GGMLQuantizationType(int(parameter.quant_type))
    codes = parameter.as_tensor().contiguous().view(torch.uint8)
    by_gguf = torch.from_numpy(gguf.quants.dequantize(codes.numpy(), kind))
    block, size = GGML_QUANT_SIZES[kind]
    shape = (*codes.shape[:-1], codes.shape[-1] // size * block)
    values = dequantize_functions[kind](codes.reshape(-1, size), block, size, torch.float32).reshape(shape)
    assert torch.equal(values.view(torch.int32), by_gguf.reshape(shape).view(torch.int32)), kind
    return values


def check(folder: Path, family: str, file: str, plain: str) -> dict:
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    missing = [name for name in TELLING[family] if name not in names]
    assert not missing, missing
    name, _ = FAMILIES[family]
    model = getattr(diffusers, name).from_single_file(
        file, config=str(folder / family), torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = load_file(plain)
    wrong = []
    for key, expected in wanted.items():
        found = value(own[key])
        # Q3_K has sub-scales of either sign, and its own zeros have that sign: both zeros are one.
        zero = 0.0 if getattr(own[key], "quant_type", None) == gguf.GGMLQuantizationType.Q3_K else -0.0
        bits = lambda tensor: (tensor + zero).contiguous().view(torch.int32)
        if found.shape != expected.shape or not torch.equal(bits(found), bits(expected.float())):
            wrong.append(key)
    architecture = reader.get_field("general.architecture")
    return {
        "architecture": str(bytes(architecture.parts[architecture.data[0]]), "utf-8"),
        "tensors": len(wanted),
        "wrong": wrong,
        "types": sorted({tensor.tensor_type.name for tensor in reader.tensors}),
    }


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    diffusers.utils.logging.set_verbosity_error()
    if command == "make":
        make(Path(folder))
        print(json.dumps(sorted(FAMILIES)))
    else:
        shrink_converters()
        tasks = json.loads(Path(rest[0]).read_text())
        print(json.dumps({task["family"]: check(Path(folder), task["family"], task["gguf"], task["plain"])
                          for task in tasks}))
