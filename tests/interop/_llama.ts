/** llama.cpp's library from the optional npm package, run in a process of its own (llama.c). */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ROOT } from "../_checkpoints.ts";

const LIBRARIES = join(ROOT, "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64");

/** Weights of a tensor as ggml dequantizes them. */
export interface ReadTensor {
  readonly type: string;
  readonly values: Float32Array<ArrayBuffer>;
}

/** Compiles the reader; the reason where that cannot be done. */
export function openLlama() {
  if (process.platform !== "linux" || process.arch !== "x64" || !existsSync(LIBRARIES)) {
    return { reason: "the npm package @node-llama-cpp/linux-x64 is not installed" };
  }
  const folder = mkdtempSync(join(tmpdir(), "arrowquant-llama-")), program = join(folder, "llama");
  const libraries = ["libllama.v0.5.0.so", "libggml.v0.5.0.so", "libggml-base.so"].map((name) =>
    `-l:${name}`
  );
  const compiled = spawnSync("cc", [
    ...["-O1", "-Wall", "-Wextra", "-Werror", "-o", program, join(ROOT, "tests/interop/llama.c")],
    ...[`-L${LIBRARIES}`, ...libraries, `-Wl,-rpath,${LIBRARIES}`, "-Wl,--allow-shlib-undefined"],
  ], { encoding: "utf8" });
  if (compiled.status !== 0) {
    rmSync(folder, { recursive: true });
    return { reason: `no C compiler makes the reader: ${compiled.error?.message ?? compiled.stderr}` };
  }
  const out = join(folder, "out.bin");
  const run = (...args: string[]): string => {
    const { status, signal, stdout, stderr } = spawnSync(program, [LIBRARIES, ...args], { encoding: "utf8" });
    if (status === 0) return stdout;
    throw new Error(`llama.cpp failed (${status ?? signal}): ${stderr}`);
  };
  const floats = (): Float32Array<ArrayBuffer> => new Float32Array(new Uint8Array(readFileSync(out)).buffer);
  return {
    /** Logits of every position of sequences of one length. */
    logits(model: string, tokens: Int32Array, batch: number): Float32Array<ArrayBuffer> {
      const path = join(folder, "tokens.bin");
      writeFileSync(path, tokens);
      run("logits", model, path, String(batch), out);
      return floats();
    },
    tokenize: (model: string, text: string): number[] =>
      run("tokenize", model, text, "1").trim().split(" ").filter((id) => id !== "").map(Number),
    /** Every tensor, by its name in the file. */
    dequantize(model: string): Map<string, ReadTensor> {
      const lines = run("dequantize", model, out).trim().split("\n"), all = floats();
      let begin = 0;
      return new Map(lines.map((line) => {
        const [name, type, count] = line.split(" ") as [string, string, string];
        const values = all.slice(begin, begin += Number(count));
        return [name, { type, values }];
      }));
    },
    close: () => rmSync(folder, { recursive: true, force: true }),
  };
}

/** Positions with the same most probable token, and the mean KL divergence, of two sets of logits. */
export function compareLogits(wanted: Float32Array, got: Float32Array, vocabulary: number) {
  const positions = wanted.length / vocabulary;
  const distribution = (logits: Float32Array, i: number) => {
    const own = logits.subarray(i * vocabulary, (i + 1) * vocabulary), most = Math.max(...own);
    const powers = Array.from(own, (logit) => Math.exp(logit - most)), sum = powers.reduce((a, b) => a + b);
    return { best: own.indexOf(most), probabilities: powers.map((power) => power / sum) };
  };
  let same = 0, kl = 0;
  for (let i = 0; i < positions; i++) {
    const p = distribution(wanted, i), q = distribution(got, i);
    same += Number(p.best === q.best);
    p.probabilities.forEach((value, j) => kl += value * Math.log(value / q.probabilities[j]!));
  }
  return { positions, same, kl: kl / positions };
}

/**
 * What a layer of this type multiplies in llama.cpp on the CPU (ggml's quantize_row_q8_0 and
 * quantize_row_q8_K): its input in 8-bit codes, in blocks of 32 with a half-precision scale, or of 256 for
 * K-types.
 */
export function inputsRoundedAsLlama(type: string, input: readonly number[]): number[] {
  if (!type.startsWith("Q")) return [...input];
  const isK = type.endsWith("_K"), size = isK ? 256 : 32, f32 = Math.fround, out: number[] = [];
  for (let begin = 0; begin < input.length; begin += size) {
    const block = input.slice(begin, begin + size).map(f32);
    const most = block.reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a, 0);
    if (most === 0) {
      out.push(...block);
    } else if (isK) {
      const inverse = f32(-127 / most), scale = f32(1 / inverse);
      out.push(...block.map((value) => Math.min(127, Math.round(f32(inverse * value))) * scale));
    } else {
      const scale = f32(Math.abs(most) / 127),
        inverse = f32(1 / scale),
        stored = new Float16Array([scale])[0]!;
      out.push(...block.map((value) => Math.round(f32(value * inverse)) * stored));
    }
  }
  return out;
}
