/** Rows of the peers' suite: ways to a quantized model, layer by layer through a method or through the pipeline. */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { loadModel } from "../../models/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import { measureStored } from "../stored.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { gridName, type GridSetting, type Method, type MethodKind, type Unsupported } from "./method.ts";
import {
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
 * A contender that is `scripts/quantize.ts` with these keys of the configuration: the whole pipeline into a temporary folder that is read
 * back. Its seconds include reading, calibrating, writing and checking.
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
    quantize: ({ path, kernels, threads, keys }) =>
      withTemporaryFolder(async (temporary) => {
        const output = join(temporary, "quantized");
        const { bits: bit_width, groupSize: group_size } = setting;
        const { config } = resolveConfig({
          overrides: { ...keys, bit_width, group_size, num_threads: threads, ...overrides },
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
