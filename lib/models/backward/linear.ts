/**
 * Linear layers whose codes are frozen and whose scales, zero points and biases are being refined: real-valued parameters, the rounded ones that
 * the forward pass uses and that will be stored, and gradients.
 */
import { dequantize, groupCount, type OneLevelTensor } from "../../quant/mod.ts";
import type { TimeGroups } from "../../time/mod.ts";
import type { DenseMatrix, Matrix } from "../layers/kernels.ts";
import type { Operations } from "../layers/operations.ts";
import type { LinearLayer } from "../layers/tensors.ts";
import type { Workspace } from "../layers/workspace.ts";
import type { BackwardOperations } from "./kernels.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Elements of a weight gradient that are held at once: a layer of 7 B is done in blocks of rows. */
const GRADIENT_ELEMENTS = 2 ** 22;

/** What of a layer is refined. */
export interface RefinedParts {
  readonly scales: boolean;
  readonly zeroPoints: boolean;
  readonly biases: boolean;
  /** Time groups that get a bias each, beside the layer's own; 0 for none. */
  readonly timeGroups: number;
}

/** Parameters of one kind of one layer, with what an optimizer needs. */
export interface ParameterArray {
  /** As in `model.layers.0.mlp.up_proj.weight scale`. */
  readonly name: string;
  readonly values: Floats;
  readonly gradients: Floats;
  /** What a step of 1 stands for: the optimizer works in these units. */
  readonly units: Floats;
}

/** A linear layer on its way to better parameters. Its codes never change. */
export class RefinableLinear {
  readonly rows: number;
  readonly cols: number;
  /** The layer as the forward pass sees it: its scales, zero points and bias are this object's own. */
  readonly layer: LinearLayer;
  readonly parameters: readonly ParameterArray[];
  readonly #packed: OneLevelTensor | undefined;
  readonly #scale: ParameterArray | undefined;
  readonly #zeroPoint: ParameterArray | undefined;
  readonly #bias: ParameterArray | undefined;
  /** `f32[time groups, rows]` */
  readonly #timeBias: ParameterArray | undefined;

