/**
 * The thermodynamic loss, which phase 3's refinement minimises: a quantization term (the step KL of a batch,
 * masked_transition.ts and transition.ts), a Markov term that holds the parameters of neighbouring time
 * groups together, and an entropy term that anneals scales and zero points. The last two and their gradients
 * are here.
 */
import { checkTemperature, codeProbabilities } from "../quant/solvers/annealing.ts";

/** The loss of one iteration by term; a term with weight 0 is 0. */
export interface LossTerms {
  /** Step KL of the iteration's batch. */
  readonly quantization: number;
  /** {@linkcode markovLoss} of the parameters that differ between time groups. */
  readonly markov: number;
  /** {@linkcode entropyLoss} of the weights' soft codes. */
  readonly entropy: number;
}

/** The loss of every iteration by term, and their sum. */
export type LossHistory = { readonly [Term in keyof LossTerms | "total"]: readonly number[] };

/**
 * The Gauss-Markov term `λ Σ_g ‖θ_{g+1} − θ_g‖²` and its gradient.
 *
 * **Shapes** `theta: f64[groups, parameters]` → `gradient` the same
 *
 * @throws {TypeError} when the parameters do not divide into groups
 * @throws {RangeError} when λ is negative or not finite
 *
 * @example
 * ```ts
 * import { markovLoss } from "./losses.ts";
 * const { loss, gradient } = markovLoss(Float64Array.of(1, 3, 3), 3, 0.5);
 * console.log(loss, gradient); // 2, [−2, 2, 0]
 * ```
 */
export function markovLoss(
  theta: Float64Array,
  groups: number,
  weight: number,
): { readonly loss: number; readonly gradient: Float64Array<ArrayBuffer> } {
  const parameters = theta.length / groups;
  if (!Number.isInteger(parameters) || !(groups >= 1)) {
    throw new TypeError(
      `Cannot compute the Markov loss: θ must be [${groups}, parameters], got ${theta.length} numbers`,
    );
  }
  if (!(weight >= 0 && weight < Infinity)) {
    throw new RangeError(`Cannot compute the Markov loss: the weight must be a number ≥ 0, got ${weight}`);
  }
  const gradient = new Float64Array(theta.length);
  let loss = 0;
  for (let i = 0; i + parameters < theta.length; i++) {
    const jump = theta[i + parameters]! - theta[i]!;
    loss += weight * jump * jump;
    gradient[i]! -= 2 * weight * jump;
    gradient[i + parameters]! += 2 * weight * jump;
  }
  return { loss, gradient };
}

/** Quantization parameters of a matrix: `w ≈ scale (code − zeroPoint)`, one pair a group of columns. */
export interface GroupParameters {
  readonly cols: number;
  readonly bits: number;
  /** 0 is a whole row. */
  readonly groupSize: number;
  /** `[rows, groups]` */
  readonly scale: ArrayLike<number>;
  readonly zeroPoint: ArrayLike<number>;
}

/**
 * The entropy term `−τ Σ_w H(p_w)` and its gradients, with `p_w` the soft code of a weight, `softmax(−d²/τ)`
 * of its distances d to the codes, in steps of the scale (deterministic annealing: Rose, "Deterministic
 * annealing for clustering, compression, classification, regression, and related optimization problems",
 * 1998). As τ falls to 0 the soft codes become the nearest ones and the term vanishes.
 *
 * With u the weight's position among the codes, `dH/du = −2/τ² Cov(d², d)`.
 *
 * **Shapes** `weights: f32[rows, cols]`, full precision → `byScale` and `byZeroPoint: f64[rows, groups]`
 *
 * @param temperature τ, in squared steps; 0 gives 0
 * @throws {RangeError} when the temperature is outside [0, 100]
 *
 * @example
 * ```ts
 * import { entropyLoss } from "./losses.ts";
 * const parameters = { cols: 2, bits: 2, groupSize: 0, scale: [1], zeroPoint: [0] };
 * console.log(entropyLoss(Float32Array.of(0.5, 1), parameters, 0.1).loss); // −0.07: one weight between two codes, one on a code
 * ```
 */
export function entropyLoss(
  weights: Float32Array,
  { cols, bits, groupSize, scale, zeroPoint }: GroupParameters,
  temperature: number,
): { readonly loss: number; readonly byScale: Float64Array; readonly byZeroPoint: Float64Array } {
  checkTemperature(temperature);
  const codes = 2 ** bits, p = new Float64Array(codes), size = groupSize === 0 ? cols : groupSize;
  const byScale = new Float64Array(scale.length), byZeroPoint = new Float64Array(scale.length);
  const groups = Math.ceil(cols / size);
  let loss = 0;
  for (let i = 0; temperature > 0 && i < weights.length; i++) {
    const group = Math.floor(i / cols) * groups + Math.floor(i % cols / size), s = scale[group]!;
    if (s === 0) continue; // every code is the same weight
    const w = weights[i]!, position = w / s + zeroPoint[group]!;
    codeProbabilities(position, codes, temperature, p);
    let entropy = 0, mean = 0, square = 0, cube = 0;
    for (let code = 0; code < codes; code++) {
      const probability = p[code]!, distance = position - code;
      if (probability === 0) continue;
      entropy -= probability * Math.log(probability);
      mean += probability * distance;
      square += probability * distance ** 2;
      cube += probability * distance ** 3;
    }
    loss -= temperature * entropy;
    const slope = 2 / temperature * (cube - square * mean); // of the loss, by position
    byScale[group]! -= slope * w / (s * s);
    byZeroPoint[group]! += slope;
  }
  return { loss, byScale, byZeroPoint };
}
