/**
 * llama.cpp's own library as the peer of a denoising step: a Dream model of given sizes with random weights
 * in one of ggml's types, written as GGUF, opened and run by the library of the npm package
 * `@node-llama-cpp/linux-x64`.
 */
import { closeSync, openSync, readdirSync, writeSync } from "node:fs";
import { join } from "node:path";
import { f32, ggufHeader, type GgufValue, padding, text, u32 } from "../../interop/gguf/container.ts";
import { type GgmlType, rowBytes } from "../../interop/gguf/types.ts";
import type { MaskedTransformerConfig } from "../../models/mod.ts";
import { cText, openCompiled } from "../compiled.ts";
import { type Ggml, openGgml } from "../ggml.ts";
import { gaussianWeights } from "../random.ts";

/** Types of the matrices, by bits of ours. */
export const LLAMA_TYPES = { 2: "Q2_K", 4: "Q4_K" } as const;
type MatrixType = (typeof LLAMA_TYPES)[keyof typeof LLAMA_TYPES];

/** Whether rows divide into blocks of these types. */
export const fitsBlocks = ({ hiddenSize, intermediateSize }: MaskedTransformerConfig): boolean =>
  hiddenSize % 256 === 0 && intermediateSize % 256 === 0;

/** Rows that are made; a matrix repeats them. */
const MADE_ROWS = 32;

type Row = readonly [name: string, type: GgmlType, rows: number, cols: number];

function tensorsOf(config: MaskedTransformerConfig, type: MatrixType): Row[] {
  const { hiddenSize, intermediateSize, vocabularySize, blocks, heads, keyValueHeads, headSize } = config;
  const width = heads * headSize, kvWidth = keyValueHeads * headSize;
  const matrix = (name: string, rows: number, cols: number): Row => [`${name}.weight`, type, rows, cols];
  const vector = (name: string, length: number): Row => [name, "F32", 1, length];
  const attention = [["q", width], ["k", kvWidth], ["v", kvWidth]] as const;
  return [
    matrix("token_embd", vocabularySize, hiddenSize),
    vector("output_norm.weight", hiddenSize),
    matrix("output", vocabularySize, hiddenSize),
    ...Array.from({ length: blocks }, (_, i) => `blk.${i}`).flatMap((at) => [
      vector(`${at}.attn_norm.weight`, hiddenSize),
      ...attention.flatMap(([part, rows]) => [
        matrix(`${at}.attn_${part}`, rows, hiddenSize),
        vector(`${at}.attn_${part}.bias`, rows),
      ]),
      matrix(`${at}.attn_output`, hiddenSize, width),
      vector(`${at}.ffn_norm.weight`, hiddenSize),
      matrix(`${at}.ffn_gate`, intermediateSize, hiddenSize),
      matrix(`${at}.ffn_up`, intermediateSize, hiddenSize),
      matrix(`${at}.ffn_down`, hiddenSize, intermediateSize),
    ]),
  ];
}

/** Writes a model of random weights, without a tokenizer. */
function writeRandomGguf(
  ggml: Ggml,
  path: string,
  config: MaskedTransformerConfig,
  type: MatrixType,
): void {
  const own = (key: string, value: GgufValue) => [`dream.${key}`, value] as const;
  const metadata = new Map([
    ["general.architecture", text("dream")],
    ["tokenizer.ggml.model", text("none")],
    own("vocab_size", u32(config.vocabularySize)),
    own("context_length", u32(config.maxTokens)),
    own("embedding_length", u32(config.hiddenSize)),
    own("block_count", u32(config.blocks)),
    own("feed_forward_length", u32(config.intermediateSize)),
    own("attention.head_count", u32(config.heads)),
    own("attention.head_count_kv", u32(config.keyValueHeads)),
    own("attention.layer_norm_rms_epsilon", f32(config.normEpsilon)),
    own("rope.freq_base", f32(config.rotaryTheta)),
  ]);
  const rows = tensorsOf(config, type);
  const infos = rows.map(([name, dtype, count, cols]) => ({
    name,
    type: dtype,
    shape: count === 1 ? [cols] : [count, cols],
    bytes: count * rowBytes(dtype, cols),
  }));
  const file = openSync(path, "w");
  try {
    writeSync(file, ggufHeader(metadata, infos));
    rows.forEach(([name, dtype, count, cols], i) => {
      const made = dtype === "F32"
        ? new Uint8Array(new Float32Array(cols).fill(name.endsWith("bias") ? 0.01 : 1).buffer)
        : quantizedRows(ggml, type, cols);
      for (let left = count * rowBytes(dtype, cols); left > 0; left -= made.length) {
        writeSync(file, made.subarray(0, Math.min(left, made.length)));
      }
      writeSync(file, new Uint8Array(padding(infos[i]!.bytes)));
    });
  } finally {
    closeSync(file);
  }
}

