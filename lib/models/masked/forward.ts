/**
 * The forward pass of a masked transformer, for inference and for gradients: with a tape, every value that
 * the backward pass reads gets memory that nothing overwrites.
 */
import { gatherRows } from "../../native/functions.ts";
import { attention, rotary } from "../layers/attention.ts";
import { add, siluMultiply } from "../layers/elementwise.ts";
import { rmsNorm } from "../layers/norms.ts";
import { type StagedRun, withoutStops } from "../layers/blockwise.ts";
import { lookUpRows } from "../layers/tensors.ts";
import { memoryFor, type Tape } from "../layers/tape.ts";
import { stagesOfMixture } from "./mixture.ts";
import type { TransformerPass } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Sequences that are run together. */
export interface SequenceCall {
  readonly batch: number;
  readonly tokens: number;
  /** Rotary positions. */
  readonly positions: Int32Array;
  readonly attentionMask: Uint8Array | undefined;
  /** Flat positions whose logits are wanted, all by default: only these run behind the last attention. */
  readonly rows: Int32Array | undefined;
  /** Somebody looks at what layers read: each reads a row a position, zeros where an expert has no token. */
  readonly isWatched?: boolean | undefined;
}

/** Values of a block that its backward pass reads. */
export type TransformerBlockValue =
  | ("normed" | "query" | "key" | "value" | "attended" | "attendedRows" | "middle")
  | ("normedAgain" | "gate" | "up" | "gated" | "output");

/** Token embeddings. **Shapes** `inputIds: i32[n]` → `hidden: f32[n, hiddenSize]` */
export function embed(pass: TransformerPass, inputIds: Int32Array, hidden: Floats): void {
  lookUpRows(pass.kernels, pass.table(pass.parts.embedding), inputIds, hidden);
  scaleInPlace(hidden, pass.config.embeddingScale);
}

/**
 * One block, in place; in other memory with a tape, or where it ends on the wanted positions alone.
 *
 * **Shapes** `hidden: f32[batch · tokens, hiddenSize]` → the same, or `f32[wanted rows, hiddenSize]`
 */
export function runBlock(...block: Parameters<typeof stagesOfBlock>): Floats {
  return withoutStops(stagesOfBlock(...block));
}

/** {@linkcode runBlock} with a stop before every stage. */
export function* stagesOfBlock(
  pass: TransformerPass,
  index: number,
  call: SequenceCall,
  hidden: Floats,
  tape?: Tape<TransformerBlockValue>,
): StagedRun<Floats> {
  const { kernels, config, parts, workspace } = pass, { batch, tokens, positions } = call;
  const { hiddenSize, heads, keyValueHeads: kvHeads, headSize, rotaryTheta: theta } = config;
  const block = parts.blocks[index]!, rows = index === parts.blocks.length - 1 ? call.rows : undefined;
  let count = batch * tokens, residual = hidden;
  const take = (name: TransformerBlockValue, cols: number, shared?: string | Floats) =>
    memoryFor(pass, tape, name, count * cols, shared);
  const norm = (weight: Floats) => ({ rows: count, cols: hiddenSize, weight, epsilon: config.normEpsilon });

  const normed = rmsNorm(kernels, hidden, norm(block.attentionNorm), take("normed", hiddenSize));
  const q = take("query", heads * headSize), k = take("key", kvHeads * headSize);
  const v = take("value", kvHeads * headSize);
  yield { layers: [block.query, block.key, block.value], x: normed, rows: count };
  pass.linear(block.query, normed, count, q);
  pass.linear(block.key, normed, count, k);
  pass.linear(block.value, normed, count, v);
  normalizeHeads(pass, q, block.queryNorm);
  normalizeHeads(pass, k, block.keyNorm);
  rotary(kernels, q, positions, { heads, headSize, theta });
  rotary(kernels, k, positions, { heads: kvHeads, headSize, theta });
  let attended = take("attended", heads * headSize);
  const inputs = { q, k, v, keyMask: call.attentionMask };
  const shape = { batch, tokens, heads, kvHeads, headSize, block: config.attentionBlock };
  attention(kernels, inputs, shape, attended);
  if (rows !== undefined) {
    count = rows.length;
    const all = batch * tokens, width = heads * headSize;
    const wanted = (from: Floats, cols: number, to: Floats) => {
      gatherRows(kernels, "take rows", from, rows, count, all, cols, to);
      return to;
    };
    attended = wanted(attended, width, take("attendedRows", width));
    residual = wanted(
      hidden,
      hiddenSize,
      kernels.arrays.hold(workspace.take("hiddenRows", count * hiddenSize), true),
    );
  }
  const delta = kernels.arrays.hold(workspace.take("delta", count * hiddenSize), true);
  yield { layers: [block.attentionOutput], x: attended, rows: count, residual };
  pass.linear(block.attentionOutput, attended, count, delta, rows, residual);
  const middle = add(kernels, residual, delta, take("middle", hiddenSize, residual));

  const again = rmsNorm(
    kernels,
    middle,
    norm(block.feedForwardNorm),
    take("normedAgain", hiddenSize, "normed"),
  );
  if (block.mixture !== undefined) {
    const input = { x: again, rows: count, positions: rows, isWatched: call.isWatched === true };
    yield* stagesOfMixture(pass, block.mixture, input, middle);
  }
  if (block.feedForward === undefined) return middle;
  const { gate: gateLayer, up: upLayer, down } = block.feedForward, inner = gateLayer.weights.rows;
  const gate = take("gate", inner), up = take("up", inner);
  yield { layers: [gateLayer, upLayer], x: again, rows: count };
  pass.linear(gateLayer, again, count, gate, rows);
  pass.linear(upLayer, again, count, up, rows);
  const gated = siluMultiply(kernels, gate, up, take("gated", inner, gate));
  yield { layers: [down], x: gated, rows: count, residual: middle };
  pass.linear(down, gated, count, delta, rows, middle);
  return add(kernels, middle, delta, take("output", hiddenSize, middle));
}

