/**
 * Time parameters (θ): static activation quantization, output corrections and, as an option, weight scales
 * over shared codes, which the runtime selects by time, layer by layer and without allocation. sidecar.ts
 * stores them.
 */
import type { ActivationBits, ActivationGrid } from "./activation_range.ts";
import type { TimeGroups } from "./groups.ts";

/** Most numbers of a layer's time parameters: a limit for sidecars that ask for too much memory. */
export const MAX_LAYER_NUMBERS = 2 ** 30;

/** Static quantization of a layer's input: a pair a time group, or a pair a bin where they were smoothed. */
export interface ActivationParameters {
  readonly bits: ActivationBits;
  /** `f32[groups]` or `f32[bins]`, above 0. */
  readonly scale: Float32Array<ArrayBuffer>;
  /** `i32`, as long; in `[0, 2^bits − 1]`. */
  readonly zeroPoint: Int32Array<ArrayBuffer>;
}

/** `y = gain ⊙ (Ŵ x) + bias`, beside the layer's bias. */
export interface OutputParameters {
  /** `f32[groups, rows]` */
  readonly gain: Float32Array<ArrayBuffer>;
  /** `f32[groups, rows]` */
  readonly bias: Float32Array<ArrayBuffer>;
}

/** Weight scales and zero points of every time group over the same codes, an option. */
export interface WeightScaleParameters {
  /** Bits of half floats, `[groups, rows, weight groups]`. */
  readonly scale: Uint16Array<ArrayBuffer>;
  /** The same, undefined when symmetric. */
  readonly zeroPoint: Uint16Array<ArrayBuffer> | undefined;
}

/** Effect of quantization on predictions, `gain · full + bias + noise`, which the sampler corrects. */
export interface SamplerParameters {
  /** `f32[groups]`, above 0. */
  readonly gain: Float32Array<ArrayBuffer>;
  /** `f32[groups]` */
  readonly bias: Float32Array<ArrayBuffer>;
  /** `f32[groups]`, at least 0: of one number of a prediction. */
  readonly noiseVariance: Float32Array<ArrayBuffer>;
}

/** Time parameters of a layer; any part may be missing. */
export interface LayerParameters {
  readonly activation?: ActivationParameters | undefined;
  /** Bits of per-token dynamic quantization, instead of static: for layers that lose too much with it. */
  readonly perToken?: ActivationBits | undefined;
  readonly output?: OutputParameters | undefined;
  readonly weightScales?: WeightScaleParameters | undefined;
}

/** Parameters of a layer's forward pass at one time; the same objects every time. */
export interface SelectedParameters {
  readonly grid: ActivationGrid | undefined;
  /** Per-token dynamic quantization, of `bits`. */
  readonly isPerToken: boolean;
  readonly bits: ActivationBits;
  /** `f32[rows]`: the gain less 1. */
  readonly gainLessOne: Float32Array<ArrayBuffer> | undefined;
  /** `f32[rows]` */
  readonly bias: Float32Array<ArrayBuffer> | undefined;
  readonly weightScale: Uint16Array<ArrayBuffer> | undefined;
  readonly weightZeroPoint: Uint16Array<ArrayBuffer> | undefined;
}

/** A layer's time parameters by bin: one object a group, or a bin where they were smoothed. */
function byBin(
  groups: TimeGroups,
  { activation, perToken, output, weightScales }: LayerParameters,
): SelectedParameters[] {
  const { bins } = groups.axis, gainLessOne = output?.gain.map((gain) => gain - 1);
  const isByBin = activation !== undefined && activation.scale.length === bins && bins !== groups.count;
  // Arrays of a group are the same objects at all of its bins.
  const parts = Array.from({ length: groups.count }, (_, group) => {
    const part = <T extends Float32Array | Uint16Array>(all: T | undefined) =>
      all?.subarray(group * all.length / groups.count, (group + 1) * all.length / groups.count) as
        | T
        | undefined;
    return {
      gainLessOne: part(gainLessOne),
      bias: part(output?.bias),
      weightScale: part(weightScales?.scale),
      weightZeroPoint: part(weightScales?.zeroPoint),
    };
  });
  const of = (group: number, index: number): SelectedParameters => ({
    grid: activation && { scale: activation.scale[index]!, zeroPoint: activation.zeroPoint[index]! },
    isPerToken: perToken !== undefined,
    bits: activation?.bits ?? perToken ?? 8,
    ...parts[group]!,
  });
  const byGroup = isByBin ? [] : Array.from({ length: groups.count }, (_, g) => of(g, g));
  return Array.from({ length: bins }, (_, bin) => {
    const group = groups.groupOfBin(bin);
    return isByBin ? of(group, bin) : byGroup[group]!;
  });
}

/**
 * Time parameters of a model.
 *
 * @example
 * ```ts
 * import { timestepAxis } from "./axis.ts";
 * import { equalTimeGroups } from "./groups.ts";
 * import { TimeParameters } from "./parameters.ts";
 * const groups = equalTimeGroups(timestepAxis(1000), 2);
 * const activation = { bits: 8, scale: Float32Array.of(0.1, 0.2), zeroPoint: Int32Array.of(128, 100) } as const;
 * const parameters = new TimeParameters(groups, new Map([["blocks.0.weight", { activation }]]), "a1b2");
 * console.log(parameters.at("blocks.0.weight", 700)?.grid?.zeroPoint); // 100
 * ```
 */
export class TimeParameters {
  readonly #tables: ReadonlyMap<string, readonly SelectedParameters[]>;

