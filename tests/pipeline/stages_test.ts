import { afterAll, expect, test } from "bun:test";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { openRun, withConfig } from "../../lib/pipeline/open_run.ts";
import { planRun } from "../../lib/pipeline/planned_run.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/quantize_checkpoint.ts";
import { calibrateRun, phasesRun, solveRun } from "../../lib/pipeline/run_stages.ts";
import { requestOutput, withOutput, writeRun } from "../../lib/pipeline/write_run.ts";
import type { KnownSolutions } from "../../lib/solve/candidates.ts";
import { differences, MODELS, workplace } from "../_checkpoints.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

const input = join(MODELS, "dream-mini");

test("plan, calibrate and solve once, then phases and write with several settings: the bytes of quantizeCheckpoint", async () => {
  const configs = [{ "thermodynamic.validation.enabled": true }, {
    "thermodynamic.boundary_smoothing.enabled": true,
    num_time_groups: 3,
  }].map((overrides) =>
    resolveConfig({
      overrides: { bit_width: 2, solver: "feedback", calibration_samples: 32, ...overrides },
    }).config
  );
  using run = openRun({ input, config: configs[0]!, kernels });
  const planned = await planRun(run);
  const calibrated = await calibrateRun(run, planned);
  const known: KnownSolutions = new Map();
  for (const config of configs) {
    const own = withConfig(run, config);
    expect(own.calibration).toBe(run.calibration);
    const solved = await solveRun(own, planned, calibrated, { known });
    const phases = await phasesRun(own, planned, calibrated, solved);
    const [staged, whole] = [place.fresh(), place.fresh()];
    const request = await requestOutput(own, planned, { output: staged });
    const report = await withOutput(
      own,
      planned,
      request,
      (output) => writeRun(own, planned, { solved, phases }, output),
    );
    await quantizeCheckpoint({ input, output: whole, config, kernels });
    expect(report.layers.length).toBeGreaterThan(0);
    expect(differences(staged, whole)).toEqual([]);
  }
  expect(known.size).toBe(1);
});

test("another configuration of a run with other calibration data opens those", () => {
  const configOf = (samples: number) =>
    resolveConfig({ overrides: { solver: "feedback", calibration_samples: samples } }).config;
  using run = openRun({ input, config: configOf(32), kernels });
  expect(withConfig(run, configOf(64)).calibration).not.toBe(run.calibration);
  expect(withConfig(run, configOf(32)).calibration).toBe(run.calibration);
  const others = resolveConfig({
    overrides: { solver: "feedback", calibration_samples: 32, "self_calibration.records": 8 },
  });
  expect(withConfig(run, others.config).calibration).not.toBe(run.calibration);
});
