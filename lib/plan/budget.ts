/**
 * Bits by budget: how much each layer's error costs the model is measured, and the bits and group sizes that
 * cost least within the bytes allowed are found. The plan is data: printed, saved, edited, replayed.
 */
import { CalibrationError, FormatError } from "../errors.ts";
import { isJsonObject, JsonFault, parseJson } from "../files/json.ts";
import { quote, readWhole } from "../files/whole.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  GROUP_SIZES,
  type GroupSize,
  packedBytes,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "../quant/mod.ts";

/** Steps into which a budget is divided: a layer's bytes are rounded up to one of them. */
const BUDGET_STEPS = 100_000;
/** Largest plan read: ten thousand layers of 200 bytes. */
const MAX_PLAN_BYTES = 16 * 2 ** 20;
/** Bounds on a plan's JSON: an object of objects of four plain values. */
const PLAN_RULES = { maxDepth: 3, maxKeys: 1_000_000, maxItems: 0, integersOnly: false };

/** One way to store a layer. */
export interface LayerOption {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  readonly bytes: number;
  /** Loss of the model, in the unit of the held-out distance. */
  readonly cost: number;
}

/** A layer with the ways to store it. */
export interface LayerOptions {
  readonly name: string;
  readonly options: readonly LayerOption[];
}

/** Bits and group size by the name of a layer's weight. */
export type BitPlan = ReadonlyMap<string, LayerGrid>;

/** Bits, groups and zero points of a layer in a plan. */
export interface LayerGrid {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
}

/** A plan that fits a budget, and what it is expected to cost. */
export interface BudgetedPlan {
  readonly plan: BitPlan;
  readonly bytes: number;
  readonly cost: number;
}

/** Bytes of a layer at given bits. */
export function optionBytes(
  [rows, cols]: readonly [number, number],
  bits: BitWidth,
  groupSize: GroupSize,
  zeroPoint: ZeroPointKind,
): number {
  return packedBytes({ rows, cols, bits, groupSize, zeroPoint });
}

/**
 * The choice of one option a layer whose summed cost is least within a number of bytes: the multiple-choice
 * knapsack by dynamic programming (Sinha and Zoltners, 1979), exact for bytes rounded up to a 100 000th of
 * the budget.
 *
 * @throws {CalibrationError} when even the smallest options do not fit, saying what would
 */
export function fitBudget(layers: readonly LayerOptions[], budgetBytes: number): BudgetedPlan {
  const least = layers.reduce((sum, { options }) => sum + Math.min(...options.map(({ bytes }) => bytes)), 0);
  if (!(least <= budgetBytes)) {
    throw new CalibrationError(
      `Cannot fit the layers into ${Math.floor(budgetBytes)} bytes: the smallest forms need ${least}`,
    );
  }
  const all = layers.reduce((sum, { options }) => sum + Math.max(...options.map(({ bytes }) => bytes)), 0);
  // Rounding up may leave the smallest forms without room: then steps as fine as bytes.
  const unit = Math.max(1, Math.floor(Math.min(budgetBytes, all) / BUDGET_STEPS));
  for (const step of [unit, 1]) {
    const size = Math.floor(Math.min(budgetBytes, all + layers.length * step) / step);
    let best = new Float64Array(size + 1); // least cost of the layers so far within so many steps
    const chosen: Uint8Array[] = [];
    for (const { options } of layers) {
      const next = new Float64Array(size + 1).fill(Infinity), choice = new Uint8Array(size + 1);
      for (const [i, { bytes, cost }] of options.entries()) {
        const steps = Math.ceil(bytes / step);
        for (let at = steps; at <= size; at++) {
          const value = best[at - steps]! + cost;
          if (value < next[at]!) {
            next[at] = value;
            choice[at] = i;
          }
        }
      }
      best = next;
      chosen.push(choice);
    }
    if (best[size] === Infinity) continue;
    const plan = new Map<string, LayerOption>();
    let at = size;
    for (let i = layers.length - 1; i >= 0; i--) {
      const { name, options } = layers[i]!;
      const option = options[chosen[i]![at]!]!;
      plan.set(name, option);
      at -= Math.ceil(option.bytes / step);
    }
    const picked = layers.map(({ name }) => plan.get(name)!);
    return {
      plan: new Map(layers.map(({ name }, i) => {
        const { bits, groupSize, zeroPoint } = picked[i]!;
        return [name, { bits, groupSize, zeroPoint }];
      })),
      bytes: picked.reduce((sum, { bytes }) => sum + bytes, 0),
      cost: picked.reduce((sum, { cost }) => sum + cost, 0),
    };
  }
  throw new CalibrationError(`Cannot fit the layers into ${Math.floor(budgetBytes)} bytes`);
}

