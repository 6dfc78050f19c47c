"""Tiny random models of diffusers, run under scripts/collect_statistics.py.

draw FAMILY FOLDER   saves the model's weights there, runs it on structured inputs, and saves statistics.safetensors
                     and inputs.safetensors (some rows that each layer reads, by the name of its weight)

errors FOLDER NAMES FILE...   relative output errors of the layers NAMES (JSON) with each file's weights, float64

dream MODEL DATA OUT PRECISION   statistics of a Dream checkpoint on the batches of DATA (safetensors: <i>.tokens and
                                 <i>.times)
dit MODEL DATA OUT PRECISION     of a DiT checkpoint of diffusers (<i>.samples, <i>.times and <i>.labels)

pipeline FOLDER         a Stable Diffusion pipeline and prompts, to be drawn from
masked FOLDER           a masked language model of transformers and texts
lines FOLDER FILE       runs the code of FILE in FOLDER; prints the shapes of its statistics.safetensors
by_command FOLDER FILE  collects by the command over the prompts of FILE; prints the names of what it saved
experts FOLDER          a mixture of experts and its statistics; prints how many inputs each expert had
pair FOLDER             whole.safetensors, blocks.safetensors and x.safetensors of two small layers
mixed FOLDER            collects there under autocast; prints the difference from float64
wrapped FOLDER          collects models that are compiled, wrapped, adapted or fused; prints what differs from plain ones
batched FOLDER          batches in lists, and times by token; prints what differs from samples one by one
unknown FOLDER          prints of which layers of a file weights are not known
interrupted FOLDER      collects there and is interrupted; prints what files are left

Prints JSON.
"""
import json
import os
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import collect_statistics  # noqa: E402
from collect_statistics import collect  # noqa: E402

HEADS = dict(attention_head_dim=32, num_attention_heads=4)
TEXT, IMAGE = 12, 16
"""Tokens of a text, and of a picture."""
KEPT_ROWS = 512
RANK = 4


