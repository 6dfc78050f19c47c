/** `bun tests/phases/_refinement_memory.ts MODEL all | one`: two steps of the refinement of a language model. */
import { createHash } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { resolveConfig } from "../../lib/config/mod.ts";
import { Workspace } from "../../lib/models/layers/workspace.ts";
import { HeldWeights, modelFrom } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { loadCalibration } from "../../lib/phases/mod.ts";
import { refinePhase } from "../../lib/phases/refinement.ts";
import { planQuantization } from "../../lib/plan/plan.ts";
import { quantizedByWeights } from "../../lib/solve/by_weights.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";

const [, , path, blocks] = process.argv;
const kernels = await openKernels({ threads: 2 }), checkpoint = openCheckpoint(path!);
const { config } = resolveConfig({ overrides: { bit_width: 2, group_size: 64 } });
const rounding = { ...config, solver: "round" } as const, source = "synthetic", seed = 1;
const held = new HeldWeights(blocks === "all" ? Infinity : 2e7);
const calibrated = await loadCalibration(modelFrom(checkpoint, kernels, { held }), {
  source,
  samples: 16,
  seed,
});
const rows = planQuantization(checkpoint, rounding).rows.filter(({ action, name }) =>
  action === "quantize" && name.includes("layers")
);
const packed = quantizedByWeights(calibrated.model, rows, rounding, kernels);
const folder = mkdtempSync(join(tmpdir(), "refinement-"));
const limits = blocks === "all" ? {} : { gradientBytes: 0, place: { folder, identity: "" } };
try {
  const started = process.cpuUsage();
  const { report } = (await refinePhase(
    {
      ...{ checkpoint, calibrated, kernels, held, source, seed, workspace: new Workspace() },
      ...limits,
      onPlan: (message) => console.log(message),
    },
    packed,
    { maxIterations: 2, maxMinutes: 60 },
    undefined,
  ))!;
  const { user, system } = process.cpuUsage(started), hash = createHash("sha256");
  for (const { weights } of report.layers) {
    for (const part of Object.values(weights)) if (ArrayBuffer.isView(part)) hash.update(part as Uint8Array);
  }
  console.log({
    heldOut: [report.heldOutBefore, report.heldOutAfter],
    sha256: hash.digest("hex"),
    processorSeconds: (user + system) / 1e6,
    peakBytes: process.resourceUsage().maxRSS * 1024,
  });
} finally {
  rmSync(folder, { recursive: true });
}
