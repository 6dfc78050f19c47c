/**
 * Linear layers whose codes are frozen and whose scales, zero points and biases are being refined:
 * real-valued parameters, the rounded ones that the forward pass uses and that will be stored, and gradients.
 */
import type { Kernels } from "../../native/mod.ts";
import { dequantize, groupCount, type OneLevelTensor, type TwoLevelTensor } from "../../quant/mod.ts";
import { PagedFloats } from "../../output/paged_floats.ts";
import { entropyLoss } from "../../thermo/losses.ts";
import type { Parameters } from "../../thermo/optimizer/mod.ts";
import type { TimeGroups } from "../../time/mod.ts";
import { isRotated, linesOf, packedRows } from "../../quant/packed/layout.ts";
import { add } from "../layers/elementwise.ts";
import { type DenseMatrix, linear } from "../layers/linear.ts";
import { type LinearLayer, widen } from "../layers/tensors.ts";
import { Tape } from "../layers/tape.ts";
import { Workspace } from "../layers/workspace.ts";
import { columnSums, packedGradient, transpose, trellisGradient } from "./kernels.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Elements of a weight gradient that are held at once: a layer of 7 B is done in blocks of rows. */
const GRADIENT_ELEMENTS = 2 ** 22;

/** Elements of a matrix that is transposed at once. */
const TURNED_ELEMENTS = 2 ** 24;

/** The parameters of a layer that are refined. */
export interface RefinedParts {
  readonly scales: boolean;
  readonly zeroPoints: boolean;
  readonly biases: boolean;
  /** Time groups that get a bias each, beside the layer's own; 0 for none. */
  readonly timeGroups: number;
}

/** Parameters of one kind of one layer, with what an optimizer needs; they may lie in a file meanwhile. */
class ParameterArray implements Parameters {
  readonly #memory: PagedFloats;

  /**
   * @param name as in `model.layers.0.mlp.up_proj.weight scale`
   * @param values not kept
   * @param units sizes of a step of 1: the optimizer works in these units
   */
  constructor(memory: PagedFloats, readonly name: string, values: Floats, units: Floats) {
    this.#memory = memory;
    this.length = values.length;
    this.values.set(values);
    memory.take(`${name} units`, this.length).set(units);
  }

  readonly length: number;

  get values(): Floats {
    return this.#memory.take(`${this.name} values`, this.length);
  }

  get gradients(): Floats {
    return this.#memory.take(`${this.name} gradients`, this.length);
  }

  get units(): Float32Array {
    return this.#memory.read(`${this.name} units`, this.length);
  }

  /** Values that will not be changed. */
  get current(): Float32Array {
    return this.#memory.read(`${this.name} values`, this.length);
  }

  clearGradients(): void {
    this.#memory.clear(`${this.name} gradients`);
  }
}

type Halves = Uint16Array<ArrayBuffer>;

/** A packed tensor with copies of what is refined. */
const withOwnScales = (packed: OneLevelTensor | TwoLevelTensor): OneLevelTensor | TwoLevelTensor =>
  packed.scaleBits === undefined
    ? { ...packed, scale: packed.scale.slice(), zeroPoint: packed.zeroPoint?.slice() }
    : { ...packed, subScale: packed.subScale.slice(), subMin: packed.subMin.slice() };

/** A linear layer on its way to better parameters. Its codes never change. */
export class RefinableLinear {
  readonly rows: number;
  readonly cols: number;
  /** The layer as the forward pass sees it, with copies of scales, zero points and bias. */
  readonly layer: LinearLayer;
  readonly parameters: readonly ParameterArray[];
  readonly #packed: OneLevelTensor | TwoLevelTensor | undefined;
  /** Half floats of scales, and of zero points or of the offsets of trellis codes. */
  readonly #scales: Halves | undefined;
  readonly #zeroPoints: Halves | undefined;
  readonly #scale: ParameterArray | undefined;
  readonly #zeroPoint: ParameterArray | undefined;
  readonly #bias: ParameterArray | undefined;
  /** `f32[time groups, rows]` */
  readonly #timeBias: ParameterArray | undefined;

