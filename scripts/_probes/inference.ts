/**
 * `scripts/_probes/inference.ts [MODEL [TOKENS]]`: opens the kernels and, with a MODEL, loads it and runs one
 * forward pass; prints the memory that the process took at its peak. Run twice, with and without a model, it
 * says what inference takes by itself.
 */
import process from "node:process";
import { peakResidentBytes } from "../../lib/eval/environment.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";

const [path, tokens = "64"] = process.argv.slice(2);
using kernels = await openKernels();
let weightBytes = 0, scratchBytes = 0;
if (path !== undefined) {
  const { kind, model } = loadModel(path, kernels);
  if (kind === "dit") model.forward(new Float32Array(model.imageElements), [500], [0]);
  else model.forward(new Int32Array(Number(tokens)).fill(model.config.maskToken), 1);
  ({ weightBytes, scratchBytes } = model);
}
console.log(JSON.stringify({ peakResidentBytes: peakResidentBytes(), weightBytes, scratchBytes }));