// Plans as files
// -----------------------------------------------------------------------------------------------

/** A plan as JSON that people can edit. */
export function planText(plan: BitPlan): string {
  const layers = [...plan].map(([name, { bits, groupSize, zeroPoint }]) =>
    `  ${JSON.stringify(name)}: {"bits": ${bits}, "group_size": ${groupSize}, "zero_point": "${zeroPoint}"}`
  );
  return `{\n "version": 1,\n "layers": {\n${layers.join(",\n")}\n }\n}\n`;
}

/** Keys of a layer in a plan, with what they may be. */
const ENTRY = { zero_point: ZERO_POINT_KINDS, bits: BIT_WIDTHS, group_size: GROUP_SIZES };

/**
 * Reads a plan.
 *
 * @param known names of the tensors that can be quantized
 * @throws {FormatError} when the file is no plan, or names bits or group sizes that there are not
 * @throws {CalibrationError} when it names layers that the model lacks, listing them
 */
export function readPlan(path: string, known: ReadonlySet<string>): BitPlan {
  const fail = (message: string, cause?: unknown) =>
    new FormatError(`Cannot read the plan ${quote(path)}: ${message}`, { path, cause });
  const bytes = readWhole(path, MAX_PLAN_BYTES, fail);
  let value: unknown;
  try {
    value = parseJson(bytes, PLAN_RULES);
  } catch (cause) {
    if (!(cause instanceof JsonFault)) throw cause;
    throw fail(`must be JSON: ${cause.message}`, cause);
  }
  const { version, layers } = isJsonObject(value) ? value : {};
  if (version !== 1 || !isJsonObject(layers)) {
    throw fail('must be {"version": 1, "layers": {name: {"bits", "group_size", "zero_point"}}}');
  }
  const plan = planOfLayers(layers, fail), absent = [...plan.keys()].filter((name) => !known.has(name));
  if (absent.length > 0) {
    const more = absent.length > 5 ? ` and ${absent.length - 5} more` : "";
    const reason = `it must name layers of the model, got ${absent.slice(0, 5).map(quote).join(", ")}${more}`;
    throw new CalibrationError(`Cannot use the plan ${quote(path)}: ${reason}`, { path });
  }
  return plan;
}

/** The plan of a JSON object of layers. @param fail makes the error for one that is none */
export function planOfLayers(
  layers: Readonly<Record<string, unknown>>,
  fail: (message: string) => FormatError,
): BitPlan {
  const plan = new Map<string, LayerGrid>();
  for (const [name, entry] of Object.entries(layers)) {
    const own = isJsonObject(entry) ? entry : {}, keys = Object.keys(ENTRY);
    const unknown = Object.keys(own).find((key) => !keys.includes(key));
    if (unknown !== undefined) {
      throw fail(`${quote(name)} must have bits, group_size and zero_point alone, got ${quote(unknown)}`);
    }
    for (const [key, allowed] of Object.entries(ENTRY)) {
      if (allowed.includes(own[key] as never)) continue;
      throw fail(
        `${key} of ${quote(name)} must be one of ${allowed.join(", ")}, got ${JSON.stringify(own[key])}`,
      );
    }
    const { bits, group_size: groupSize, zero_point: zeroPoint } = own;
    plan.set(name, { bits, groupSize, zeroPoint } as LayerGrid);
  }
  return plan;
}