  /** @throws {TypeError} when the layer has two-level scales */
  constructor(layer: LinearLayer, parts: RefinedParts) {
    const { weights } = layer;
    this.rows = weights.rows;
    this.cols = weights.cols;
    const packed = "packed" in weights ? weights : undefined;
    if (packed?.scaleBits !== undefined) {
      throw new TypeError(
        `Cannot refine ${JSON.stringify(layer.name)}: it must have one level of scales, got two-level scales`,
      );
    }
    if (packed?.rotation !== undefined) {
      throw new TypeError(
        `Cannot refine ${
          JSON.stringify(layer.name)
        }: its inputs must not be rotated, got a Hadamard rotation`,
      );
    }
    const own: OneLevelTensor | undefined = packed && {
      ...packed,
      scale: packed.scale.slice(),
      zeroPoint: packed.zeroPoint?.slice(),
    };
    this.#packed = own;
    const bias = layer.bias?.slice();
    this.layer = { name: layer.name, weights: own ?? weights, bias };
    if (own !== undefined) {
      const scale = fromHalves(own.scale);
      // A scale moves by shares of itself, a zero point by shares of a code.
      if (parts.scales) {
        this.#scale = parameter(`${layer.name} scale`, scale, scale.map((s) => Math.abs(s) || 1));
      }
      if (parts.zeroPoints && own.zeroPointKind === "real" && own.zeroPoint !== undefined) {
        const zeroPoint = fromHalves(own.zeroPoint);
        this.#zeroPoint = parameter(
          `${layer.name} zero_point`,
          zeroPoint,
          new Float32Array(zeroPoint.length).fill(1),
        );
      }
    }
    if (parts.biases && own !== undefined && bias !== undefined) {
      const rms = Math.sqrt(bias.reduce((sum, value) => sum + value * value, 0) / bias.length);
      this.#bias = parameter(
        `${layer.name} bias`,
        bias.slice(),
        new Float32Array(bias.length).fill(rms || 1),
      );
    }
    if (parts.timeGroups > 0 && own !== undefined) {
      const values = new Float32Array(parts.timeGroups * this.rows);
      // A unit is what rounding the weights does to an output of inputs of size 1.
      const step = fromHalves(own.scale).reduce((sum, s) => sum + Math.abs(s), 0) / own.scale.length;
      const units = new Float32Array(values.length).fill(step * Math.sqrt(this.cols / 12) || 1);
      this.#timeBias = parameter(`${layer.name} time_bias`, values, units);
    }
    this.parameters = [this.#scale, this.#zeroPoint, this.#bias, this.#timeBias].filter((p) =>
      p !== undefined
    );
  }

  /** Biases by time group, `f32[time groups, rows]`, undefined where there are none. */
  get timeBias(): ParameterArray | undefined {
    return this.#timeBias;
  }

  /** `x: f32[tokens, cols]` → `out: f32[tokens, rows]`; `groups: i32[tokens]` has the time group of each token. */
  forward(
    operations: Operations,
    x: Float32Array,
    tokens: number,
    out: Floats,
    groups: Int32Array | undefined,
  ): void {
    operations.linear(this.layer, x, tokens, out);
    if (this.#timeBias === undefined) return;
    const { values } = this.#timeBias, { rows } = this;
    for (let t = 0; t < tokens; t++) {
      const from = groups![t]! * rows, to = t * rows;
      for (let row = 0; row < rows; row++) out[to + row]! += values[from + row]!;
    }
  }

  /** Rounds the parameters to what is stored and hands them to the forward pass. */
  store(): void {
    if (this.#scale !== undefined) toHalves(this.#scale.values, this.#packed!.scale);
    if (this.#zeroPoint !== undefined) toHalves(this.#zeroPoint.values, this.#packed!.zeroPoint!);
    if (this.#bias !== undefined) this.layer.bias!.set(this.#bias.values);
  }

  clearGradients(): void {
    for (const { gradients } of this.parameters) gradients.fill(0);
  }

  /** Gradients of the parameters, added up; `x: f32[tokens, cols]`, `dy: f32[tokens, rows]`, `xT` is x transposed, made when it is needed. */
  backwardParameters(
    operations: Operations,
    backward: BackwardOperations,
    workspace: Workspace,
    dy: Float32Array,
    tokens: number,
    xT: () => Float32Array,
    timeGroups: Int32Array | undefined,
  ): void {
    const { rows, cols } = this;
    if (this.#timeBias !== undefined) {
      const { gradients } = this.#timeBias;
      for (let t = 0; t < tokens; t++) {
        const to = timeGroups![t]! * rows, from = t * rows;
        for (let row = 0; row < rows; row++) gradients[to + row]! += dy[from + row]!;
      }
    }
    if (this.#bias !== undefined) {
      const sums = workspace.take("bias gradient", rows);
      backward.columnSums(dy, undefined, { batch: 1, tokens, cols: rows }, sums);
      addTo(this.#bias.gradients, sums, 0);
    }
    const packed = this.#packed;
    if (packed === undefined || (this.#scale === undefined && this.#zeroPoint === undefined)) return;
    const groups = groupCount(cols, packed.groupSize), words = packed.packed.length / rows;
    const dyT = workspace.take("output gradient, transposed", rows * tokens);
    backward.transpose(dy, tokens, rows, dyT);
    const input: DenseMatrix = { rows: cols, cols: tokens, dtype: "F32", data: xT() };
    const block = Math.max(1, Math.min(rows, Math.floor(GRADIENT_ELEMENTS / cols)));
    for (let first = 0; first < rows; first += block) {
      const count = Math.min(block, rows - first), end = first + count;
      const dw = workspace.take("weight gradient", count * cols);
      // dW = dyᵀ x: rows of dyᵀ are the "tokens" of a linear layer with the weights xᵀ.
      operations.linear(
        { name: "", weights: input, bias: undefined },
        dyT.subarray(first * tokens, end * tokens),
        count,
        dw,
      );
      const part: OneLevelTensor = {
        ...packed,
        rows: count,
        packed: packed.packed.subarray(first * words, end * words),
        scale: packed.scale.subarray(first * groups, end * groups),
        zeroPoint: packed.zeroPoint?.subarray(first * groups, end * groups),
      };
      const dscale = workspace.take("scale gradient", count * groups);
      const dzero = this.#zeroPoint && workspace.take("zero point gradient", count * groups);
      backward.packedGradient(dw, part, dscale, dzero);
      if (this.#scale !== undefined) addTo(this.#scale.gradients, dscale, first * groups);
      if (dzero !== undefined) addTo(this.#zeroPoint!.gradients, dzero, first * groups);
    }
  }

  /** `dx = dy W`: `dy: f32[tokens, rows]` → `dx: f32[tokens, cols]`. */
  backwardInput(
    operations: Operations,
    backward: BackwardOperations,
    workspace: Workspace,
    dy: Float32Array,
    tokens: number,
    dx: Floats,
  ): void {
    const { rows, cols } = this;
    const dense = denseValues(operations, this.layer.weights, workspace);
    const turned = workspace.take("weights, transposed", rows * cols);
    backward.transpose(dense, rows, cols, turned);
    const weights: DenseMatrix = { rows: cols, cols: rows, dtype: "F32", data: turned };
    operations.linear({ name: this.layer.name, weights, bias: undefined }, dy, tokens, dx);
  }
}

/** Time parameters are no part of the gradients' forward pass. @throws {TypeError} when a model has some */
export function refuseTimeParameters(
  model: { readonly path: string; readonly timeParameters: unknown },
): void {
  if (model.timeParameters === undefined) return;
  throw new TypeError(
    `Cannot compute gradients of ${
      JSON.stringify(model.path)
    }: it must be loaded without time parameters, got some`,
  );
}

/** What the way back through linear layers works with. */
export interface BackwardContext {
  readonly operations: Operations;
  readonly backward: BackwardOperations;
  readonly workspace: Workspace;
}

/**
 * The way back through layers that read the same input: their parameters' gradients grow, and the gradients of `x` add up in `dx`, which is
 * overwritten; undefined where nobody wants it.
 *
 * **Shapes** `x: f32[tokens, cols]`, each `dy: f32[tokens, rows of its layer]` → `dx: f32[tokens, cols]`; `groups: i32[tokens]` as in `forward`
 */
export function backwardLinears(
  { operations, backward, workspace }: BackwardContext,
  layers: readonly (readonly [RefinableLinear, Floats])[],
  x: Float32Array,
  tokens: number,
  dx: Floats | undefined,
  groups: Int32Array | undefined,
): void {
  const cols = layers[0]![0].cols;
  let turned: Floats | undefined;
  const xT = () => {
    if (turned === undefined) {
      turned = workspace.take("input, transposed", x.length);
      backward.transpose(x, tokens, cols, turned);
    }
    return turned;
  };
  for (const [i, [layer, dy]] of layers.entries()) {
    layer.backwardParameters(operations, backward, workspace, dy, tokens, xT, groups);
    if (dx === undefined) continue;
    const part = i === 0 ? dx : workspace.take("input gradient", x.length);
    layer.backwardInput(operations, backward, workspace, dy, tokens, part);
    if (i > 0) operations.add(dx, part, dx);
  }
}

function parameter(name: string, values: Floats, units: Floats): ParameterArray {
  return { name, values, gradients: new Float32Array(values.length), units };
}

/** The time group of every token of items that have equally many. @throws {TypeError} when there is not a time for each item */
export function groupsOfTokens(
  timeGroups: TimeGroups | undefined,
  times: ArrayLike<number> | undefined,
  items: number,
  tokens: number,
): Int32Array | undefined {
  if (timeGroups === undefined) return undefined;
  if (times === undefined || times.length !== items) {
    throw new TypeError(
      `Cannot compute gradients: every one of ${items} items must have a time, got ${times?.length}`,
    );
  }
  const groups = new Int32Array(items * tokens);
  for (let item = 0; item < items; item++) {
    groups.fill(timeGroups.groupOf(times[item]!), item * tokens, (item + 1) * tokens);
  }
  return groups;
}

function addTo(target: Float32Array, values: Float32Array, first: number): void {
  for (let i = 0; i < values.length; i++) target[first + i]! += values[i]!;
}

function halves(bits: Uint16Array<ArrayBuffer>): Float16Array<ArrayBuffer> {
  return new Float16Array(bits.buffer, bits.byteOffset, bits.length);
}

function fromHalves(bits: Uint16Array<ArrayBuffer>): Floats {
  return Float32Array.from(halves(bits));
}

function toHalves(values: Float32Array, bits: Uint16Array<ArrayBuffer>): void {
  halves(bits).set(values);
}

/** A matrix as float32 values; scratch unless it is stored so. */
function denseValues(operations: Operations, weights: Matrix, workspace: Workspace): Float32Array {
  if ("packed" in weights) {
    return dequantize(operations.kernels, weights, "F32");
  }
  if (weights.data instanceof Float32Array) return weights.data;
  const out = workspace.take("weights", weights.rows * weights.cols);
  if (weights.dtype === "F16") {
    out.set(new Float16Array(weights.data.buffer as ArrayBuffer, weights.data.byteOffset, out.length));
    return out;
  }
  const words = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < words.length; i++) words[i] = weights.data[i]! << 16;
  return out;
}
