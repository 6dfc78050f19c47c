/** What is measured in a row of the peers' suite: a way to a quantized model, layer by layer through a method or through the pipeline. */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { loadModel } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import { calibrationBeside } from "../../calibration/source.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import type { Checkpoint } from "../../tensor/mod.ts";
import { measureStored } from "../stored.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { gridName, type GridSetting, type Method, type MethodKind, type Unsupported } from "./method.ts";
import { type InputSource, type Layer, type QuantizedModel, quantizeModel } from "./quantized_model.ts";

/** A full-precision model that contenders quantize. */
export interface Target {
  readonly path: string;
  readonly checkpoint: Checkpoint;
  readonly kernels: Kernels;
  readonly threads: number;
  readonly layers: readonly Layer[];
  readonly source: InputSource;
}

export interface Contender {
  readonly name: string;
  readonly kind: MethodKind;
  readonly bits: BitWidth | undefined;
  readonly groupSize: GroupSize | undefined;
  quantize(target: Target): QuantizedModel | Unsupported | Promise<QuantizedModel | Unsupported>;
}

/** A contender that quantizes each layer by itself, with a name of its own where there are several of a method. */
export function methodContender(
  method: Method,
  { name = method.name, blockwise = false }: { readonly name?: string; readonly blockwise?: boolean } = {},
): Contender {
  return {
    name,
    kind: method.kind,
    bits: method.bits,
    groupSize: method.groupSize,
    quantize: ({ checkpoint, kernels, layers, threads, source }) =>
      quantizeModel(checkpoint, kernels, layers, method, source, { blockwise, threads }),
  };
}

/**
 * A contender that is `scripts/quantize.ts` with these settings: the whole pipeline, into a temporary folder that is read back. Its seconds
 * are the pipeline's, reading, calibrating, writing and checking included.
 */
export function pipelineContender(
  name: string,
  setting: GridSetting,
  overrides: Readonly<Record<string, unknown>>,
): Contender {
  return {
    name: gridName(name, setting),
    kind: "ours",
    ...setting,
    quantize: ({ path, kernels, threads }) =>
      withTemporaryFolder(async (temporary) => {
        const output = join(temporary, "quantized");
        const { config } = resolveConfig({
          overrides: {
            bit_width: setting.bits,
            group_size: setting.groupSize,
            num_threads: threads,
            calibration_data: calibrationBeside(path) === undefined ? "synthetic" : undefined, // as its rivals do
            ...overrides,
          },
        });
        const begin = performance.now();
        await quantizeCheckpoint({ input: path, output, config, kernels });
        const seconds = (performance.now() - begin) / 1000;
        const { weights, bitsPerWeight, relativeRmsError } = measureStored(kernels, path, output);
        return {
          model: loadModel(output, kernels, { threads }),
          weights,
          storedBytes: bitsPerWeight * weights / 8,
          bitsPerWeight,
          relativeRmsError,
          seconds,
          notes: [],
        };
      }),
  };
}
