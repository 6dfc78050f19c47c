import { afterAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { MemoryError } from "../../lib/errors.ts";
import { checkMemory, forecastMemory, forecastTime, SPARE_BYTES } from "../../lib/eval/forecast.ts";
import { measureInferenceMemory } from "../../lib/bench/process/suite.ts";
import { requirementsAt } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { commandOf } from "../../scripts/_command/programs.ts";
import { contents, isDeno, MODELS, run, workplace } from "../_checkpoints.ts";
import { dreamCheckpoint } from "../_models.ts";
import { thrown } from "../tensor/_files.ts";

const DREAM = join(MODELS, "dream-mini"), GLYPHS = join(MODELS, "glyph-dit");
const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

/** So many bytes of weights that a second copy of them cannot hide in the spare. */
const large = place.fresh("large");
const made = run("make_checkpoint.ts", [large, "--hidden", "2048", "--layers", "4"]);

describe("running a model in a process of its own", () => {
  const isKnown = existsSync("/proc/self/status");
  for (const bits of isDeno ? [4] : [4, 2]) {
    test(`takes its ${bits}-bit weights, its activations and no more than 64 MB`, async () => {
      if (!isKnown) return console.log("skipped: this system does not tell a process's peak memory");
      expect(made.code).toBe(0);
      const packed = place.fresh("packed");
      const args = [large, packed, "--bits", `${bits}`, "--solver", "round", "--quiet"];
      expect(run("quantize.ts", args).code).toBe(0);
      const found = await measureInferenceMemory(commandOf, packed);
      const fileBytes = readdirSync(packed).filter((name) => name.endsWith(".safetensors"))
        .reduce((sum, name) => sum + statSync(join(packed, name)).size, 0);
      expect(found.weightBytes).toBeGreaterThan(1.5 * SPARE_BYTES);
      // what is held is what is stored, but for headers and for biases and norms in float32
      expect(Math.abs(found.weightBytes - fileBytes)).toBeLessThan(1e5);
      expect(found.weightBytes).toBe(requirementsAt(packed).weightBytes);
      expect(found.restBytes).toBeLessThan(64e6);
      expect(found.peakResidentBytes).toBeGreaterThan(found.weightBytes);
    });
  }

  test("takes full weights once", async () => {
    if (!isKnown) return console.log("skipped: this system does not tell a process's peak memory");
    const { weightBytes, restBytes } = await measureInferenceMemory(commandOf, large);
    expect(weightBytes).toBeGreaterThan(400e6);
    expect(restBytes).toBeLessThan(64e6);
  });

  test("stays below what generate.ts said before", () => {
    for (
      const args of [[DREAM, "--prompt", "47+38="], [
        GLYPHS,
        "--class",
        "3",
        "--steps",
        "3",
        "--out",
        place.fresh("a.png"),
      ]]
    ) {
      for (const backend of ["auto", "wasm"]) {
        const { code, stdout } = run("generate.ts", [...args, "--json", "--backend", backend]);
        expect(code).toBe(0);
        const { forecast, peakMemoryBytes } = JSON.parse(stdout);
        expect(forecast.seconds).toBeGreaterThan(0);
        expect(peakMemoryBytes).toBeLessThan(forecast.memoryBytes);
        expect(forecast.memory.weights).toBe(requirementsAt(args[0]!).weightBytes);
      }
    }
  });
});

test("bench.ts holds one model at a time, and no more than it said before", () => {
  if (isDeno) {
    return console.log(
      "skipped: which models are held is said in both runtimes alike: Bun's tests measure it",
    );
  }
  const args = ["--model", large, "--bits", "8", "--solver", "round", "--limit", "1", "--json"];
  const { code, stdout, stderr } = run("bench.ts", args);
  expect(code).toBe(0);
  const { weightBytes } = requirementsAt(large);
  const [, size, unit] = /needs ([\d.]+) (MB|GB) of memory/.exec(stderr)!;
  const said = Number(size) * (unit === "GB" ? 1e9 : 1e6);
  const { peakResidentBytes } = JSON.parse(stdout);
  expect(peakResidentBytes).toBeGreaterThan(weightBytes);
  expect(peakResidentBytes).toBeLessThan(said * 1.005); // it was rounded
  expect(said).toBeLessThan(2 * weightBytes);
});

/** A Dream of the layout of 7B whose files are of the right size but hold nothing: no disk has to be so large. */
function hollowCheckpoint(folder: string, blocks: number): string | undefined {
  const sizes = { width: 3584, inner: 18_944, blocks, heads: 28, kvHeads: 4, vocabulary: 64 };
  const { config } = dreamCheckpoint({ ...sizes, width: 56, inner: 8, blocks: 1 });
  const shapes: [string, number[]][] = [
    ["model.embed_tokens.weight", [64, 3584]],
    ["model.norm.weight", [3584]],
    ["lm_head.weight", [64, 3584]],
  ];
  for (let i = 0; i < blocks; i++) {
    const at = `model.layers.${i}`;
    for (const [part, rows] of [["q_proj", 3584], ["k_proj", 512], ["v_proj", 512]] as const) {
      shapes.push([`${at}.self_attn.${part}.weight`, [rows, 3584]], [`${at}.self_attn.${part}.bias`, [rows]]);
    }
    shapes.push(
      [`${at}.self_attn.o_proj.weight`, [3584, 3584]],
      [`${at}.mlp.gate_proj.weight`, [18_944, 3584]],
      [`${at}.mlp.up_proj.weight`, [18_944, 3584]],
      [`${at}.mlp.down_proj.weight`, [3584, 18_944]],
      [`${at}.input_layernorm.weight`, [3584]],
      [`${at}.post_attention_layernorm.weight`, [3584]],
    );
  }
  let end = 0;
  const header = Object.fromEntries(shapes.map(([name, shape]) => {
    const start = end;
    end += 2 * shape.reduce((product, size) => product * size, 1);
    return [name, { dtype: "BF16", shape, data_offsets: [start, end] }];
  }));
  mkdirSync(folder);
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(text.length), true);
  const fd = openSync(join(folder, "model.safetensors"), "w");
  try {
    writeSync(fd, length);
    writeSync(fd, text);
    ftruncateSync(fd, 8 + text.length + end);
  } catch (error) {
    console.log(`skipped: no file with holes here (${(error as Error).message})`);
    return undefined;
  } finally {
    closeSync(fd);
  }
  const large = {
    hidden_size: 3584,
    intermediate_size: 18_944,
    num_hidden_layers: blocks,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    vocab_size: 64,
    mask_token_id: 1,
  };
  writeFileSync(join(folder, "config.json"), JSON.stringify({ ...config, ...large }));
  for (const name of ["tokenizer.json", "tokenizer_config.json"]) {
    writeFileSync(join(folder, name), contents(DREAM)[name]!, "base64");
  }
  return folder;
}

