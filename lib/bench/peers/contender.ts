/** Rows of the peers' suite: a model quantized layer by layer through a method, or through the pipeline. */
import { join } from "node:path";
import type { Calibrated } from "../../calibration/mod.ts";
import { resolveConfig } from "../../config/mod.ts";
import { loadModel } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { openRun } from "../../pipeline/open_run.ts";
import { planRun } from "../../pipeline/planned_run.ts";
import { calibrateRun, phasesRun, solveRun } from "../../pipeline/run_stages.ts";
import { requestOutput, withOutput, writeRun } from "../../pipeline/write_run.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import { measureStored } from "../stored.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import type { Positions } from "./calibration.ts";
import { gridName, type GridSetting, type Method, type MethodKind, type Unsupported } from "./method.ts";
import {
  KEPT_TABLES,
  type QuantizedModel,
  quantizeModel,
  type QuantizeModelOptions,
  type Target,
} from "./quantized_model.ts";

export interface Contender {
  readonly name: string;
  readonly kind: MethodKind;
  readonly bits: BitWidth | undefined;
  readonly groupSize: GroupSize | undefined;
  quantize(target: Target): Promise<QuantizedModel | Unsupported>;
}

/** A contender that quantizes each layer by itself, with another name where there are several of a method. */
export function methodContender(
  method: Method,
  { name = method.name, ...options }: QuantizeModelOptions & { readonly name?: string } = {},
): Contender {
  const { kind, bits, groupSize } = method;
  return { name, kind, bits, groupSize, quantize: (target) => quantizeModel(target, method, options) };
}

/**
 * A contender that is `scripts/quantize.ts` with these keys of the configuration: the stages of the pipeline
 * into a temporary folder that is read back. Its seconds include reading, calibrating, writing and checking.
 *
 * @param positions `alike` solves on the same data with weight 1 at every position, for which there is no key
 */
export function pipelineContender(
  name: string,
  setting: GridSetting,
  overrides: Readonly<Record<string, unknown>>,
  positions: Positions = "by_role",
): Contender {
  return {
    name: gridName(name, setting),
    kind: "ours",
    ...setting,
    quantize: ({ path, kernels, keys, data }) => {
      const { bits: bit_width, groupSize: group_size } = setting;
      const solvedOn = positions === "alike" ? data.alike : undefined;
      return quantizedByPipeline(path, kernels, { ...keys, bit_width, group_size, ...overrides }, solvedOn);
    },
  };
}

/**
 * A model as `scripts/quantize.ts` quantizes it with these keys of the configuration.
 *
 * @param solvedOn data in place of those that the configuration names
 */
export function quantizedByPipeline(
  path: string,
  kernels: Kernels,
  overrides: Readonly<Record<string, unknown>>,
  solvedOn?: Calibrated,
): Promise<QuantizedModel & { readonly layerErrors: readonly number[] }> {
  return withTemporaryFolder(async (temporary) => {
    const output = join(temporary, "quantized");
    const { config } = resolveConfig({
      overrides: { ...KEPT_TABLES, num_threads: kernels.threads, ...overrides },
    });
    const begin = performance.now();
    using run = openRun({ input: path, config, kernels });
    const planned = await planRun(run);
    const calibrated = await calibrateRun(run, planned);
    const data = solvedOn ?? calibrated, solved = await solveRun(run, planned, data);
    const phases = await phasesRun(run, planned, data, solved);
    const request = await requestOutput(run, planned, { output });
    await withOutput(run, planned, request, (folder) => writeRun(run, planned, { solved, phases }, folder));
    const seconds = (performance.now() - begin) / 1000;
    const { weights, bitsPerWeight, relativeRmsError } = measureStored(kernels, path, output);
    const model = loadModel(output, kernels), storedBytes = bitsPerWeight * weights / 8;
    const layerErrors = [...solved?.layers.values() ?? []].map(({ relativeError }) => relativeError);
    return { model, weights, storedBytes, bitsPerWeight, relativeRmsError, seconds, notes: [], layerErrors };
  });
}
