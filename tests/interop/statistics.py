"""Tiny random models of diffusers, run under scripts/collect_statistics.py.

draw FAMILY FOLDER   saves the model's weights there, runs it on structured inputs, and saves statistics.safetensors
                     and inputs.safetensors (some rows that each layer reads, by the name of its weight)

errors FOLDER NAMES FILE...   relative output errors of the layers NAMES (JSON) with each file's weights, float64

Prints JSON.
"""
import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from collect_statistics import collect  # noqa: E402

HEADS = dict(attention_head_dim=32, num_attention_heads=4)
TEXT, IMAGE = 12, 16
"""Tokens of a text, and of a picture."""
KEPT_ROWS = 512
RANK = 8


def structured(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Inputs as models have them: few directions with most of the power, and channels of very different size."""
    width = shape[-1]
    basis = torch.randn(RANK, width, generator=torch.Generator().manual_seed(width))
    sizes = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(width + 1)))
    low = torch.randn(*shape[:-1], RANK, generator=generator) @ basis
    return (low + 0.1 * torch.randn(*shape, generator=generator)) * sizes


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=64,
        pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12), **HEADS)

    def inputs(generator, batch, time):
        return dict(
            hidden_states=structured(generator, batch, IMAGE, 16),
            encoder_hidden_states=structured(generator, batch, TEXT, 64),
            pooled_projections=structured(generator, batch, 64),
            timestep=time, guidance=torch.ones(batch), img_ids=torch.zeros(IMAGE, 3), txt_ids=torch.zeros(TEXT, 3))

    return model, inputs


FAMILIES = {"flux": flux}


def draw(family: str, folder: Path, passes: int = 64, batch: int = 8) -> dict:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model, inputs = FAMILIES[family]()
    model.eval().save_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    with collect(model, folder / "statistics.safetensors", name=family, source="structured noise"), torch.no_grad():
        for step in range(passes):
            model(**inputs(generator, batch, torch.full((batch,), 1 - step / passes)))
    save_file({name: torch.cat(own)[:KEPT_ROWS].contiguous() for name, own in held_out(model, inputs).items()},
              folder / "inputs.safetensors")
    return {"layers": sum(isinstance(module, torch.nn.Linear) for module in model.modules())}


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


def errors(folder: Path, names: list[str], quantized: list[Path]) -> list[dict[str, float]]:
    """Relative error of each layer's outputs with other weights, on the rows that were kept."""
    plain, rows = load_file(next(folder.glob("diffusion*.safetensors"))), load_file(folder / "inputs.safetensors")
    result = []
    for path in quantized:
        other = load_file(path)
        result.append({
            name: (((other[name] - plain[name]).double() @ rows[name].double().T).square().sum()
                   / (plain[name].double() @ rows[name].double().T).square().sum()).item()
            for name in names})
    return result


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    diffusers.utils.logging.set_verbosity_error()
    if command == "draw":
        print(json.dumps(draw(rest[0], Path(rest[1]))))
    else:
        folder, names, *quantized = rest
        print(json.dumps(errors(Path(folder), json.loads(names), [Path(each) for each in quantized])))
