/**
 * The terms of phase 3's objective with their gradients: what quantizing costs a layer, how far its parameters jump between time groups, and the
 * annealing's entropy. Minimising them is elsewhere: gauss_markov.ts, optimizer.ts, and lib/quant's annealing.ts.
 */
import { KernelError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { checkTemperature, codeProbabilities } from "../quant/solvers/annealing.ts";

/** A loss and its gradient. */
export interface LossTerm<Gradient> {
  readonly loss: number;
  readonly gradient: Gradient;
}

/**
 * `tr(Δ H Δᵀ)` with Δ = W − Ŵ: the mean squared error of a layer's output on inputs with the second moment H, for
 * `H̄ = Σ_t ω_t E[x xᵀ | t]` summed over time with its weights. Its gradient by Ŵ is `−2 Δ H`.
 *
 * **Shapes** `weights` and `quantized: f32[rows, cols]`, `moment: f32[cols, cols]`, symmetric → `gradient: f32[rows, cols]`
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when the loss is not finite
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { quantizationLoss } from "./losses.ts";
 * const moment = Float32Array.of(2, 0, 0, 1);
 * const { loss } = quantizationLoss(await openKernels(), Float32Array.of(1, 1), Float32Array.of(0, 3), moment, 1, 2);
 * console.log(loss); // 2 · 1² + 1 · 2²
 * ```
 */
export function quantizationLoss(
  kernels: Kernels,
  weights: Float32Array,
  quantized: Float32Array,
  moment: Float32Array,
  rows: number,
  cols: number,
): LossTerm<Float32Array<ArrayBuffer>> {
  const doing = "compute the quantization loss";
  const n = rows * cols;
  if (weights.length !== n || quantized.length !== n || moment.length !== cols * cols) {
    throw new TypeError(
      `Cannot ${doing}: weights must be [${rows}, ${cols}] twice and the moment [${cols}, ${cols}], got ${weights.length}, ${quantized.length} and ${moment.length} numbers`,
    );
  }
  const difference = new Float32Array(n), gradient = new Float32Array(n);
  for (let i = 0; i < n; i++) difference[i] = weights[i]! - quantized[i]!;
  const { calls, size, isaNumber } = kernels;
  // A row of Δ is a token, and H its own transposition.
  const status = calls.aq_linear(
    difference,
    size(rows),
    moment,
    0,
    null,
    size(cols),
    size(cols),
    gradient,
    isaNumber,
    kernels.threads,
  );
  if (status !== 0) throw new KernelError(`Cannot ${doing}: the kernel reports status ${status}`, { status });
  let loss = 0;
  for (let i = 0; i < n; i++) {
    loss += difference[i]! * gradient[i]!;
    gradient[i]! *= -2;
  }
  if (!Number.isFinite(loss)) {
    throw new RangeError(`Cannot ${doing}: weights and moment must be finite, got the loss ${loss}`);
  }
  return { loss, gradient };
}

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
): LossTerm<Float64Array<ArrayBuffer>> {
  const parameters = theta.length / groups;
  if (!Number.isInteger(parameters) || !(groups >= 1)) {
    throw new TypeError(
      `Cannot compute the Markov loss: θ must be [${groups}, parameters], got ${theta.length} numbers`,
    );
  }
  checkWeight("compute the Markov loss", weight);
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

function checkWeight(doing: string, weight: number): void {
  if (!(weight >= 0 && weight < Infinity)) {
    throw new RangeError(`Cannot ${doing}: the weight must be a number ≥ 0, got ${weight}`);
  }
}

/** Weights of one group and the grid that they are put on: `w ≈ scale (code − zeroPoint)`. */
export interface AnnealedGroup {
  readonly weights: ArrayLike<number>;
  /** How much each weight's error counts, as the diagonal of the second moment; default 1. */
  readonly importance?: ArrayLike<number> | undefined;
  readonly scale: number;
  readonly zeroPoint: number;
  readonly bits: number;
}

/** The soft assignment's cost, and its derivatives by scale and zero point. */
export interface AnnealedLoss {
  /** `Σ h E_p[(w − s (c − z))²]` */
  readonly distortion: number;
  /** `Σ h s² H(p)`, nats in units of the distortion. */
  readonly entropy: number;
  /** `distortion − τ · entropy`, which the assignment minimises. */
  readonly loss: number;
  /** Derivatives of `loss` at fixed units `s²` of the temperature. */
  readonly byScale: number;
  readonly byZeroPoint: number;
}

/**
 * The free energy of a soft code assignment (deterministic annealing: Rose, "Deterministic annealing for clustering, compression,
 * classification, regression, and related optimization problems", 1998), with τ counted in squared steps of the grid, `unit²`: distortion
 * less τ times entropy, and its derivatives by scale and zero point, which are those of the distortion with the assignment held.
 *
 * @param unit the step in which τ counts; default the scale. Derivatives hold it fixed.
 * @throws {RangeError} when the temperature is outside [0, 100] or the scale is 0 or not finite
 *
 * @example
 * ```ts
 * import { annealedLoss } from "./losses.ts";
 * const group = { weights: [0.1, 0.9], scale: 1, zeroPoint: 0, bits: 2 };
 * console.log(annealedLoss(group, 0).loss); // 0.02: nearest codes
 * ```
 */
export function annealedLoss(
  group: AnnealedGroup,
  temperature: number,
  unit: number = group.scale,
): AnnealedLoss {
  checkTemperature(temperature);
  const { weights, importance, scale, zeroPoint, bits } = group;
  if (!Number.isFinite(scale) || scale === 0 || !Number.isFinite(zeroPoint) || !(Math.abs(unit) > 0)) {
    throw new RangeError(
      `Cannot anneal codes: scale and zero point must be finite and the scale not 0, got ${scale} and ${zeroPoint}`,
    );
  }
  const codes = 2 ** bits, p = new Float64Array(codes);
  const share = temperature * (unit / scale) ** 2;
  let distortion = 0, entropy = 0, byScale = 0, byZeroPoint = 0;
  for (let i = 0; i < weights.length; i++) {
    const w = weights[i]!, h = importance?.[i] ?? 1;
    codeProbabilities(w / scale + zeroPoint, codes, share, p);
    for (let code = 0; code < codes; code++) {
      const probability = p[code]!;
      if (probability === 0) continue;
      const level = code - zeroPoint, error = w - scale * level;
      distortion += h * probability * error * error;
      entropy -= h * unit * unit * probability * Math.log(probability);
      byScale -= 2 * h * probability * error * level;
      byZeroPoint += 2 * h * probability * error * scale;
    }
  }
  return { distortion, entropy, loss: distortion - temperature * entropy, byScale, byZeroPoint };
}

/** The parts of an objective, and their sum. */
export interface TotalLoss {
  readonly quantization: number;
  readonly markov: number;
  /** `−τ · entropy`: what the annealing takes off. */
  readonly entropy: number;
  readonly total: number;
}

/** Adds up an objective. @throws {RangeError} when a part is not finite */
export function totalLoss(parts: Omit<TotalLoss, "total">): TotalLoss {
  const total = parts.quantization + parts.markov + parts.entropy;
  if (!Number.isFinite(total)) {
    throw new RangeError(
      `Cannot add up the loss: its parts must be finite, got ${parts.quantization}, ${parts.markov} and ${parts.entropy}`,
    );
  }
  return { ...parts, total };
}
