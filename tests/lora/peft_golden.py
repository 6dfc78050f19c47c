"""LoRAs made and merged by PEFT itself, for merge_test.ts: peft_golden.py FOLDER. Made with PEFT 0.18.0, torch 2.13.0.

FOLDER/<case>/adapter: as save_pretrained writes it; base.safetensors and merged.safetensors: the weights before
merge_and_unload, and those that it changed.
"""
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

CASES = {
    "plain": dict(r=4, lora_alpha=6),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True),
    "patterns": dict(r=4, lora_alpha=8, rank_pattern={"q_proj": 3},
                     alpha_pattern={"layers.1.mlp.up_proj": 5, "q_proj": 7}),
}


class Model(torch.nn.Module):
    """Names of a language model's layers."""

    def __init__(self):
        super().__init__()

        def block():
            attention = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16), "o_proj": torch.nn.Linear(16, 16)})
            mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(16, 24, bias=False)})
            return torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp})

        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block(), block()])})

    def forward(self, x):
        return x


def save(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


for case, settings in CASES.items():
    torch.manual_seed(0)
    folder, model = Path(sys.argv[1]) / case, Model()
    folder.mkdir(parents=True)
    save(model.state_dict(), folder / "base.safetensors")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], **settings))
    for name, tensor in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    merged = adapted.merge_and_unload().state_dict()
    save({name: tensor for name, tensor in merged.items() if not torch.equal(tensor, base[name])},
         folder / "merged.safetensors")
