"""Small random LLaDA-MoE and SDAR models with logits of an independent implementation in PyTorch, float32.

make FOLDER    a folder for each model: model.safetensors, config.json, and golden.safetensors with input_ids,
               attention_mask (1: a token, 0: padding) and logits. Prints their names as JSON.

SDAR's logits are those of transformers' Qwen3 under a mask of blocks. LLaDA-MoE's are those of the functions below,
which are checked against transformers' Qwen3-MoE where that has the same parts.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, WIDTH, HEADS, LAYERS, TOKENS = 64, 32, 4, 2, 22
COMMON = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
              max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False)
SPECIAL = dict(mask_token_id=VOCABULARY - 1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2)


def random_(model):
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def inputs():
    ids = torch.randint(3, VOCABULARY - 1, (2, TOKENS))
    ids[torch.rand(ids.shape) < 0.4] = VOCABULARY - 1
    return ids


def additive(allowed):
    return torch.where(allowed, 0.0, float("-inf"))[None, None].expand(2, 1, -1, -1)


def block_mask(size):
    block = torch.arange(TOKENS) // size
    return additive(block[None, :] <= block[:, None])


def sdar(block_size, **more):
    config = Qwen3Config(**{**COMMON, **more}, num_key_value_heads=2, head_dim=12, intermediate_size=48, rope_theta=1e6,
                         attn_implementation="eager")
    model, ids = random_(Qwen3ForCausalLM(config)), inputs()
    logits = model(ids, attention_mask=block_mask(block_size), use_cache=False).logits
    own = dict({**COMMON, **more}, model_type="sdar", architectures=["SDARForCausalLM"], num_key_value_heads=2, head_dim=12,
               intermediate_size=48, rope_theta=1e6, block_size=block_size, hidden_act="silu", use_sliding_window=False,
               **SPECIAL)
    weights = {name: value for name, value in model.state_dict().items()
               if not (config.tie_word_embeddings and name == "lm_head.weight")}
    return own, weights, ids, logits


# LLaDA-MoE, written down from its description ---------------------------------------------------------------


def rms_norm(x, weight, epsilon=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def turned(x, theta):
    """Rotary positions: halves of a head, x [batch, heads, tokens, size]."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def feed_forward(x, weights, name):
    return (F.silu(x @ weights[f"{name}.gate_proj.weight"].T) * (x @ weights[f"{name}.up_proj.weight"].T)) @ weights[
        f"{name}.down_proj.weight"].T


def mixture(x, weights, name, bias):
    shares = (x @ weights[f"{name}.gate.weight"].T).softmax(-1)
    if bias is not None:
        shares = shares + bias
    best = shares.topk(EXPERTS["num_experts_per_tok"], -1)
    chosen = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
    outputs = [feed_forward(x, weights, f"{name}.experts.{e}") * chosen[..., e, None] for e in range(shares.shape[-1])]
    return sum(outputs)


def llada_moe_logits(config, weights, ids):
    x = weights["model.embed_tokens.weight"][ids]
    heads, kv_heads, size = HEADS, config["num_key_value_heads"], WIDTH // HEADS
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        h = rms_norm(x, weights[f"{layer}.input_layernorm.weight"])

        def project(part, count):
            out = h @ weights[f"{layer}.self_attn.{part}_proj.weight"].T
            if config["attention_bias"]:
                out = out + weights[f"{layer}.self_attn.{part}_proj.bias"]
            return out.view(*out.shape[:2], count, size)

        q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
        if config["qk_layernorm"]:
            q = rms_norm(q, weights[f"{layer}.self_attn.q_norm.weight"])
            k = rms_norm(k, weights[f"{layer}.self_attn.k_norm.weight"])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = turned(q, config["rope_theta"]), turned(k, config["rope_theta"])
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        attended = (q @ k.transpose(2, 3) * size ** -0.5).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        if config["attention_bias"]:
            attended = attended + weights[f"{layer}.self_attn.o_proj.bias"]
        x = x + attended
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"])
        if config["moe_layer_freq"][i] == 0:
            x = x + feed_forward(h, weights, f"{layer}.mlp")
            continue
        out = mixture(h, weights, f"{layer}.mlp", weights.get(f"{layer}.mlp.expert_bias"))
        if config.get("shared_expert_intermediate_size"):
            out = out + feed_forward(h, weights, f"{layer}.shared_expert")
        x = x + out
    return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def llada_moe_config(**changes):
    return dict({**COMMON, **EXPERTS, **SPECIAL, "model_type": "llada_moe", "architectures": ["LLaDAMoEModelLM"],
                 "num_key_value_heads": HEADS, "expert_intermediate_size": 20, "dense_intermediate_size": 44,
                 "shared_expert_intermediate_size": None, "moe_layer_freq": [1] * LAYERS, "qk_layernorm": True,
                 "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "hidden_act": "silu",
                 "rope_theta": 50000.0, "norm_topk_prob": None, "routed_scaling_factor": 1, "clip_qkv": None,
                 "router_num_group": None, "router_topk_group": None, "partial_rotary_factor": 1}, **changes)


