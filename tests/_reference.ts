/**
 * The models' forward passes written down a second time: plain loops in float64 over plain arrays, from the
 * papers and tests/models/README.md, sharing no code with lib/models. The oracle for sizes that the golden
 * files do not have.
 */
import type { Kernels } from "../lib/native/mod.ts";
import { convertFloats, dequantize } from "../lib/quant/mod.ts";
import { packedLayers, readPackedTensor } from "../lib/quant/packed/checkpoint.ts";
import { type FloatDtype, openCheckpoint } from "../lib/tensor/mod.ts";
import type { ActivationGrid } from "../lib/time/mod.ts";

/** Every tensor of a checkpoint in float64, packed ones dequantized. */
export type Weights = (name: string) => Float64Array;

export function readWeights(path: string, kernels: Kernels): Weights {
  using checkpoint = openCheckpoint(path);
  const all = new Map<string, Float64Array>();
  for (const layer of packedLayers(checkpoint).values()) {
    all.set(layer.name, Float64Array.from(dequantize(kernels, readPackedTensor(checkpoint, layer))));
  }
  for (const [name, { info }] of checkpoint.tensors) {
    if (!/^(F|BF)/.test(info.dtype)) continue;
    const data = checkpoint.read(name);
    const bytes = convertFloats(kernels, { data, dtype: info.dtype as FloatDtype }, info.elements, "F64");
    all.set(name, new Float64Array(bytes.buffer));
  }
  return (name) => {
    const found = all.get(name);
    if (found === undefined) throw new Error(`the checkpoint has no ${name}`);
    return found;
  };
}

type Vector = number[];

/** Activations rounded to the codes of a static grid and back, ties to even. */
export function roundedToGrid(
  x: Float32Array,
  { scale, zeroPoint }: ActivationGrid,
  bits: number,
): Float32Array {
  return x.map((value) => {
    // Adding and taking away 1.5 · 2^52 rounds to a whole number, ties to even.
    const code = Math.fround(value / scale) + 6755399441055744 - 6755399441055744 + zeroPoint;
    return scale * (Math.min(Math.max(code, 0), 2 ** bits - 1) - zeroPoint);
  });
}

/** y = W x + b */
function linear(w: Float64Array, b: Float64Array | undefined, x: Vector): Vector {
  const rows = w.length / x.length;
  return Array.from(
    { length: rows },
    (_, r) => x.reduce((sum, value, c) => sum + w[r * x.length + c]! * value, b?.[r] ?? 0),
  );
}

const silu = (v: number) => v / (1 + Math.exp(-v));
const gelu = (v: number) => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v)));
const plus = (a: Vector, b: ArrayLike<number>): Vector => a.map((value, i) => value + b[i]!);

function rms(x: Vector, weight: Float64Array, epsilon: number): Vector {
  const scale = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + epsilon);
  return x.map((v, i) => v / scale * weight[i]!);
}

function layerNorm(x: Vector, epsilon: number): Vector {
  const mean = x.reduce((sum, v) => sum + v, 0) / x.length;
  const variance = x.reduce((sum, v) => sum + (v - mean) ** 2, 0) / x.length;
  return x.map((v) => (v - mean) / Math.sqrt(variance + epsilon));
}

/** Attention of one sequence: q, k, v by token, heads one after the other in a token. */
function attend(
  q: Vector[],
  k: Vector[],
  v: Vector[],
  heads: number,
  kvHeads: number,
  keys: readonly boolean[],
): Vector[] {
  const size = q[0]!.length / heads;
  return q.map((query) => {
    const out: Vector = [];
    for (let head = 0; head < heads; head++) {
      const shared = Math.floor(head / (heads / kvHeads));
      const scores = k.map((key, j) => {
        if (!keys[j]) return -Infinity;
        let sum = 0;
        for (let d = 0; d < size; d++) sum += query[head * size + d]! * key[shared * size + d]!;
        return sum / Math.sqrt(size);
      });
      const largest = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - largest));
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      for (let d = 0; d < size; d++) {
        out.push(weights.reduce((sum, weight, j) => sum + weight / total * v[j]![shared * size + d]!, 0));
      }
    }
    return out;
  });
}