def structured(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Inputs as models have them: few directions with most of the power, and channels of very different size."""
    width = shape[-1]
    basis = torch.randn(RANK, width, generator=torch.Generator().manual_seed(width))
    sizes = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(width + 1)))
    low = torch.randn(*shape[:-1], RANK, generator=generator) @ basis
    return (low + 0.1 * torch.randn(*shape, generator=generator)) * sizes


def picture(generator: torch.Generator, batch: int, channels: int) -> torch.Tensor:
    return structured(generator, batch, channels * 64).reshape(batch, channels, 8, 8)


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=64,
        pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12), **HEADS)
    return model, lambda generator, batch, time: dict(
        hidden_states=structured(generator, batch, IMAGE, 16),
        encoder_hidden_states=structured(generator, batch, TEXT, 64),
        pooled_projections=structured(generator, batch, 64),
        timestep=time, guidance=torch.ones(batch), img_ids=torch.zeros(IMAGE, 3), txt_ids=torch.zeros(TEXT, 3))


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=64,
        caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=8, qk_norm="rms_norm", **HEADS)
    return model, lambda generator, batch, time: dict(
        hidden_states=picture(generator, batch, 4), encoder_hidden_states=structured(generator, batch, TEXT, 64),
        pooled_projections=structured(generator, batch, 64), timestep=1000 * time)


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=64, axes_dims_rope=(8, 12, 12),
        **HEADS)
    return model, lambda generator, batch, time: dict(
        hidden_states=structured(generator, batch, IMAGE, 16),
        encoder_hidden_states=structured(generator, batch, TEXT, 64),
        encoder_hidden_states_mask=torch.ones(batch, TEXT, dtype=torch.long),
        timestep=time, img_shapes=[[(1, 4, 4)]] * batch)


def wan():
    model = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=64, ffn_dim=256, num_layers=1, cross_attn_norm=True, **HEADS)
    return model, lambda generator, batch, time: dict(
        hidden_states=picture(generator, batch, 4)[:, :, None], timestep=1000 * time,
        encoder_hidden_states=structured(generator, batch, TEXT, 64))


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=128, caption_channels=64,
        use_additional_conditions=False, **HEADS)
    return model, lambda generator, batch, time: dict(
        hidden_states=picture(generator, batch, 4), timestep=(1000 * time).long(),
        encoder_hidden_states=structured(generator, batch, TEXT, 64),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None))


def sdxl():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 1),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8, norm_num_groups=8)
    return model, lambda generator, batch, time: dict(
        sample=picture(generator, batch, 4), timestep=(1000 * time).long(),
        encoder_hidden_states=structured(generator, batch, TEXT, 64),
        added_cond_kwargs=dict(text_embeds=structured(generator, batch, 64), time_ids=torch.ones(batch, 6)))


FAMILIES = dict(flux=flux, sd3=sd3, qwen_image=qwen_image, wan=wan, pixart=pixart, sdxl=sdxl)


def draw(family: str, folder: Path, passes: int = 40, batch: int = 8) -> int:
    torch.manual_seed(1)
    model, inputs = FAMILIES[family]()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1 and path.endswith("weight"):
            with torch.no_grad():  # norms: channels of different size, as training makes them
                parameter.mul_(torch.exp(torch.randn_like(parameter)))
    model.eval().save_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    with collect(model, folder / "statistics.safetensors", name=family, source="structured noise"), torch.no_grad():
        for step in range(passes):
            model(**inputs(generator, batch, torch.full((batch,), 1 - step / passes)))
    save_file({name: torch.cat(own)[:KEPT_ROWS].contiguous() for name, own in held_out(model, inputs).items()},
              folder / "inputs.safetensors")
    return sum(isinstance(module, torch.nn.Linear) for module in model.modules())


def held_out(model: torch.nn.Module, inputs) -> dict[str, list[torch.Tensor]]:
    """Rows that each layer reads in passes that no statistics are of."""
    rows: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=f"{name}.weight": rows.setdefault(name, []).append(
                args[0].detach().reshape(-1, module.in_features)))
        for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for step in range(8):
            model(**inputs(generator, 4, torch.full((4,), 0.95 - step / 10)))
    for handle in handles:
        handle.remove()
    return rows


def errors(folder: str, layers: list[str], files: list[str]) -> list[dict[str, float]]:
    """Relative error of each layer's outputs with other weights, on the rows that were kept."""
    plain = load_file(next(Path(folder).glob("diffusion*.safetensors")))
    rows = load_file(Path(folder) / "inputs.safetensors")
    result = []
    for file in files:
        other = load_file(file)
        result.append({
            name: (((other[name] - plain[name]).double() @ rows[name].double().T).square().sum()
                   / (plain[name].double() @ rows[name].double().T).square().sum()).item()
            for name in layers})
    return result


class Dream(torch.nn.Module):
    """Dream's architecture by its names of tensors: Qwen 2 whose attention sees all positions."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        hidden, vocabulary, wide = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
        heads, self.width = config["num_attention_heads"], hidden // config["num_attention_heads"]
        pairs = config["num_key_value_heads"] * self.width
        linear = torch.nn.Linear
        layers = [torch.nn.ModuleDict(dict(
            input_layernorm=self.norm(), post_attention_layernorm=self.norm(),
            self_attn=torch.nn.ModuleDict(dict(
                q_proj=linear(hidden, hidden), k_proj=linear(hidden, pairs), v_proj=linear(hidden, pairs),
                o_proj=linear(hidden, hidden, bias=False))),
            mlp=torch.nn.ModuleDict(dict(
                gate_proj=linear(hidden, wide, bias=False), up_proj=linear(hidden, wide, bias=False),
                down_proj=linear(wide, hidden, bias=False))),
        )) for _ in range(config["num_hidden_layers"])]
        self.model = torch.nn.ModuleDict(dict(
            embed_tokens=torch.nn.Embedding(vocabulary, hidden), layers=torch.nn.ModuleList(layers), norm=self.norm()))
        self.lm_head = linear(hidden, vocabulary, bias=False)
        self.groups = heads // config["num_key_value_heads"]

    def norm(self) -> torch.nn.RMSNorm:
        return torch.nn.RMSNorm(self.config["hidden_size"], eps=self.config["rms_norm_eps"])

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(0, self.width, 2).float() / self.width
        angles = torch.outer(torch.arange(x.shape[-2]).float(), self.config["rope_theta"] ** -steps).repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embed_tokens"](input_ids)
        for layer in self.model["layers"]:
            own, attention, mlp = layer["input_layernorm"](x), layer["self_attn"], layer["mlp"]
            query, key = (self.rotated(self.heads(attention[name](own))) for name in ("q_proj", "k_proj"))
            key, value = (each.repeat_interleave(self.groups, 1) for each in (key, self.heads(attention["v_proj"](own))))
            seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            x = x + attention["o_proj"](seen.transpose(1, 2).flatten(2))
            own = layer["post_attention_layernorm"](x)
            x = x + mlp["down_proj"](torch.nn.functional.silu(mlp["gate_proj"](own)) * mlp["up_proj"](own))
        return self.lm_head(self.model["norm"](x))


def batches(data: str) -> list[dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(data).items():
        index, part = name.split(".")
        found.setdefault(int(index), {})[part] = tensor
    return [found[index] for index in sorted(found)]


def run_dream(folder: str, data: str, out: str, precision: str) -> int:
    config = json.loads((Path(folder) / "config.json").read_text())
    model = Dream(config)
    weights = {name: tensor.float() for file in Path(folder).glob("model*.safetensors")
               for name, tensor in load_file(file).items()}
    model.load_state_dict(weights)
    masks = dict(mask_token=config["mask_token_id"], pad_token=config["pad_token_id"], shift=1)
    with collect(model, out, moment="full", precision=precision, groups=5, **masks) as collector, torch.no_grad():
        for batch in batches(data):
            collector.times = batch["times"]
            model(batch["tokens"])
    return len(collector.modules)


def run_dit(folder: str, data: str, out: str, precision: str) -> int:
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with collect(model, out, moment="full", precision=precision, groups=5) as collector, torch.no_grad():
        for batch in batches(data):
            model(batch["samples"], timestep=batch["times"].long(), class_labels=batch["labels"].long())
    return len(collector.modules)


WORDS = ["a", "lighthouse", "in", "storm", "the", "red", "boat", "at", "night"]


def make_pipeline(folder: str) -> int:
    """As small as its parts can be, with a tokenizer of single letters."""
    import transformers

    torch.manual_seed(4)
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TEXT)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TEXT, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8)
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, sample_size=8)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(Path(folder) / "model")
    (Path(folder) / "prompts.txt").write_text("a red boat\nthe lighthouse at night\n")
    return len(unet.state_dict())


def make_masked(folder: str) -> int:
    import transformers

    torch.manual_seed(5)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(Path(folder) / "model")
    model = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128))
    model.save_pretrained(Path(folder) / "model")
    lines = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(6 + i % 3)) for i in range(40)]
    (Path(folder) / "texts.txt").write_text("\n".join(lines))
    return len(model.state_dict())


def run_lines(folder: str, file: str) -> dict[str, list[int]]:
    """Runs code that leaves statistics.safetensors in its folder; the shapes of what it left."""
    code = Path(file).read_text()
    os.chdir(folder)
    exec(compile(code, file, "exec"), {"__name__": "lines"})
    return {name: list(tensor.shape) for name, tensor in load_file("statistics.safetensors").items()}


def by_command(folder: str, prompts: str) -> list[str]:
    """Inputs that the command finds in the model of a folder."""
    sys.argv = ["collect_statistics.py", "model", "by_command.safetensors", "--prompts", prompts, "--device", "cpu",
                "--dtype", "float32", "--steps", "2"]
    os.chdir(folder)
    collect_statistics.main()
    return sorted(load_file("by_command.safetensors"))


def experts(folder: str) -> dict:
    """A mixture of experts of transformers, whose experts lie in one parameter; what they should have read."""
    import transformers

    torch.manual_seed(7)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)).eval()
    model.save_pretrained(folder)
    block, kept = model.model.layers[0].mlp, []
    block.experts.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append([*args, *kwargs.values()]), with_kwargs=True)
    with collect(model, Path(folder) / "statistics.safetensors", mask_token=1, moment="full"), torch.no_grad():
        for _ in range(6):
            tokens = torch.randint(0, 40, (4, 24))
            model(input_ids=tokens.masked_fill(torch.rand(tokens.shape) < torch.tensor([[.1], [.3], [.6], [.9]]), 1))
    return {
        f"model.layers.0.mlp.experts.{expert}.up_proj.weight": int(sum((each[1] == expert).sum() for each in kept))
        for expert in range(4)}


class Pair(torch.nn.Module):
    """Two layers that read the same tensor in the first pass, and different ones from the second on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(40, 8), torch.nn.Linear(40, 8)
        self.passes = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> None:
        self.first(x)
        self.second(x if self.passes == 0 else 2 * x)
        self.passes += 1


def pair(folder: str) -> int:
    """Whole moments, and blocks of 16 columns in files on the way; the inputs beside them, of three times."""
    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(3, 5, 40, generator=generator) for _ in range(2)]
    times = torch.tensor([0.05, 0.5, 0.95])
    for name, moment, limit, precision in (("whole", "full", None, "float32"), ("blocks", 16, 0, "float32"),
                                           ("whole16", "full", None, "float16"), ("blocks16", 16, 0, "float16")):
        model = Pair()
        with collect(model, Path(folder) / f"{name}.safetensors", moment=moment, groups=4, device_bytes=limit,
                     precision=precision):
            for x in inputs:
                model(x, times)
    save_file({"x": torch.stack(inputs)}, Path(folder) / "x.safetensors")
    return len(inputs)


