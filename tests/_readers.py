"""Runs scripts of interop/, each in a process of its own that finds the large packages loaded.

Each line of standard input, {"script": NAME, "args": [...]}, is answered by a line {"code", "output", "errors"}.
"""
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import diffusers
import torch  # noqa: F401
import transformers

HERE = Path(__file__).parent / "interop"
# They load their parts when these are asked for.
diffusers.DiTTransformer2DModel, diffusers.StableDiffusionPipeline, transformers.PreTrainedModel


def run(script: str, args: list[str]) -> int:
    """A script as the main program of this process; its exit status."""
    sys.argv = [str(HERE / script), *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(script: str, args: list[str]) -> dict:
    """Runs a script in a child of this process."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            for number, file in enumerate((open(os.devnull), output, errors)):
                os.dup2(file.fileno(), number)
            code = run(script, args)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0), errors.seek(0)
        return {"code": code, "output": output.read().decode(), "errors": errors.read().decode()}


for line in sys.stdin:
    print(json.dumps(answer(**json.loads(line))), flush=True)