  /** @throws {TypeError} when the layer has two-level or coded scales, or rotated weights */
  constructor(layer: LinearLayer, parts: RefinedParts, memory: PagedFloats = new PagedFloats()) {
    const { weights } = layer;
    const parameter = (name: string, values: Floats, units: Floats) =>
      new ParameterArray(memory, `${layer.name} ${name}`, values, units);
    this.rows = weights.rows;
    this.cols = weights.cols;
    const packed = "packed" in weights ? weights : undefined;
    const fail = (reason: string) => new TypeError(`Cannot refine ${JSON.stringify(layer.name)}: ${reason}`);
    if (packed?.scaleBits !== undefined && packed.codes !== "trellis") {
      throw fail("it must have one level of scales, got two-level scales");
    }
    if (packed?.scaleBits !== undefined && packed.scaleGrid !== undefined) {
      throw fail("its scales must be half floats, got coded ones: quantize with scale_bits 16");
    }
    if (packed !== undefined && isRotated(packed)) {
      throw fail("its weights must not be rotated: quantize with scale_bits 16");
    }
    const own = packed && withOwnScales(packed), isTrellis = own?.scaleBits !== undefined;
    this.#packed = own;
    [this.#scales, this.#zeroPoints] = own === undefined
      ? []
      : own.scaleBits === undefined
      ? [own.scale, own.zeroPoint]
      : linesOf(own);
    const bias = layer.bias?.slice();
    this.layer = { name: layer.name, weights: own ?? weights, bias };
    if (own !== undefined) {
      const scale = fromHalves(this.#scales!);
      // A scale moves by shares of itself, a zero point by shares of a code.
      if (parts.scales) {
        this.#scale = parameter("scale", scale, scale.map((s) => Math.abs(s) || 1));
      }
      const isReal = own.scaleBits !== undefined || own.zeroPointKind === "real";
      if (parts.zeroPoints && isReal && this.#zeroPoints !== undefined) {
        const zeroPoint = fromHalves(this.#zeroPoints);
        const units = isTrellis
          ? scale.map((s) => Math.abs(s) || 1)
          : new Float32Array(zeroPoint.length).fill(1);
        this.#zeroPoint = parameter(isTrellis ? "offset" : "zero_point", zeroPoint, units);
      }
    }
    if (parts.biases && own !== undefined && bias !== undefined) {
      const rms = Math.sqrt(bias.reduce((sum, value) => sum + value * value, 0) / bias.length);
      const units = new Float32Array(bias.length).fill(rms || 1);
      this.#bias = parameter("bias", bias, units);
    }
    if (parts.timeGroups > 0 && own !== undefined) {
      const values = new Float32Array(parts.timeGroups * this.rows);
      // A unit is the error that rounding the weights makes in an output, for inputs of size 1.
      const step = fromHalves(this.#scales!).reduce((sum, s) => sum + Math.abs(s), 0) / this.#scales!.length;
      const units = new Float32Array(values.length).fill(step * Math.sqrt(this.cols / 12) || 1);
      this.#timeBias = parameter("time_bias", values, units);
    }
    this.parameters = [this.#scale, this.#zeroPoint, this.#bias, this.#timeBias].filter((p) =>
      p !== undefined
    );
  }

  /** Biases by time group, `f32[time groups, rows]`, undefined where there are none. */
  get timeBias(): ParameterArray | undefined {
    return this.#timeBias;
  }

  /** `x: f32[tokens, cols]` → `out: f32[tokens, rows]`; `groups: i32[tokens]`, time groups of the tokens. */
  forward(
    kernels: Kernels,
    x: Float32Array,
    tokens: number,
    out: Floats,
    groups: Int32Array | undefined,
  ): void {
    linear(kernels, this.layer, x, tokens, out);
    if (this.#timeBias === undefined) return;
    const values = this.#timeBias.current, { rows } = this;
    for (let t = 0; t < tokens; t++) {
      const from = groups![t]! * rows, to = t * rows;
      for (let row = 0; row < rows; row++) out[to + row]! += values[from + row]!;
    }
  }

  /** Rounds the parameters to what is stored and hands them to the forward pass. */
  store(): void {
    if (this.#scale !== undefined) toHalves(this.#scale.current, this.#scales!);
    if (this.#zeroPoint !== undefined) toHalves(this.#zeroPoint.current, this.#zeroPoints!);
    if (this.#bias !== undefined) this.layer.bias!.set(this.#bias.current);
  }

  clearGradients(): void {
    for (const parameter of this.parameters) parameter.clearGradients();
  }

  /**
   * Adds the gradients of the entropy term times `weight` to those of scales and zero points.
   *
   * @param original the layer in full precision
   * @returns the term times `weight`, 0 for a layer that is not packed or has trellis codes
   */
  entropy(
    { kernels, workspace }: Pick<RefinableLayers, "kernels" | "workspace">,
    original: LinearLayer,
    temperature: number,
    weight: number,
  ): number {
    const packed = this.#packed;
    if (packed === undefined || packed.scaleBits !== undefined) return 0;
    const { cols, bits, groupSize } = packed;
    const scale = this.#scale?.current ?? fromHalves(packed.scale);
    const zeroPoint = this.#zeroPoint?.current ??
      (packed.zeroPoint && fromHalves(packed.zeroPoint)) ??
      new Float32Array(scale.length).fill(2 ** (bits - 1));
    const weights = denseValues(kernels, original, workspace);
    const term = entropyLoss(weights, { cols, bits, groupSize, scale, zeroPoint }, temperature);
    const gradients = [[this.#scale, term.byScale], [this.#zeroPoint, term.byZeroPoint]] as const;
    for (const [parameter, gradient] of gradients) {
      if (parameter === undefined) continue;
      const own = parameter.gradients;
      for (let i = 0; i < gradient.length; i++) own[i]! += weight * gradient[i]!;
    }
    return weight * term.loss;
  }

  /**
   * Adds the gradients of the parameters.
   *
   * **Shapes** `dy: f32[tokens, rows]`; `xT: f32[cols, tokens]`, the transposed input, made where it is
   * needed; `timeGroups: i32[tokens]`
   */
  backwardParameters(
    { kernels, workspace }: RefinableLayers,
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
      columnSums(kernels, dy, undefined, { batch: 1, tokens, cols: rows }, sums);
      addTo(this.#bias.gradients, sums, 0);
    }
    const packed = this.#packed;
    if (packed === undefined || (this.#scale === undefined && this.#zeroPoint === undefined)) return;
    const groups = groupCount(cols, packed.groupSize);
    const dyT = workspace.take("output gradient, transposed", rows * tokens);
    transpose(kernels, dy, tokens, rows, dyT);
    const input: DenseMatrix = { rows: cols, cols: tokens, dtype: "F32", data: xT() };
    const block = Math.max(1, Math.min(rows, Math.floor(GRADIENT_ELEMENTS / cols)));
    for (let first = 0; first < rows; first += block) {
      const count = Math.min(block, rows - first), end = first + count;
      const dw = workspace.take("weight gradient", count * cols);
      // dW = dyᵀ x: rows of dyᵀ are the "tokens" of a linear layer with the weights xᵀ.
      linear(kernels, { weights: input }, dyT.subarray(first * tokens, end * tokens), count, dw);
      const part = packedRows(packed, first, end);
      const dscale = workspace.take("scale gradient", count * groups);
      const dzero = this.#zeroPoint && workspace.take("zero point gradient", count * groups);
      if (part.scaleBits === undefined) packedGradient(kernels, dw, part, dscale, dzero);
      else {trellisGradient(
          kernels,
          dw,
          part,
          dscale,
          dzero ?? workspace.take("offset gradient", count * groups),
        );}
      if (this.#scale !== undefined) addTo(this.#scale.gradients, dscale, first * groups);
      if (dzero !== undefined) addTo(this.#zeroPoint!.gradients, dzero, first * groups);
    }
  }

  /** `dx = dy W`: `dy: f32[tokens, rows]` → `dx: f32[tokens, cols]`. */
  backwardInput({ kernels, workspace }: RefinableLayers, dy: Float32Array, tokens: number, dx: Floats): void {
    const { rows, cols, layer } = this, block = Math.max(1, Math.floor(TURNED_ELEMENTS / cols));
    const turnedOf = (from: Float32Array, count: number) => {
      const data = workspace.take("weights, transposed", count * cols);
      transpose(kernels, from, count, cols, data);
      return { weights: { rows: cols, cols: count, dtype: "F32", data } } as const;
    };
    if (block >= rows) {
      linear(kernels, turnedOf(denseValues(kernels, layer, workspace), rows), dy, tokens, dx);
      return;
    }
    // A head of a large vocabulary would take gigabytes: some of its rows at a time.
    for (let begin = 0; begin < rows; begin += block) {
      const end = Math.min(rows, begin + block), count = end - begin;
      const own = workspace.take("output gradient, some columns", tokens * count);
      for (let t = 0; t < tokens; t++) own.set(dy.subarray(t * rows + begin, t * rows + end), t * count);
      const part = begin === 0 ? dx : workspace.take("input gradient, some rows", tokens * cols);
      linear(kernels, turnedOf(denseRows(kernels, layer, workspace, begin, end), count), own, tokens, part);
      if (begin > 0) add(kernels, dx, part, dx);
    }
  }
}

/** How gradients are computed. */
export interface GradientOptions {
  /** Parameters that are refined. Default scales, zero points and biases. */
  readonly parts?: Partial<Omit<RefinedParts, "timeGroups">> | undefined;
  /** Keep only the blocks' inputs and run blocks again backward: less memory, more time. Default false. */
  readonly recompute?: boolean | undefined;
  /** Groups that get a bias each in every packed layer, beside the layer's own. Default none. */
  readonly timeGroups?: TimeGroups | undefined;
  /** Where parameters and their gradients lie; default in memory. */
  readonly memory?: PagedFloats | undefined;
}

/** A model whose linear layers can be refined. */
interface RefinableModel {
  readonly path: string;
  readonly kernels: Kernels;
  readonly timeParameters: unknown;
  readonly linearLayers: readonly LinearLayer[];
}

/** The linear layers of one model, and the memory of their gradients. */
export class RefinableLayers {
  readonly kernels: Kernels;
  readonly workspace = new Workspace();
  readonly recompute: boolean;
  /** Every linear layer, in the order of the forward pass. */
  readonly layers: readonly RefinableLinear[];
  readonly #timeGroups: TimeGroups | undefined;
  readonly #byLayer: ReadonlyMap<LinearLayer, RefinableLinear>;

  /**
   * @param frozen a layer that stays as it is
   * @throws {TypeError} when the model has time parameters: they are no part of the gradients' forward pass
   */
  constructor(model: RefinableModel, options: GradientOptions, frozen?: LinearLayer) {
    if (model.timeParameters !== undefined) {
      const path = JSON.stringify(model.path);
      throw new TypeError(
        `Cannot compute gradients of ${path}: it must be loaded without time parameters, got some`,
      );
    }
    this.kernels = model.kernels;
    this.recompute = options.recompute ?? false;
    this.#timeGroups = options.timeGroups;
    const timeGroups = options.timeGroups?.count ?? 0;
    const parts = { scales: true, zeroPoints: true, biases: true, ...options.parts, timeGroups };
    const none = { scales: false, zeroPoints: false, biases: false, timeGroups: 0 };
    this.layers = model.linearLayers.map((layer) =>
      new RefinableLinear(layer, layer === frozen ? none : parts, options.memory)
    );
    this.#byLayer = new Map(model.linearLayers.map((layer, i) => [layer, this.layers[i]!]));
  }

  /** A tape for a block. Blocks that are run again share memory; outputs are buffers `input.<index + 1>`. */
  tapeOf<Name extends string>(index: number): Tape<Name> {
    return new Tape(this.workspace, (name) => {
      if (name === "output") return `input.${index + 1}`;
      return this.recompute ? name : `${name}.${index}`;
    });
  }

  /** The model's layer with its refined parameters: `x: f32[tokens, cols]` → `out: f32[tokens, rows]`. */
  forward(layer: LinearLayer, x: Float32Array, tokens: number, out: Floats, groups?: Int32Array): void {
    this.#byLayer.get(layer)!.forward(this.kernels, x, tokens, out, groups);
  }

  /**
   * The backward pass through layers that read the same input: adds to the gradients of their parameters, and
   * overwrites `dx` with the sum of the gradients of `x`, where it is wanted.
   *
   * **Shapes** `x: f32[tokens, cols]`, each `dy: f32[tokens, rows of its layer]` → `dx: f32[tokens, cols]`;
   * `groups: i32[tokens]`, the time group of each token
   */
  backward(
    layers: readonly (readonly [LinearLayer, dy: Floats])[],
    x: Float32Array,
    dx: Floats | undefined,
    groups: Int32Array | undefined,
  ): void {
    const { kernels, workspace } = this, tokens = x.length / layers[0]![0].weights.cols;
    let turned: Floats | undefined;
    const xT = () => {
      if (turned === undefined) {
        turned = workspace.take("input, transposed", x.length);
        transpose(kernels, x, tokens, x.length / tokens, turned);
      }
      return turned;
    };
    for (const [i, [layer, dy]] of layers.entries()) {
      const refinable = this.#byLayer.get(layer)!;
      refinable.backwardParameters(this, dy, tokens, xT, groups);
      if (dx === undefined) continue;
      const part = i === 0 ? dx : workspace.take("input gradient", x.length);
      refinable.backwardInput(this, dy, tokens, part);
      if (i > 0) add(kernels, dx, part, dx);
    }
  }

  /**
   * The time group of every token of items that have equally many, undefined without time groups.
   *
   * @throws {TypeError} when there is not a time for each item
   */
  groupsOf(times: ArrayLike<number> | undefined, items: number, tokens: number): Int32Array | undefined {
    if (this.#timeGroups === undefined) return undefined;
    if (times === undefined || times.length !== items) {
      throw new TypeError(
        `Cannot compute gradients: every one of ${items} items must have a time, got ${times?.length}`,
      );
    }
    const groups = new Int32Array(items * tokens);
    for (let item = 0; item < items; item++) {
      groups.fill(this.#timeGroups.groupOf(times[item]!), item * tokens, (item + 1) * tokens);
    }
    return groups;
  }
}

/** Base of the families' gradients: the refined layers, the last call, and the tapes of its blocks. */
export abstract class ModelGradients<Call, Value extends string> {
  protected call: Call | undefined;
  protected tapes: readonly Tape<Value>[] = [];

  constructor(protected readonly linears: RefinableLayers) {}

  /** Every linear layer, in the order of the forward pass. */
  get layers(): readonly RefinableLinear[] {
    return this.linears.layers;
  }

  /** Bytes of scratch, tape included. */
  get scratchBytes(): number {
    return this.linears.workspace.bytes;
  }

  protected take(name: string, rows: number, cols: number): Floats {
    return this.linears.workspace.take(name, rows * cols);
  }

  /** Runs so many blocks, each with a new tape. */
  protected runBlocks(
    blocks: number,
    input: Floats,
    run: (i: number, x: Floats, tape: Tape<Value>) => Floats,
  ) {
    this.tapes = Array.from({ length: blocks }, (_, index) => this.linears.tapeOf(index));
    return this.tapes.reduce((hidden, tape, index) => run(index, hidden, tape), input);
  }

  /** The last call. @throws {TypeError} unless there was one, and the output's gradient has its shape */
  protected callBehind(
    name: string,
    gradient: Float32Array,
    shapeOf: (call: Call) => readonly number[],
  ): Call {
    const { call } = this, fail = (reason: string) => new TypeError(`Cannot compute gradients: ${reason}`);
    if (call === undefined) throw fail("a forward pass must come before, got none");
    const shape = shapeOf(call);
    if (gradient.length === shape.reduce((product, size) => product * size)) return call;
    throw fail(`${name} must be [${shape.join(", ")}], got ${gradient.length} numbers`);
  }
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

/** Rows of a matrix as float32 values; scratch unless it is stored so. */
function denseRows(
  kernels: Kernels,
  { weights }: LinearLayer,
  workspace: Workspace,
  begin: number,
  end: number,
): Float32Array {
  const { cols } = weights;
  if ("packed" in weights) {
    const out = workspace.take("weights", (end - begin) * cols);
    return dequantize(kernels, packedRows(weights, begin, end), "F32", out);
  }
  const dense = { ...weights };
  if (dense.data instanceof Float32Array) return dense.data.subarray(begin * cols, end * cols);
  const out = workspace.take("weights", (end - begin) * cols);
  widen(dense, begin * cols, out);
  return out;
}

/** A matrix as float32 values; scratch unless it is stored so. */
function denseValues(kernels: Kernels, { weights }: LinearLayer, workspace: Workspace): Float32Array {
  if ("packed" in weights) {
    return dequantize(kernels, weights, "F32", workspace.take("weights", weights.rows * weights.cols));
  }
  if (weights.data instanceof Float32Array) return weights.data;
  const out = workspace.take("weights", weights.rows * weights.cols);
  widen(weights, 0, out);
  return out;
}