  /**
   * @param layers by the name of a layer's weight
   * @param fingerprint of the model that it belongs to, as `modelFingerprint` gives it
   * @param sampler of an image model as a whole
   * @throws {TypeError} when an array is not as long as the groups ask for
   * @throws {RangeError} when a value is NaN, infinite or out of range; the message names the layer
   */
  constructor(
    readonly groups: TimeGroups,
    readonly layers: ReadonlyMap<string, LayerParameters>,
    readonly fingerprint: string,
    readonly sampler?: SamplerParameters,
  ) {
    if (sampler !== undefined) checkSampler(groups, sampler);
    for (const [name, layer] of layers) checkLayer(name, groups, layer);
    this.#tables = new Map([...layers].map(([name, layer]) => [name, byBin(groups, layer)]));
  }

  /**
   * Parameters of a layer at a time, undefined when it has none; the same object for the same bin, nothing is
   * allocated.
   *
   * @throws {RangeError} when `t` is outside the axis
   */
  at(layer: string, t: number): SelectedParameters | undefined {
    return this.atBin(layer, this.groups.axis.binOf(t));
  }

  /** The same for a bin of the axis. */
  atBin(layer: string, bin: number): SelectedParameters | undefined {
    return this.#tables.get(layer)?.[bin];
  }

  /** Stored bytes. */
  get bytes(): number {
    const arrays = (part: object = {}) => Object.values(part).filter((value) => ArrayBuffer.isView(value));
    const layers = [...this.layers.values()];
    const all = [this.sampler, ...layers.flatMap((own) => [own.activation, own.output, own.weightScales])];
    const perToken = layers.filter((own) => own.perToken !== undefined).length;
    return all.flatMap(arrays).reduce((bytes, { byteLength }) => bytes + byteLength, 4 * perToken);
  }
}

function checkSampler({ count }: TimeGroups, { gain, bias, noiseVariance }: SamplerParameters): void {
  const fail = (reason: string) => `Cannot use the time parameters of the sampler: ${reason}`;
  for (const [name, values] of Object.entries({ gain, bias, noiseVariance })) {
    if (values.length !== count) {
      throw new TypeError(fail(`${name} must have ${count} numbers, got ${values.length}`));
    }
    const least = name === "bias" ? -Infinity : 0;
    const bad = values.find((value) =>
      !Number.isFinite(value) || value < least || (name === "gain" && value === 0)
    );
    if (bad !== undefined) throw new RangeError(fail(`${name} must be finite and in range, got ${bad}`));
  }
}

function checkLayer(name: string, groups: TimeGroups, layer: LayerParameters): void {
  const fail = (reason: string) => `Cannot use the time parameters of ${JSON.stringify(name)}: ${reason}`;
  const { activation, perToken, output, weightScales } = layer;
  const finite = (what: string, values: ArrayLike<number>) => {
    for (let i = 0; i < values.length; i++) {
      if (!Number.isFinite(values[i]!)) {
        throw new RangeError(fail(`${what} must be finite, got ${values[i]} at ${i}`));
      }
    }
  };
  if (activation !== undefined) {
    const { bits, scale, zeroPoint } = activation, { bins } = groups.axis;
    if (bits !== 4 && bits !== 8) throw new RangeError(fail(`activation bits must be 4 or 8, got ${bits}`));
    if ((scale.length !== groups.count && scale.length !== bins) || zeroPoint.length !== scale.length) {
      throw new TypeError(
        fail(
          `there must be ${groups.count} (or ${bins}) activation scales and zero points, got ${scale.length} and ${zeroPoint.length}`,
        ),
      );
    }
    for (let i = 0; i < scale.length; i++) {
      if (!(scale[i]! >= 2 ** -126 && scale[i]! < Infinity)) {
        throw new RangeError(fail(`activation scales must be at least 2^-126, got ${scale[i]} at ${i}`));
      }
      if (!(zeroPoint[i]! >= 0 && zeroPoint[i]! < 2 ** bits)) {
        throw new RangeError(
          fail(`activation zero points must be from 0 to ${2 ** bits - 1}, got ${zeroPoint[i]} at ${i}`),
        );
      }
    }
  }
  if (perToken !== undefined) {
    if (perToken !== 4 && perToken !== 8) {
      throw new RangeError(fail(`activation bits must be 4 or 8, got ${perToken}`));
    }
    if (activation !== undefined) {
      throw new TypeError(fail("activations must have static ranges or per-token ranges, got both"));
    }
  }
  if (output !== undefined) {
    const { gain, bias } = output;
    if (gain.length === 0 || gain.length % groups.count !== 0 || bias.length !== gain.length) {
      throw new TypeError(
        fail(
          `output gain and bias must be [${groups.count}, rows], got ${gain.length} and ${bias.length} numbers`,
        ),
      );
    }
    finite("output gains", gain);
    finite("output biases", bias);
  }
  if (weightScales !== undefined) {
    const { scale, zeroPoint } = weightScales;
    if (
      scale.length === 0 || scale.length % groups.count !== 0 ||
      (zeroPoint !== undefined && zeroPoint.length !== scale.length)
    ) {
      throw new TypeError(
        fail(`weight scales must be [${groups.count}, rows, weight groups], got ${scale.length} numbers`),
      );
    }
    const values = (bits: Uint16Array<ArrayBuffer>) =>
      new Float16Array(bits.buffer, bits.byteOffset, bits.length);
    finite("weight scales", values(scale));
    if (zeroPoint !== undefined) finite("weight zero points", values(zeroPoint));
  }
}
