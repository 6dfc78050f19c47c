/** How far quantized layers are from full precision's, time group by time group, on the same inputs. */
import { IntegerProducts } from "../models/layers/integer_products.ts";
import { linear } from "../models/layers/linear.ts";
import type { LoadedModel } from "../models/mod.ts";
import { observeParts } from "../phases/activations.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel } from "../phases/context.ts";
import type { TimeGroups } from "../time/mod.ts";
import { squaredDistances } from "./statistics.ts";

/** Items whose layers are compared, of each time group: enough to see where errors lie. */
const ITEMS_PER_GROUP = 8;

/** A layer's error in a time group. */
export interface LayerError {
  readonly layer: string;
  readonly timeGroup: number;
  /** Sequences or images. */
  readonly samples: number;
  /** ‖ŷ − y‖² / ‖y‖² over all outputs of the samples. */
  readonly relativeError: number;
}

/**
 * The relative output error `‖Ŵ Q(x) − W x‖² / ‖W x‖²` of every quantized layer in every time group: x is
 * what full precision's layer reads, Q the layer's static quantization at that time where it has one.
 * Held-out calibration data; layers and groups that saw none are left out.
 *
 * @param full the model in full precision
 * @param models in whose layers the errors are wanted
 * @returns one list a model, by layer and time group
 * @throws {WeightsError} when an input that is quantized is not finite
 */
export function layerErrors(
  context: PhaseContext,
  full: LoadedModel,
  models: readonly Pick<PhaseModel, "weights" | "timeParameters">[],
  groups: TimeGroups,
): LayerError[][] {
  const { kernels } = context, products = new IntegerProducts(kernels, full.model.path);
  const layers = models.map((model) => {
    const { stages } = loadPhaseModel(context, { weights: model.weights }).model;
    const own = stages.flatMap(({ layers }) => layers).filter(({ name }) => model.weights.has(name));
    return new Map(own.map(({ name, weights }) => [name, weights]));
  });
  const sums = models.map(() => new Map<string, { error: number; norm: number; samples: number }[]>());
  observeParts(context, full, "heldOut", (times, { name, weights }, x, rows) => {
    if (!layers.some((own) => own.has(name))) return;
    const each = rows / times.length, { cols } = weights;
    for (const [item, time] of times.entries()) {
      const group = groups.groupOf(time);
      const input = x.subarray(item * each * cols, (item + 1) * each * cols);
      let wanted: Float32Array | undefined;
      for (const [m, { timeParameters }] of models.entries()) {
        const own = layers[m]!.get(name);
        if (own === undefined) continue;
        const byGroup = sums[m]!.get(name) ??
          Array.from({ length: groups.count }, () => ({ error: 0, norm: 0, samples: 0 }));
        sums[m]!.set(name, byGroup);
        const sum = byGroup[group]!;
        if (sum.samples >= ITEMS_PER_GROUP) continue;
        wanted ??= linear(kernels, { weights }, input, each);
        const selected = timeParameters?.at(name, time);
        const read = selected?.grid === undefined
          ? input
          : products.round(name, input, each, selected, new Float32Array(input.length));
        const got = linear(kernels, { weights: own }, read, each);
        const { errors: [error], norms: [norm] } = squaredDistances(got, wanted, 1);
        sum.samples++;
        sum.error += error!;
        sum.norm += norm!;
      }
    }
  });
  return sums.map((own) =>
    [...own].flatMap(([layer, byGroup]) =>
      byGroup.flatMap(({ error, norm, samples }, timeGroup) =>
        samples === 0 || norm === 0 ? [] : [{ layer, timeGroup, samples, relativeError: error / norm }]
      )
    )
  );
}