function quantizedRows(ggml: Ggml, type: MatrixType, cols: number): Uint8Array {
  const weights = gaussianWeights(MADE_ROWS * cols, cols).map((value) => value / Math.sqrt(cols));
  const packed = new Uint8Array(MADE_ROWS * rowBytes(type, cols));
  ggml.quantize(type === "Q2_K" ? "q2_K" : "q4_K", weights, packed, MADE_ROWS, cols);
  return packed;
}

/** An opened model that runs its positions, all masks. */
export interface LlamaStep {
  /** `f32[positions, vocabulary]`, overwritten by each run. */
  readonly logits: Float32Array;
  run(): void;
  close(): void;
}

/** An opened model that runs sequences of one length. */
export interface LlamaModel {
  /** `i32[tokens]` → `f32[tokens, vocabulary]`, overwritten by each run. */
  run(ids: Int32Array): Float32Array;
  close(): void;
}

/** llama.cpp's library, opened. */
export interface Llama {
  /** Opens a file for sequences of so many tokens. @throws where the library refuses it */
  open(path: string, tokens: number, vocabulary: number, threads: number): LlamaModel;
  /** A step of a new model of random weights, written to `path`. @throws where its logits are not finite */
  randomStep(
    path: string,
    config: MaskedTransformerConfig,
    type: MatrixType,
    positions: number,
    threads: number,
  ): LlamaStep;
  close(): void;
}

/** Opens llama.cpp. @returns it, or the reason why it cannot be had */
export async function openLlama(temporary: string): Promise<Llama | { readonly reason: string }> {
  const ggml = await openGgml();
  if ("reason" in ggml) return ggml;
  const { folder } = ggml, files = readdirSync(folder);
  const [base, llama] = [/^libggml\.(?:so$|v)/, /^libllama\.(?:so$|v)/].map((name) =>
    files.find((file) => name.test(file))
  );
  if (base === undefined || llama === undefined) return { reason: `${folder} has no libllama` };
  const library = await openCompiled(temporary, "llama_step", {
    llama_open: {
      parameters: ["buffer", "buffer", "buffer", "buffer", "i32", "i32", "buffer"],
      result: "i32",
    },
    llama_step: { parameters: ["buffer", "buffer", "buffer", "i64"], result: "i32" },
    llama_close: { parameters: ["buffer"], result: "i32" },
  });
  if ("reason" in library) return library;
  const { symbols, count } = library;
  const call = (name: string, ...args: unknown[]) => {
    const status = Number(symbols[name]!(...args));
    if (status !== 0) throw new Error(`Cannot run llama.cpp: ${name} must return 0, got ${status}`);
  };
  const names = [join(folder, base), join(folder, llama), folder].map(cText);
  const open = (path: string, tokens: number, vocabulary: number, threads: number): LlamaModel => {
    const opened = new BigUint64Array(1), logits = new Float32Array(tokens * vocabulary);
    call("llama_open", ...names, cText(path), tokens, threads, opened);
    const run = (ids: Int32Array) => {
      call("llama_step", opened, ids, logits, count(logits.length));
      return logits;
    };
    return { run, close: () => call("llama_close", opened) };
  };
  return {
    open,
    randomStep(path, config, type, positions, threads) {
      writeRandomGguf(ggml, path, config, type);
      const ids = new Int32Array(positions).fill(config.maskToken);
      const model = open(path, positions, config.vocabularySize, threads), logits = model.run(ids);
      const run = () => void model.run(ids);
      if (!logits.every(Number.isFinite) || logits.every((value) => value === 0)) {
        throw new Error(`Cannot time llama.cpp: its logits at ${type} must be finite numbers`);
      }
      return { logits, run, close: model.close };
    },
    close() {
      library.close();
      ggml.close();
    },
  };
}
