"""How much the outputs of small random models of diffusers depend on each rule's tensors.

make FOLDER             a folder for each family, as diffusers saves it
measure FOLDER RULES    RULES: JSON, {family: {rule: [names of weights]}}. For each rule its weights alone are rounded
                        (groups of 64, least to largest weight of a group) and the model runs.

Prints JSON: {family: {rule: {weights: share, bits: error}}}, the error as a share of the output's power, by bits 2, 3,
4 and 8. Weights are those of the classes' own initialization, but that no tensor is zero; inputs are normal numbers.
"""
import json
import sys
from pathlib import Path

import diffusers
import torch

BATCH, TEXT, IMAGE = 4, 12, 16
HEADS = dict(attention_head_dim=32, num_attention_heads=4)
JOINT = dict(num_layers=2, joint_attention_dim=64, **HEADS)
SQUARE = dict(sample_size=8, patch_size=2, in_channels=4, **HEADS)


def normal(*shape):
    return torch.randn(*shape)


def flow():
    """Times, and what models of sequences of patches read."""
    return dict(timestep=torch.tensor([0.9, 0.6, 0.3, 0.1]), img_ids=torch.zeros(IMAGE, 3), txt_ids=torch.zeros(TEXT, 3),
                guidance=torch.ones(BATCH), hidden_states=normal(BATCH, IMAGE, 16),
                encoder_hidden_states=normal(BATCH, TEXT, 64))


STEPS = torch.tensor([900, 600, 300, 100])
FAMILIES = {
    "flux": ("FluxTransformer2DModel", dict(
        patch_size=1, in_channels=16, num_single_layers=2, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12), **JOINT), lambda: dict(flow(), pooled_projections=normal(BATCH, 64))),
    "flux2": ("Flux2Transformer2DModel", dict(
        in_channels=16, num_single_layers=2, timestep_guidance_channels=64, axes_dims_rope=(8, 8, 8, 8), **JOINT),
        lambda: dict(flow(), img_ids=torch.zeros(IMAGE, 4), txt_ids=torch.zeros(TEXT, 4))),
    "sd3": ("SD3Transformer2DModel", dict(
        SQUARE, out_channels=4, num_layers=3, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=8, qk_norm="rms_norm"),
        lambda: dict(hidden_states=normal(BATCH, 4, 8, 8), encoder_hidden_states=normal(BATCH, TEXT, 64),
                     pooled_projections=normal(BATCH, 64), timestep=STEPS)),
    "qwen_image": ("QwenImageTransformer2DModel", dict(
        patch_size=2, in_channels=16, out_channels=4, axes_dims_rope=(8, 12, 12), **JOINT),
        lambda: dict(hidden_states=normal(BATCH, IMAGE, 16), encoder_hidden_states=normal(BATCH, TEXT, 64),
                     encoder_hidden_states_mask=torch.ones(BATCH, TEXT, dtype=torch.long), timestep=STEPS / 1000,
                     img_shapes=[[(1, 4, 4)]] * BATCH)),
    "wan": ("WanTransformer3DModel", dict(
        in_channels=4, out_channels=4, text_dim=64, ffn_dim=256, num_layers=2, cross_attn_norm=True, **HEADS),
        lambda: dict(hidden_states=normal(BATCH, 4, 1, 8, 8), encoder_hidden_states=normal(BATCH, TEXT, 64), timestep=STEPS)),
    "lumina2": ("Lumina2Transformer2DModel", dict(
        sample_size=8, in_channels=4, hidden_size=128, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=64,
        cap_feat_dim=64, axes_dim_rope=(8, 12, 12), axes_lens=(30, 16, 16)),
        lambda: dict(hidden_states=normal(BATCH, 4, 8, 8), timestep=STEPS / 1000, encoder_hidden_states=normal(BATCH, TEXT, 64),
                     encoder_attention_mask=torch.ones(BATCH, TEXT, dtype=torch.bool))),
    "z_image": ("ZImageTransformer2DModel", dict(
        in_channels=4, dim=128, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=64, axes_dims=[8, 12, 12],
        axes_lens=[64, 64, 64]),
        lambda: dict(x=[normal(4, 1, 8, 8) for _ in range(BATCH)], t=STEPS / 1000, cap_feats=[normal(TEXT, 64) for _ in range(BATCH)])),
    "sdxl": ("UNet2DConditionModel", dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 48),
        lambda: dict(sample=normal(BATCH, 4, 8, 8), timestep=STEPS, encoder_hidden_states=normal(BATCH, TEXT, 64),
                     added_cond_kwargs=dict(text_embeds=normal(BATCH, 64), time_ids=torch.ones(BATCH, 6)))),
    "pixart": ("PixArtTransformer2DModel", dict(
        SQUARE, out_channels=8, num_layers=3, cross_attention_dim=128, caption_channels=64, use_additional_conditions=False),
        lambda: dict(hidden_states=normal(BATCH, 4, 8, 8), timestep=STEPS, encoder_hidden_states=normal(BATCH, TEXT, 64),
                     added_cond_kwargs=dict(resolution=None, aspect_ratio=None))),
    "dit": ("DiTTransformer2DModel", dict(SQUARE, out_channels=8, num_layers=3, num_embeds_ada_norm=64),
            lambda: dict(hidden_states=normal(BATCH, 4, 8, 8), timestep=STEPS, class_labels=torch.arange(BATCH))),
}


def made(family):
    torch.manual_seed(1)
    name, config, _ = FAMILIES[family]
    model = getattr(diffusers, name)(**config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def rounded(weight, bits, group=64):
    rows, cols = weight.shape
    size = group if cols % group == 0 else cols
    groups = weight.reshape(rows, -1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / (2 ** bits - 1)
    return (((groups - low) / scale).round() * scale + low).reshape(rows, cols)


def outputs(model, family):
    torch.manual_seed(2)
    out = model(**FAMILIES[family][2]()).sample
    return torch.cat([each.flatten() for each in out])


def measure(family, rules):
    model = made(family)
    weights, plain = dict(model.named_parameters()), outputs(model, family)
    matrices = sum(own.numel() for name, own in weights.items() if own.ndim == 2 and name.endswith(".weight"))
    result = {}
    for rule, names in rules.items():
        kept = {name: weights[name].data.clone() for name in names}
        row = {"weights": sum(own.numel() for own in kept.values()) / matrices}
        for bits in (2, 3, 4, 8):
            for name, own in kept.items():
                weights[name].data = rounded(own, bits)
            row[str(bits)] = ((outputs(model, family) - plain).square().sum() / plain.square().sum()).item()
        for name, own in kept.items():
            weights[name].data = own
        result[rule] = row
    return result


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if command == "make":
        for family in FAMILIES:
            made(family).save_pretrained(Path(folder) / family)
        print(json.dumps(list(FAMILIES)))
    else:
        print(json.dumps({family: measure(family, rules) for family, rules in json.loads(Path(rest[0]).read_text()).items()}))
