/**
 * Linear layers whose activations, outputs or weight scales depend on time: θ is bound to a model's layers
 * when it is loaded, and selected for each item of a batch at every forward pass, without allocation and
 * without a branch per weight.
 *
 * Quantized activations go through the integer kernels where the layer is packed with one level of scales, or
 * with trellis codes that are not rotated; elsewhere they are rounded in float32: to the same values with
 * static parameters, to about the same per token, where the integer kernel computes the parameters in another
 * way.
 */
import type { ActivationGrid, SelectedParameters, TimeParameters } from "../../time/mod.ts";
import { groupCount, type OneLevelTensor } from "../../quant/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { modulate } from "./elementwise.ts";
import { type IntegerWeights, takesIntegers } from "./int8.ts";
import type { IntegerProducts } from "./integer_products.ts";
import type { LinearLayer } from "./tensors.ts";
import type { Workspace } from "./workspace.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A layer at one time. */
interface Prepared {
  /** Without bias where the output is corrected. */
  readonly layer: LinearLayer;
  readonly grid: ActivationGrid | undefined;
  readonly isPerToken: boolean;
  readonly bits: SelectedParameters["bits"];
  /** The weights, where integer kernels multiply them. */
  readonly integer: IntegerWeights | undefined;
  /** Name of the scratch for rounded activations: layers as wide share it. */
  readonly scratch: string;
  readonly gainLessOne: Floats | undefined;
  /** What is added to the output where it is corrected, the layer's bias included. */
  readonly shift: Floats | undefined;
}

/** θ bound to a model's linear layers. */
export class TimeAwareLayers {
  readonly #prepared: ReadonlyMap<LinearLayer, readonly Prepared[]>;
  readonly #kernels: Kernels;
  readonly #workspace: Workspace;
  readonly #products: IntegerProducts;
  /** Bin of each item of the current batch. */
  #bins = new Int32Array(16);
  #items = 0;
  #isUniform = true;

  /** @throws {TypeError} when θ has a layer that the model lacks, or one of another size */
  constructor(
    readonly parameters: TimeParameters,
    kernels: Kernels,
    layers: Iterable<LinearLayer>,
    path: string,
    workspace: Workspace,
    products: IntegerProducts,
  ) {
    this.#workspace = workspace;
    this.#kernels = kernels;
    this.#products = products;
    const byName = new Map([...layers].map((layer) => [layer.name, layer]));
    const prepared = new Map<LinearLayer, readonly Prepared[]>();
    for (const name of parameters.layers.keys()) {
      const layer = byName.get(name);
      if (layer === undefined) {
        throw new TypeError(
          `Cannot load ${JSON.stringify(path)}: its time parameters must be of its linear layers, got ${
            JSON.stringify(name)
          }`,
        );
      }
      const seen = new Map<SelectedParameters, Prepared>(), shifts = new Map<Floats, Floats>();
      prepared.set(
        layer,
        Array.from({ length: parameters.groups.axis.bins }, (_, bin) => {
          const selected = parameters.atBin(name, bin)!;
          const made = seen.get(selected) ?? prepare(layer, selected, shifts, path);
          seen.set(selected, made);
          for (const array of constantsOf(made)) kernels.arrays.constant(array);
          return made;
        }),
      );
    }
    this.#prepared = prepared;
  }