/** Turns pairs (i, i + size / 2) of each head. */
function rotate(x: Vector, heads: number, position: number, theta: number): Vector {
  const size = x.length / heads, half = size / 2;
  return x.map((value, at) => {
    const d = at % size, pair = d < half ? at + half : at - half;
    const angle = position / theta ** ((d % half) / half);
    return value * Math.cos(angle) + (d < half ? -1 : 1) * x[pair]! * Math.sin(angle);
  });
}

/** Names of a masked language model's tensors, and the sizes that shapes alone do not give. */
export interface LanguageModel {
  readonly embedding: string;
  readonly head: string;
  readonly finalNorm: string;
  /** attention norm, q, k, v, attention output, feed-forward norm, gate, up, down: names without `.weight` */
  readonly block: (i: number) => readonly string[];
  readonly blocks: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly width: number;
  readonly epsilon: number;
  readonly theta: number;
  readonly bias: boolean;
}

/** Logits of one sequence: a row a token. `keys[j]` says whether token j may be attended to. */
export function languageLogits(
  w: Weights,
  model: LanguageModel,
  tokens: readonly number[],
  keys: readonly boolean[] = tokens.map(() => true),
  /** What a linear layer does to its input before it multiplies. */
  rounded: (layer: string, input: Vector) => Vector = (_, input) => input,
): Vector[] {
  const { width, heads, kvHeads, epsilon, theta } = model;
  let real = 0;
  const positions = keys.map((isReal) => isReal ? real++ : 1);
  let x = tokens.map((token) =>
    Array.from(w(`${model.embedding}.weight`).subarray(token * width, (token + 1) * width))
  );
  for (let i = 0; i < model.blocks; i++) {
    const [norm, q, k, v, o, norm2, gate, up, down] = model.block(i) as [
      string,
      string,
      string,
      string,
      string,
      string,
      string,
      string,
      string,
    ];
    const apply = (name: string, row: Vector, bias = false) =>
      linear(w(`${name}.weight`), bias ? w(`${name}.bias`) : undefined, rounded(name, row));
    const normed = x.map((row) => rms(row, w(`${norm}.weight`), epsilon));
    const attended = attend(
      normed.map((row, t) => rotate(apply(q, row, model.bias), heads, positions[t]!, theta)),
      normed.map((row, t) => rotate(apply(k, row, model.bias), kvHeads, positions[t]!, theta)),
      normed.map((row) => apply(v, row, model.bias)),
      heads,
      kvHeads,
      keys,
    );
    x = x.map((row, t) => plus(row, apply(o, attended[t]!)));
    x = x.map((row) => {
      const n = rms(row, w(`${norm2}.weight`), epsilon);
      const opened = apply(up, n);
      return plus(row, apply(down, apply(gate, n).map((value, j) => silu(value) * opened[j]!)));
    });
  }
  return x.map((row) =>
    linear(
      w(`${model.head}.weight`),
      undefined,
      rounded(model.head, rms(row, w(`${model.finalNorm}.weight`), epsilon)),
    )
  );
}

export interface ImageModel {
  readonly blocks: number;
  readonly heads: number;
  readonly width: number;
  readonly size: number;
  readonly patch: number;
  readonly channels: number;
  readonly outputChannels: number;
  readonly attentionBias: boolean;
  readonly normHasWeights: boolean;
  readonly epsilon: number;
}