def mixed(folder: str) -> float:
    """Largest difference of a moment that is collected under autocast from that of the inputs in float64."""
    layer, x = torch.nn.Linear(40, 8), torch.randn(512, 40, generator=torch.Generator().manual_seed(8))
    path = Path(folder) / "mixed.safetensors"
    with collect(layer, path, moment="full"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    wanted = x.double().T @ x.double()
    got = next(each for name, each in load_file(path).items() if name.endswith(".second"))
    return ((got.double() - wanted).abs().max() / wanted.abs().max()).item()


def by_time(folder: str) -> dict[str, list[float]]:
    """Inputs by time group of samplers that give timesteps, in floats down to 0.5, and shares of 1."""
    counts, x = {}, torch.ones(1, 1, 40)
    for name, groups, times in (
        ("timesteps", 4, (999.0, 400.0, 1.0, 0.5)),
        ("shares", 4, (1.0, 0.4, 0.001)),
        ("tenths", 10, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)),
    ):
        model = Pair()
        with collect(model, Path(folder) / f"{name}.safetensors", groups=groups) as collector:
            for time in times:
                model(x, torch.tensor([time]))
            counts[name] = collector.inputs["first.weight"].tokens.tolist()
    model = torch.nn.Sequential(torch.nn.Embedding(10, 40), torch.nn.Linear(40, 8))
    model.forward = lambda input_ids: model[1](model[0](input_ids))
    with collect(model, Path(folder) / "masks.safetensors", groups=5, mask_token=9) as collector:
        for masked in range(1, 6):
            model(input_ids=torch.tensor([[9] * masked + [1] * (5 - masked)]))
        counts["masks"] = collector.inputs["1.weight"].samples.tolist()
    return counts