  /** Selects θ by one time for all items, or one each. @throws {RangeError} when one is outside the axis */
  begin(times: number | ArrayLike<number> | undefined, items: number): void {
    if (times === undefined) {
      throw new RangeError("Cannot run a model with time parameters: t must be given, got undefined");
    }
    if (typeof times !== "number" && times.length !== items) {
      throw new RangeError(
        `Cannot run a model with time parameters: t must be one number or ${items}, got ${times.length}`,
      );
    }
    if (this.#bins.length < items) this.#bins = new Int32Array(items);
    const { axis } = this.parameters.groups;
    this.#isUniform = true;
    for (let item = 0; item < items; item++) {
      const bin = axis.binOf(typeof times === "number" ? times : times[item]!);
      this.#bins[item] = bin;
      if (bin !== this.#bins[0]) this.#isUniform = false;
    }
    this.#items = items;
  }

  /** A layer with the weights of the selected times, once for each that differ. */
  selected(layer: LinearLayer): LinearLayer[] {
    const prepared = this.#prepared.get(layer);
    if (prepared === undefined) return [layer];
    return [...new Set(Array.from(this.#bins.subarray(0, this.#items), (bin) => prepared[bin]!.layer))];
  }

  /**
   * A linear layer at the selected times; rows of `x` belong to the items in equal parts, or row i to item
   * `⌊rows[i] / rowsOfItem⌋`.
   *
   * **Shapes** `x: f32[count, cols]` → `out: f32[count, layer's rows]`
   */
  linear(
    layer: LinearLayer,
    x: Float32Array,
    count: number,
    out: Floats,
    rows?: Int32Array,
    rowsOfItem: number = count / this.#items,
  ): void {
    const prepared = this.#prepared.get(layer);
    if (prepared === undefined) return this.#products.linear(layer, x, count, out);
    if (this.#isUniform) return this.#run(prepared[this.#bins[0]!]!, x, count, out);
    const { rows: outputs, cols } = layer.weights;
    const binOf = (row: number) =>
      this.#bins[Math.floor((rows === undefined ? row : rows[row]!) / rowsOfItem)]!;
    for (let begin = 0; begin < count;) {
      const bin = binOf(begin);
      let end = begin + 1;
      while (end < count && binOf(end) === bin) end++;
      this.#run(
        prepared[bin]!,
        x.subarray(begin * cols, end * cols),
        end - begin,
        out.subarray(begin * outputs, end * outputs),
      );
      begin = end;
    }
  }

  #run(prepared: Prepared, x: Float32Array, count: number, out: Floats): void {
    const { layer, gainLessOne, shift, grid, bits, integer, isPerToken } = prepared, kernels = this.#kernels;
    if (grid === undefined && !isPerToken) this.#products.linear(layer, x, count, out);
    else if (integer === undefined) {
      this.#products.inFloats(layer, this.#rounded(prepared, x, count), count, out);
    } else this.#products.multiply(layer, integer, x, count, out, { bits, grid });
    if (gainLessOne !== undefined) {
      const shape = { batch: 1, tokens: count, cols: layer.weights.rows };
      modulate(kernels, out, { scale: gainLessOne, shift: shift! }, shape, out);
    }
  }

  /** Quantized activations, in float32. */
  #rounded({ layer, grid, bits, scratch }: Prepared, x: Float32Array, count: number): Floats {
    const out = this.#kernels.arrays.hold(this.#workspace.take(scratch, x.length), true);
    return this.#products.round(layer.name, x, count, { bits, grid }, out);
  }
}

/** Arrays of a time that kernels read. */
function constantsOf({ layer: { weights }, gainLessOne, shift }: Prepared): ArrayBufferView[] {
  const scales = "packed" in weights && weights.scaleBits === undefined
    ? [weights.scale, weights.zeroPoint]
    : [];
  return [...scales, gainLessOne, shift].filter((array) => array !== undefined);
}

/** @param shifts by the correction that the layer's bias is added to, of times that were prepared before */
function prepare(
  layer: LinearLayer,
  selected: SelectedParameters,
  shifts: Map<Floats, Floats>,
  path: string,
): Prepared {
  const { weights, bias } = layer;
  const fail = (reason: string) =>
    new TypeError(
      `Cannot load ${JSON.stringify(path)}: the time parameters of ${JSON.stringify(layer.name)} ${reason}`,
    );
  const { gainLessOne, bias: correction, weightScale, weightZeroPoint } = selected;
  if (gainLessOne !== undefined && gainLessOne.length !== weights.rows) {
    throw fail(`must have ${weights.rows} gains, got ${gainLessOne.length}`);
  }
  let own = weights;
  if (weightScale !== undefined) {
    if (!("packed" in weights)) {
      throw fail("have weight scales: the layer must be packed, got full precision");
    }
    if (weights.scaleBits !== undefined) {
      throw fail("have weight scales: the layer must have one level of scales, got two-level scales");
    }
    const scales = weights.rows * groupCount(weights.cols, weights.groupSize);
    const isSymmetric = weights.zeroPoint === undefined;
    if (weightScale.length !== scales || (weightZeroPoint === undefined) !== isSymmetric) {
      throw fail(
        `must have ${scales} weight scales ${
          isSymmetric ? "alone" : "and zero points"
        }, got ${weightScale.length}`,
      );
    }
    own = { ...weights, scale: weightScale, zeroPoint: weightZeroPoint } satisfies OneLevelTensor;
  }
  const isCorrected = gainLessOne !== undefined;
  let shift = correction;
  if (isCorrected && bias !== undefined) {
    shift = shifts.get(correction!) ?? correction!.map((value, i) => value + bias[i]!);
    shifts.set(correction!, shift);
  }
  return {
    layer: { name: layer.name, weights: own, bias: isCorrected ? undefined : bias },
    grid: selected.grid,
    isPerToken: selected.isPerToken,
    bits: selected.bits,
    integer: takesIntegers(own) ? own : undefined,
    scratch: `activations ${weights.cols}`,
    gainLessOne,
    shift,
  };
}
