"""Prints the versions of the installed readers as JSON."""
import json
from importlib.metadata import version

names = ["compressed-tensors", "transformers", "diffusers", "mlx", "gguf", "safetensors", "torch", "comfy-kitchen", "auto-round"]
print(json.dumps({name: version(name).split("+")[0] for name in names}))