class Coded(torch.nn.Linear):
    """A layer whose weight is in codes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.float().T


def unknown(folder: str) -> list[bool]:
    """Of two layers, of which the second has codes: whether a file says that weights are not known."""
    model, path = Pair(), Path(folder) / "coded.safetensors"
    model.second = Coded(40, 8, bias=False)
    model.second.weight = torch.nn.Parameter(model.second.weight.char(), requires_grad=False)
    with collect(model, path):
        model(torch.ones(1, 1, 40), torch.tensor([0.5]))
    return load_file(path)["model.weights"].isnan().all(1).tolist()


class HandsOn(torch.nn.Module):
    """A wrapper that hands on what it is called with, as DistributedDataParallel does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def lora() -> object:
    """PEFT's, of one layer, with numbers in both factors."""
    import peft

    return peft.LoraConfig(target_modules=["transformer_blocks.0.attn.to_k"], r=2, lora_alpha=1, init_lora_weights=False)


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    import peft

    return peft.get_peft_model(model, lora())


def injected(model: torch.nn.Module) -> torch.nn.Module:
    """As diffusers adds one, without PEFT's wrapper."""
    model.add_adapter(lora())
    return model


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the LoRA in its weight."""
    block = injected(model).transformer_blocks[0].attn
    layer = block.to_k
    factors = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    layer.base_layer.weight.data += (0.5 * factors[0].double() @ factors[1].double()).float()
    block.to_k = layer.base_layer
    return model


def in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile(backend="eager")
    return model


def by_blocks(model: torch.nn.Module) -> torch.nn.Module:
    model.compile_repeated_blocks(backend="eager")
    return model


def fused(model: torch.nn.Module) -> torch.nn.Module:
    model.fuse_qkv_projections()
    return model


def offloaded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that accelerate brings to the device layer by layer."""
    import accelerate

    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def difference(one: Path, other: Path) -> list[str]:
    """Entries of two files of statistics that are not nearly equal, and those that one of them alone has."""
    mine, its = load_file(one), load_file(other)
    close = lambda name: torch.allclose(mine[name].double(), its[name].double(), rtol=1e-4, atol=1e-4)
    shared = mine.keys() & its.keys()
    wrong = [name for name in shared if not name.endswith(".histogram") and not close(name)]
    return sorted([*wrong, *(mine.keys() ^ its.keys())])