/** Normalizes every head of queries or keys by itself, in place. */
function normalizeHeads({ kernels, config }: TransformerPass, x: Floats, weight: Floats | undefined): void {
  if (weight === undefined) return;
  const { headSize: cols, normEpsilon: epsilon } = config;
  rmsNorm(kernels, x, { rows: x.length / cols, cols, weight, epsilon }, x);
}

/**
 * Logits of the last block's hidden states.
 *
 * **Shapes** `hidden: f32[n, hiddenSize]` → `f32[n, vocabulary]`, scratch
 *
 * @param rows flat positions of the hidden states, undefined for all
 * @param normed memory that keeps the input of the head
 */
export function runHead(...head: Parameters<typeof stageOfHead>): Floats {
  return withoutStops(stageOfHead(...head));
}

/** {@linkcode runHead} with its stop. */
export function* stageOfHead(
  pass: TransformerPass,
  hidden: Float32Array,
  rows: Int32Array | undefined,
  normed?: Floats,
): StagedRun<Floats> {
  const { kernels, config, parts, workspace } = pass, { hiddenSize: cols, normEpsilon: epsilon } = config;
  const count = hidden.length / cols, input = normed ?? workspace.take("normed", hidden.length);
  rmsNorm(kernels, hidden, { rows: count, cols, weight: parts.finalNorm, epsilon }, input);
  yield { layers: [parts.head], x: input, rows: count };
  const logits = kernels.arrays.hold(workspace.take("logits", count * config.vocabularySize), true);
  pass.linear(parts.head, input, count, logits, rows);
  scaleInPlace(kernels.arrays.release(logits), config.logitScale);
  return logits;
}

/** Multiplies by a factor, in place. */
export function scaleInPlace(values: Float32Array, factor: number): void {
  if (factor !== 1) { for (let i = 0; i < values.length; i++) values[i]! *= factor; }
}

/** Rotary positions: 0, 1, … in each sequence; with padding they count real tokens, as in Dream's code. */
export function positionsOf(
  batch: number,
  tokens: number,
  attentionMask: Uint8Array | undefined,
): Int32Array {
  const positions = new Int32Array(batch * tokens);
  for (let b = 0; b < batch; b++) {
    for (let t = 0, next = 0; t < tokens; t++) {
      const i = b * tokens + t;
      if (attentionMask === undefined) positions[i] = t;
      else if (attentionMask[i] === 0) positions[i] = 1;
      else positions[i] = next++;
    }
  }
  return positions;
}
