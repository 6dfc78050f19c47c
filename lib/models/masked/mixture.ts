/**
 * Mixtures of experts: a router gives every token weights, and the token goes through the experts with the
 * largest. An expert runs on its tokens alone. Where somebody looks at what its layers read it is shown a row
 * for every position, with zeros for those that others have, so that rows stay those of the positions.
 */
import { add, siluMultiply } from "../layers/elementwise.ts";
import type { StagedRun } from "../layers/blockwise.ts";
import type { Mixture, TransformerPass } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;

/** What a mixture reads. */
export interface MixtureInput {
  /** `f32[rows, hiddenSize]` */
  readonly x: Floats;
  readonly rows: number;
  /** Flat position of each row; undefined where rows are all positions. */
  readonly positions: Int32Array | undefined;
  readonly isWatched: boolean;
}

/** Rows of an expert and their weights, row after row. */
interface Routed {
  readonly rows: number[];
  readonly weights: number[];
}

/**
 * Adds what the experts make of `x` to `hidden`.
 *
 * **Shapes** `hidden: f32[rows, hiddenSize]`
 */
export function* stagesOfMixture(
  pass: TransformerPass,
  { router, bias, experts }: Mixture,
  { x, rows, positions, isWatched }: MixtureInput,
  hidden: Floats,
): StagedRun<void> {
  const { kernels, config: { hiddenSize: cols, mixture }, workspace } = pass, { expertSize } = mixture!;
  kernels.arrays.release(x); // rows go from expert to expert here
  const logits = workspace.take("router", rows * experts.length);
  yield { layers: [router], x, rows };
  pass.linear(router, x, rows, logits, positions);
  const routed = routes(logits, bias, experts.length, mixture!.perToken);
  const mixed = workspace.take("mixed", rows * cols).fill(0);
  const input = workspace.take("expertInput", rows * cols),
    output = workspace.take("expertOutput", rows * cols);
  const gate = workspace.take("expertGate", rows * expertSize);
  const up = workspace.take("expertUp", rows * expertSize);
  /** An expert's rows among those of all positions, for who looks at what a layer reads. */
  const shown = (own: Routed, from: Floats, width: number) => {
    const all = workspace.take("expertRows", rows * Math.max(cols, expertSize)).subarray(0, rows * width)
      .fill(0);
    for (const [i, row] of own.rows.entries()) {
      all.set(from.subarray(i * width, (i + 1) * width), row * width);
    }
    return all;
  };
  for (const [e, expert] of experts.entries()) {
    const own = routed[e]!, count = own.rows.length;
    if (count === 0 && !isWatched) continue;
    const at = Int32Array.from(own.rows, (row) => positions === undefined ? row : positions[row]!);
    const part = (of: Floats, width: number) => of.subarray(0, count * width);
    const xs = part(input, cols), gates = part(gate, expertSize), ups = part(up, expertSize);
    const gather = () => {
      for (const [i, row] of own.rows.entries()) xs.set(x.subarray(row * cols, (row + 1) * cols), i * cols);
    };
    gather();
    if (isWatched) {
      const all = shown(own, xs, cols);
      yield { layers: [expert.gate, expert.up], x: all, rows, kept: [x, mixed] };
      for (const layer of [expert.gate, expert.up]) pass.observe?.(layer, all, rows);
      gather(); // others may have run meanwhile
    }
    pass.run(expert.gate, xs, count, gates, at);
    pass.run(expert.up, xs, count, ups, at);
    if (count > 0) siluMultiply(kernels, gates, ups, gates);
    for (const [i, weight] of own.weights.entries()) {
      for (let c = i * expertSize; c < (i + 1) * expertSize; c++) gates[c]! *= weight;
    }
    if (isWatched) {
      const all = shown(own, gates, expertSize);
      yield { layers: [expert.down], x: all, rows, kept: [x, mixed] };
      pass.observe?.(expert.down, all, rows);
      for (const [i, row] of own.rows.entries()) {
        gates.set(all.subarray(row * expertSize, (row + 1) * expertSize), i * expertSize);
      }
    }
    const outputs = part(output, cols);
    pass.run(expert.down, gates, count, outputs, at);
    for (const [i, row] of own.rows.entries()) {
      for (let c = 0, to = row * cols, from = i * cols; c < cols; c++) mixed[to + c]! += outputs[from + c]!;
    }
  }
  add(kernels, hidden, mixed, hidden);
}

/**
 * The tokens of each expert: softmax over the router's outputs, plus the experts' biases, and of these the
 * largest; of equals the first. The weights do not add up to 1, as in LLaDA-MoE's code.
 */
function routes(logits: Floats, bias: Floats | undefined, experts: number, perToken: number): Routed[] {
  const routed = Array.from({ length: experts }, (): Routed => ({ rows: [], weights: [] }));
  const weights = new Float64Array(experts);
  for (let row = 0; row * experts < logits.length; row++) {
    const own = logits.subarray(row * experts, (row + 1) * experts);
    let largest = -Infinity, sum = 0;
    for (const value of own) if (value > largest) largest = value;
    for (let e = 0; e < experts; e++) sum += weights[e] = exponential(own[e]! - largest);
    for (let e = 0; e < experts; e++) {
      weights[e] = Math.fround(weights[e]! / sum + (bias === undefined ? 0 : bias[e]!));
    }
    for (let k = 0; k < perToken; k++) {
      let best = 0;
      for (let e = 1; e < experts; e++) if (weights[e]! > weights[best]!) best = e;
      routed[best]!.rows.push(row);
      routed[best]!.weights.push(weights[best]!);
      weights[best] = -Infinity;
    }
  }
  return routed;
}

const LOG_2 = [0.693147180369123816490, 1.90821492927058770002e-10] as const;
const power = new Float64Array(1), powerWords = new Uint32Array(power.buffer);

/** e^x for x ≤ 0, of operations that every runtime rounds alike: `Math.exp` is each engine's own. */
function exponential(x: number): number {
  if (!(x > -700)) return x === x ? 0 : NaN;
  const whole = Math.round(x / LOG_2[0]), rest = x - whole * LOG_2[0] - whole * LOG_2[1];
  let sum = 1;
  for (let k = 13; k > 0; k--) sum = 1 + sum * rest / k;
  powerWords[0] = 0;
  powerWords[1] = (1023 + whole) << 20;
  return sum * power[0]!;
}
