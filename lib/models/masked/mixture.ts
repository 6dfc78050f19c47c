/**
 * Mixtures of experts: a router gives every token weights, and the token goes through the experts with the
 * largest. An expert runs on its tokens alone. Where somebody looks at what its layers read it is shown a row
 * for every position, with zeros for those that others have, so that rows stay those of the positions.
 */
import { addRows, chooseExperts, gatherRows, scaleRows } from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { add, siluMultiply } from "../layers/elementwise.ts";
import type { StagedRun } from "../layers/blockwise.ts";
import type { Mixture, TransformerPass } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;
type Four = [Floats, Floats, Floats, Floats];

const DOING = "run a mixture of experts";
/** An expert's input, output, gate and what the gate is multiplied with. */
const SCRATCH = ["expertInput", "expertOutput", "expertGate", "expertUp"] as const;

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
  readonly rows: Int32Array<ArrayBuffer>;
  readonly weights: Floats;
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
  const { arrays } = kernels;
  const logits = arrays.hold(workspace.take("router", rows * experts.length), true);
  yield { layers: [router], x, rows };
  pass.linear(router, x, rows, logits, positions);
  const routed = routes(kernels, logits, bias, {
    rows,
    experts: experts.length,
    perToken: mixture!.perToken,
  });
  const mixed = arrays.hold(arrays.discard(workspace.take("mixed", rows * cols)).fill(0));
  const scratch = [cols, cols, expertSize, expertSize].map((width, i) =>
    workspace.take(SCRATCH[i]!, rows * width)
  );
  /** An expert's rows among those of all positions, for who looks at what a layer reads. */
  const shown = (own: Routed, from: Floats, width: number) => {
    arrays.release(from);
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
    const at = positions === undefined ? own.rows : own.rows.map((row) => positions[row]!);
    const [xs, outputs, gates, ups] = scratch.map((all) =>
      all.subarray(0, count * all.length / rows)
    ) as Four;
    const gather = () => {
      for (const array of scratch) arrays.hold(array, true);
      gatherRows(kernels, DOING, x, own.rows, count, rows, cols, xs);
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
    scaleRows(kernels, DOING, gates, own.weights, count, expertSize);
    if (isWatched) {
      const all = shown(own, gates, expertSize);
      yield { layers: [expert.down], x: all, rows, kept: [x, mixed] };
      pass.observe?.(expert.down, all, rows);
      for (const [i, row] of own.rows.entries()) {
        gates.set(all.subarray(row * expertSize, (row + 1) * expertSize), i * expertSize);
      }
      for (const array of scratch) arrays.hold(array, array.buffer !== gates.buffer);
    }
    pass.run(expert.down, gates, count, outputs, at);
    addRows(kernels, DOING, outputs, own.rows, count, rows, cols, mixed);
  }
  add(kernels, hidden, mixed, hidden);
}

/** The tokens of each expert and the weights that they give it. */
function routes(
  kernels: Kernels,
  logits: Floats,
  bias: Floats | undefined,
  { rows, experts, perToken }: { readonly rows: number; readonly experts: number; readonly perToken: number },
): Routed[] {
  const chosen = new Int32Array(rows * perToken), weight = new Float32Array(rows * perToken);
  chooseExperts(kernels, DOING, logits, bias, rows, experts, perToken, chosen, weight);
  const places = Array.from({ length: experts }, (): number[] => []);
  for (const [place, expert] of chosen.entries()) places[expert]!.push(place);
  return places.map((own) => ({
    rows: Int32Array.from(own, (place) => Math.floor(place / perToken)),
    weights: Float32Array.from(own, (place) => weight[place]!),
  }));
}