/** A DiT's output for one image `[channels][y][x]`, flat. */
export function imagePrediction(
  w: Weights,
  model: ImageModel,
  image: ArrayLike<number>,
  timestep: number,
  label: number,
): Vector {
  const { width, size, patch, channels, outputChannels, heads } = model;
  const side = size / patch;
  const waves = (position: number, count: number) =>
    Array.from({ length: count }, (_, i) => position / 10_000 ** (i / count));
  let x: Vector[] = [];
  for (let y = 0; y < side; y++) {
    for (let x0 = 0; x0 < side; x0++) {
      const pixels: Vector = [];
      for (let c = 0; c < channels; c++) {
        for (let p = 0; p < patch; p++) {
          for (let q = 0; q < patch; q++) {
            pixels.push(image[(c * size + y * patch + p) * size + x0 * patch + q]!);
          }
        }
      }
      const [column, row] = [waves(x0, width / 4), waves(y, width / 4)];
      const place = [
        ...column.map(Math.sin),
        ...column.map(Math.cos),
        ...row.map(Math.sin),
        ...row.map(Math.cos),
      ];
      x.push(plus(linear(w("pos_embed.proj.weight"), w("pos_embed.proj.bias"), pixels), place));
    }
  }
  const apply = (name: string, row: Vector, bias = true) =>
    linear(w(`${name}.weight`), bias ? w(`${name}.bias`) : undefined, row);
  const condition = (i: number) => {
    const embedder = `transformer_blocks.${i}.norm1.emb`;
    const angles = Array.from({ length: 128 }, (_, j) => timestep * Math.exp(-Math.log(10_000) * j / 127));
    const inner = apply(`${embedder}.timestep_embedder.linear_1`, [
      ...angles.map(Math.cos),
      ...angles.map(Math.sin),
    ]);
    const time = apply(`${embedder}.timestep_embedder.linear_2`, inner.map(silu));
    const table = w(`${embedder}.class_embedder.embedding_table.weight`);
    return plus(time, table.subarray(label * width, (label + 1) * width)).map(silu);
  };
  const modulate = (row: Vector, scale: Vector, shift: Vector) =>
    row.map((v, i) => v * (1 + scale[i]!) + shift[i]!);
  const chunks = (all: Vector) =>
    Array.from({ length: all.length / width }, (_, i) => all.slice(i * width, (i + 1) * width));
  for (let i = 0; i < model.blocks; i++) {
    const name = `transformer_blocks.${i}`;
    const [shift1, scale1, gate1, shift2, scale2, gate2] = chunks(
      apply(`${name}.norm1.linear`, condition(i)),
    ) as [
      Vector,
      Vector,
      Vector,
      Vector,
      Vector,
      Vector,
    ];
    const normed = x.map((row) => modulate(layerNorm(row, 1e-6), scale1, shift1));
    const part = (which: string) =>
      normed.map((row) => apply(`${name}.attn1.to_${which}`, row, model.attentionBias));
    const attended = attend(part("q"), part("k"), part("v"), heads, heads, normed.map(() => true));
    x = x.map((row, t) =>
      plus(row, apply(`${name}.attn1.to_out.0`, attended[t]!).map((v, j) => v * gate1[j]!))
    );
    x = x.map((row) => {
      let n = layerNorm(row, model.epsilon);
      if (model.normHasWeights) {
        n = n.map((v, j) => v * w(`${name}.norm3.weight`)[j]! + w(`${name}.norm3.bias`)[j]!);
      }
      const inner = apply(`${name}.ff.net.0.proj`, modulate(n, scale2, shift2)).map(gelu);
      return plus(row, apply(`${name}.ff.net.2`, inner).map((v, j) => v * gate2[j]!));
    });
  }
  const [shift, scale] = chunks(apply("proj_out_1", condition(0))) as [Vector, Vector];
  const out: Vector = new Array(outputChannels * size * size).fill(0);
  for (const [t, row] of x.entries()) {
    const pixels = apply("proj_out_2", modulate(layerNorm(row, 1e-6), scale, shift));
    const [y, x0] = [Math.floor(t / side), t % side];
    for (let p = 0; p < patch; p++) {
      for (let q = 0; q < patch; q++) {
        for (let c = 0; c < outputChannels; c++) {
          out[(c * size + y * patch + p) * size + x0 * patch + q] =
            pixels[(p * patch + q) * outputChannels + c]!;
        }
      }
    }
  }
  return out;
}

/** ‖a − b‖ / ‖b‖; not a number when a is. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return NaN;
  let error = 0, norm = 0;
  for (let i = 0; i < b.length; i++) {
    error += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  return Math.sqrt(error / norm);
}