def like_qwen3_moe():
    """LLaDA-MoE with the parts that Qwen3-MoE has: the logits of transformers, with which those above must agree."""
    config = llada_moe_config(num_key_value_heads=2)
    theirs = Qwen3MoeConfig(**{**COMMON, **EXPERTS}, num_key_value_heads=2, head_dim=WIDTH // HEADS, intermediate_size=44,
                            moe_intermediate_size=20, norm_topk_prob=False, decoder_sparse_step=1, rope_theta=50000.0,
                            attn_implementation="eager", experts_implementation="eager")
    model, ids = random_(Qwen3MoeForCausalLM(theirs)), inputs()
    full = additive(torch.ones(TOKENS, TOKENS, dtype=torch.bool))
    logits = model(ids, attention_mask=full, use_cache=False).logits
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                stem = name.removesuffix("gate_up_proj")
                weights[f"{stem}{e}.gate_proj.weight"], weights[f"{stem}{e}.up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            for e, down in enumerate(value):
                weights[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            weights[name] = value
    torch.testing.assert_close(llada_moe_logits(config, weights, ids), logits, atol=2e-5, rtol=2e-5)
    return config, weights, ids, logits


def with_everything():
    """Biases, an expert of every token, a block without experts, and experts' biases."""
    config = llada_moe_config(num_key_value_heads=2, attention_bias=True, shared_expert_intermediate_size=12,
                              moe_layer_freq=[0, 1], moe_router_enable_expert_bias=True)
    weights, kv = {}, 2 * WIDTH // HEADS

    def linear(name, rows, cols, bias=False):
        weights[f"{name}.weight"] = torch.randn(rows, cols) * 1.5 * cols ** -0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows) * 0.2

    def norm(name, size=WIDTH):
        weights[f"{name}.weight"] = 1 + torch.randn(size) * 0.2

    def part(name, size):
        linear(f"{name}.gate_proj", size, WIDTH), linear(f"{name}.up_proj", size, WIDTH), linear(f"{name}.down_proj", WIDTH, size)

    linear("model.embed_tokens", VOCABULARY, WIDTH), linear("lm_head", VOCABULARY, WIDTH), norm("model.norm")
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm"), norm(f"{layer}.post_attention_layernorm")
        norm(f"{layer}.self_attn.q_norm", WIDTH // HEADS), norm(f"{layer}.self_attn.k_norm", WIDTH // HEADS)
        for name, rows in dict(q=WIDTH, k=kv, v=kv, o=WIDTH).items():
            linear(f"{layer}.self_attn.{name}_proj", rows, WIDTH, True)
        if config["moe_layer_freq"][i] == 0:
            part(f"{layer}.mlp", 44)
            continue
        linear(f"{layer}.mlp.gate", EXPERTS["num_experts"], WIDTH)
        weights[f"{layer}.mlp.expert_bias"] = torch.randn(EXPERTS["num_experts"]) * 0.1
        part(f"{layer}.shared_expert", 12)
        for e in range(EXPERTS["num_experts"]):
            part(f"{layer}.mlp.experts.{e}", 20)
    ids = inputs()
    return config, weights, ids, llada_moe_logits(config, weights, ids)


MODELS = {
    "sdar": lambda: sdar(4),
    "sdar-5": lambda: sdar(5, attention_bias=True, tie_word_embeddings=True),
    "llada_moe": like_qwen3_moe,
    "llada_moe-all": with_everything,
}

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        with torch.no_grad():
            config, weights, ids, logits = make()
        own = folder / name
        own.mkdir(parents=True)
        save_file({key: value.contiguous().clone() for key, value in weights.items()}, own / "model.safetensors")
        (own / "config.json").write_text(json.dumps(config))
        save_file({"input_ids": ids.int().contiguous(), "logits": logits.contiguous()}, own / "golden.safetensors")
    print(json.dumps(list(MODELS)))