def wrapped(folder: str) -> dict[str, list[str]]:
    """What differs from the statistics of the model as it is, of one that has run before, too."""
    root, found = Path(folder), {}
    plain = lambda model: model
    compiled = lambda model: torch.compile(model, backend="eager")
    kinds = dict(compiled=(compiled, plain), in_place=(in_place, plain), by_blocks=(by_blocks, plain),
                 parallel=(torch.nn.DataParallel, plain), hands_on=(HandsOn, plain), fused=(fused, plain),
                 offloaded=(offloaded, plain), adapted=(adapted, merged), injected=(injected, merged))
    kinds["adapted, offloaded"] = (lambda model: offloaded(adapted(model)), merged)
    for name, makers in kinds.items():
        for maker, file in zip(makers, (root / f"{name}.safetensors", root / "plain.safetensors")):
            torch.manual_seed(9)
            model, inputs = FAMILIES["flux"]()
            run = maker(model.eval())
            generator = torch.Generator().manual_seed(10)
            with torch.no_grad():
                run(**inputs(generator, 2, torch.tensor([0.8, 0.2])))
                with collect(run, file):
                    run(**inputs(generator, 2, torch.tensor([0.7, 0.3])))
        found[name] = difference(root / f"{name}.safetensors", root / "plain.safetensors")
    return found


def batched(folder: str) -> dict[str, list[str]]:
    """Batches of samples beside the same samples one by one."""
    root, found = Path(folder), {}
    torch.manual_seed(11)
    z_image = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
        axes_dims=[8, 12, 12], axes_lens=[64, 64, 64]).eval()
    # A list of samples; and a time for each token, 0 for those that are given, as Wan 2.2 has it.
    lists = [dict(x=[torch.randn(4, 1, 8, 8)], t=torch.tensor([time]), cap_feats=[torch.randn(TEXT, 64)])
             for time in (0.85, 0.15)]
    wan, inputs = FAMILIES["wan"]()
    generator = torch.Generator().manual_seed(12)
    tokens = [dict(inputs(generator, 1, torch.ones(1)), timestep=(torch.arange(16) >= 4)[None] * time)
              for time in (900, 100)]
    for name, model, samples in (("lists", z_image, lists), ("tokens", wan.eval(), tokens)):
        join = lambda parts: sum(parts, []) if isinstance(parts[0], list) else torch.cat(parts)
        batch = {key: join([each[key] for each in samples]) for key in samples[0]}
        for file, passes in (("batch", [batch]), ("single", samples)):
            with collect(model, root / f"{file}.safetensors"), torch.no_grad():
                for each in passes:
                    model(**each)
        found[name] = difference(root / "batch.safetensors", root / "single.safetensors")
        groups = load_file(root / "batch.safetensors")
        found[f"{name}, groups"] = next(
            each.nonzero()[:, 0].tolist() for key, each in groups.items() if key.endswith("to_q.weight.tokens"))
    return found


def interrupted(folder: str) -> list[str]:
    """Files that are left of a collection that an error ended."""
    model, inputs = FAMILIES["wan"]()
    try:
        with collect(model, Path(folder) / "statistics.safetensors", device_bytes=0), torch.no_grad():
            model(**inputs(torch.Generator(), 1, torch.ones(1)))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return sorted(os.listdir(folder))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if command == "draw":
        root, *families = rest
        print(json.dumps({family: draw(family, Path(root) / family) for family in families or FAMILIES}))
    elif command in ("pipeline", "masked", "lines", "by_command", "experts", "pair", "mixed", "by_time",
                     "wrapped", "batched", "unknown", "interrupted"):
        print(json.dumps(dict(pipeline=make_pipeline, masked=make_masked, lines=run_lines,
                              by_command=by_command, experts=experts, pair=pair, mixed=mixed, by_time=by_time,
                              wrapped=wrapped, batched=batched, unknown=unknown, interrupted=interrupted)[command](*rest)))
    elif command == "dream":
        print(run_dream(*rest))
    elif command == "dit":
        print(run_dit(*rest))
    else:
        print(json.dumps([errors(**task) for task in json.loads(Path(rest[0]).read_text())]))