describe("a model that does not fit", () => {
  test("is refused before a weight is read, with what it needs and what can be done", () => {
    // 4000 blocks of 466 MB: no machine has 1.9 TB left
    const folder = hollowCheckpoint(place.fresh("hollow"), 4000);
    if (folder === undefined) return;
    const out = place.fresh("never");
    for (
      const [script, args] of [
        ["generate.ts", [folder, "--prompt", "47+38="]],
        ["bench.ts", ["--model", folder, "--out", out]],
      ] as const
    ) {
      const started = performance.now();
      run(script, ["--help"]);
      const began = performance.now();
      const { code, stdout, stderr } = run(script, args);
      expect([script, code]).toEqual([script, 6]);
      expect(stderr).toMatch(
        /must fit into the memory available, [\d.]+ [GM]B, got 1\.\d\d TB of memory \(1\.\d\d TB weights/,
      );
      expect(stderr).toContain("--ignore-memory");
      expect(stderr).not.toMatch(/^ +at /m);
      if (script === "generate.ts") expect(stdout).toBe("");
      // Reading it would take hours; what a start takes now tells how busy the machine is.
      expect(performance.now() - began).toBeLessThan(10_000 + 20 * (began - started));
    }
  });

  test("is a MemoryError with both figures; one that fits passes", () => {
    const needs = requirementsAt(DREAM);
    const forecast = forecastMemory(kernels, needs, { activationBytes: 5e6, rows: 10 });
    expect(forecast.weights).toBe(needs.weightBytes);
    expect(forecast.total).toBe(forecast.process + needs.weightBytes + 5e6 + SPARE_BYTES);
    const needed = forecast.total - forecast.process;
    const error = thrown(() => checkMemory("m", forecast, "buy more", needed - 1)) as MemoryError;
    expect(error).toBeInstanceOf(MemoryError);
    expect([error.code, error.neededBytes, error.availableBytes, error.path]).toEqual([
      "AQ_MEMORY",
      needed,
      needed - 1,
      "m",
    ]);
    expect(error.message).toContain("buy more");
    checkMemory("m", forecast, "", needed);
    checkMemory("m", { ...forecast, total: 1e15 }, "", Infinity);
  });

  test("counts the copies of WebAssembly, and refuses what it cannot address", async () => {
    using wasm = await openKernels({ backend: "wasm" });
    const needs = requirementsAt(GLYPHS);
    const { copies, total, process: resident } = forecastMemory(wasm, needs, {
      activationBytes: 0,
      rows: 64,
    });
    // the modulation's 768 × 128 float32 weights, or a feed-forward of 512 × 128 with 64 rows of both widths
    expect(copies).toBe(Math.max(4 * (768 * 128 + 64 * 896), 4 * (512 * 128 + 64 * 640)));
    expect(total).toBe(resident + needs.weightBytes + copies + SPARE_BYTES);
    const huge = { ...needs, matrices: [{ ...needs.matrices[0]!, bytes: 2 ** 32 }] };
    expect(thrown(() => forecastMemory(wasm, huge, { activationBytes: 0, rows: 1 }))).toBeInstanceOf(
      MemoryError,
    );
  });
});

test("the time of a run is that of its multiply-adds at a rate that was measured", () => {
  for (const path of [DREAM, GLYPHS]) {
    const needs = requirementsAt(path);
    const { seconds, multiplyAdds, multiplyAddsPerSecond } = forecastTime(kernels, needs, 5e9, 64);
    expect(multiplyAdds).toBe(5e9);
    expect(multiplyAddsPerSecond).toBeGreaterThan(1e6);
    expect(multiplyAddsPerSecond).toBeLessThan(1e13);
    expect(seconds).toBe(5e9 / multiplyAddsPerSecond);
  }
});
