/** `scripts/generate.ts` as its user sees it. */
import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { inflateSync } from "node:zlib";
import { loadClassifier } from "../../lib/eval/classifier.ts";
import { readPuzzles } from "../../lib/eval/puzzles.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { StateDisplay } from "../../scripts/_command/progress.ts";
import { isDeno, MODELS, ROOT, run, workplace } from "../_checkpoints.ts";
import { lladaCheckpoint, store } from "../_models.ts";
import { readIndependently } from "../tensor/_files.ts";

const DREAM = join(MODELS, "dream-mini"), GLYPHS = join(MODELS, "glyph-dit");
const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const packed = Object.fromEntries(["dream", "dit"].map((name) => {
  const output = place.fresh(name);
  const input = name === "dream" ? DREAM : GLYPHS;
  expect(run("quantize.ts", [input, output, "--bits", "4", "--solver", "clip", "--quiet"]).code).toBe(0);
  return [name, output];
})) as Record<"dream" | "dit", string>;

/** Pixels of a gray PNG, each row filtered by nothing. */
function grayPixels(path: string): { width: number; height: number; pixels: Uint8Array } {
  const file = readFileSync(path), view = new DataView(file.buffer, file.byteOffset);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  expect([...file.subarray(24, 26)]).toEqual([8, 0]); // bits, gray
  const parts: Uint8Array[] = [];
  for (let at = 8; at < file.length;) {
    const length = view.getUint32(at), type = file.subarray(at + 4, at + 8).toString();
    if (type === "IDAT") parts.push(file.subarray(at + 8, at + 8 + length));
    at += length + 12;
  }
  const raw = inflateSync(Buffer.concat(parts));
  const pixels = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    expect(raw[y * (width + 1)]).toBe(0);
    pixels.set(raw.subarray(y * (width + 1) + 1, (y + 1) * (width + 1)), y * width);
  }
  return { width, height, pixels };
}

describe("solving puzzles", () => {
  test("answers one of each task, full and packed", () => {
    const puzzles = readPuzzles(join(DREAM, "eval.jsonl"));
    for (const folder of [DREAM, packed.dream]) {
      for (const index of [0, 300, 600]) {
        const { prompt, answer } = puzzles[index]!;
        const { code, stdout } = run("generate.ts", [folder, "--prompt", prompt, "--quiet"]);
        expect([prompt, code, stdout]).toEqual([prompt, 0, `${answer}\n`]);
      }
    }
  });

  test("quantizes the inputs of packed layers, says so, and can be told not to", () => {
    const ask = (...args: string[]) => run("generate.ts", [packed.dream, "--prompt", "47+38=", ...args]);
    const said = /activations: 8 bits, each token by its own range/;
    expect(ask().stderr).toMatch(said);
    expect(ask("--activations", "f32").stderr).not.toMatch(said);
    expect(JSON.parse(ask("--json").stdout)).toMatchObject({ activations: "int8", text: "085" });
    expect(JSON.parse(ask("--json", "--activations", "f32").stdout)).toMatchObject({
      activations: "f32",
      text: "085",
    });
    expect(ask("--activations", "int4")).toMatchObject({ code: 2 });
    const full = JSON.parse(run("generate.ts", [DREAM, "--prompt", "47+38=", "--json"]).stdout);
    expect(full).toMatchObject({ activations: "f32" });
  });

  test("says what it needs before it starts, and nothing when it is to be quiet", () => {
    const { stdout, stderr } = run("generate.ts", [DREAM, "--prompt", "47+38="]);
    expect(stdout).toBe("085\n");
    expect(stderr).toMatch(
      /needs \d+ MB of memory \(357 kB weights \+ [\d.]+ kB activations and buffers \+ \d+ MB process\)/,
    );
    expect(stderr).toMatch(/takes about [\d.]+ s \(estimate: /);
    expect(run("generate.ts", [DREAM, "--prompt", "47+38=", "--quiet"]).stderr).toBe("");
  });
});

describe("--trace", () => {
  const lines = [
    "0/4  t 1.000  <bos>47+38=░░░░",
    "1/4  t 0.750  <bos>47+38=░░░<eos>",
    "2/4  t 0.501  <bos>47+38=0░░<eos>",
    "3/4  t 0.251  <bos>47+38=0░5<eos>",
    "4/4  t 0.001  <bos>47+38=085<eos>",
  ];

  test("prints a line a step where nobody looks", () => {
    const { stdout } = run("generate.ts", [DREAM, "--prompt", "47+38=", "--trace", "--quiet"]);
    expect(stdout).toBe(`${lines.join("\n")}\n085\n`);
  });

  test("fills the masks in place on a terminal", () => {
    if (spawnSync("script", ["--version"]).status !== 0) return console.log("skipped: no command script");
    const importMap = `--import-map=${join(ROOT, "tests", "deno", "import_map.json")}`;
    const runtime = isDeno ? [process.execPath, "run", "-A", "--no-check", importMap] : [process.execPath];
    const line = [
      ...runtime,
      join(ROOT, "scripts", "generate.ts"),
      DREAM,
      "--prompt",
      "47+38=",
      "--trace",
      "--quiet",
    ];
    const { stdout, status } = spawnSync("script", [
      "-qec",
      line.map((part) => `'${part}'`).join(" "),
      "/dev/null",
    ], {
      encoding: "utf8",
      stdio: ["ignore", "pipe", "pipe"],
    });
    expect(status).toBe(0);
    // the terminal writes \r\n for \n
    expect(stdout.replaceAll("\r\n", "\n")).toBe(`${lines.join("\r\x1b[J")}\n085\n`);
  });

  test("goes back over as many rows as the text took", () => {
    let written = "";
    const display = new StateDisplay({ isTTY: true, columns: 10 }, (text) => written += text);
    display.show("a".repeat(10));
    display.show("b".repeat(11));
    display.show("漢".repeat(11)); // two cells each: three rows
    display.show("c");
    display.end();
    expect(written).toBe(
      `${"a".repeat(10)}\r\x1b[J${"b".repeat(11)}\r\x1b[1A\x1b[J${"漢".repeat(11)}\r\x1b[2A\x1b[Jc\n`,
    );
    written = "";
    const plain = new StateDisplay({}, (text) => written += text);
    plain.show("a");
    plain.show("b");
    plain.end();
    expect(written).toBe("a\nb\n");
  });

  test("puts the way from noise to image into the PNG", () => {
    const out = place.fresh("trace.png");
    const args = ["--class", "1,2", "--steps", "9", "--zoom", "1", "--trace", "--quiet", "--out", out];
    expect(run("generate.ts", [GLYPHS, ...args]).stdout).toBe(`${out}\n`);
    const { width, height } = grayPixels(out);
    expect([width, height]).toEqual([160, 32]); // ten pictures a class
  });
});

test("a pipeline with a VAE: latents are saved, which is said before the work, with its factor", () => {
  const root = place.fresh("pipeline");
  for (const name of ["transformer", "vae", "scheduler"]) mkdirSync(join(root, name), { recursive: true });
  for (const name of ["config.json", "diffusion_pytorch_model.safetensors"]) {
    copyFileSync(join(GLYPHS, name), join(root, "transformer", name));
  }
  copyFileSync(join(GLYPHS, "scheduler_config.json"), join(root, "scheduler", "scheduler_config.json"));
  const vae = { _class_name: "AutoencoderKL", scaling_factor: 0.18215, shift_factor: null };
  writeFileSync(join(root, "vae", "config.json"), JSON.stringify(vae));
  writeFileSync(join(root, "model_index.json"), JSON.stringify({ vae: ["diffusers", "AutoencoderKL"] }));
  const out = join(root, "two.png"), latents = join(root, "two.safetensors");
  const { code, stderr } = run("generate.ts", [root, "--class", "3,4", "--steps", "1", "--out", out]);
  expect(code).toBe(0);
  expect(stderr.indexOf(`which does not run here: they are saved as ${latents}`)).toBeGreaterThan(0);
  expect(stderr.indexOf("does not run here")).toBeLessThan(stderr.indexOf("needs "));
  expect(existsSync(out)).toBe(true);
  const { metadata, tensors } = readIndependently(latents);
  expect(metadata).toMatchObject({ scaling_factor: "0.18215", classes: "3,4", seed: "0" });
  expect("shift_factor" in metadata).toBe(false);
  expect([tensors["latents"]!.dtype, tensors["latents"]!.shape]).toEqual(["F32", [2, 1, 16, 16]]);
});

describe("drawing glyphs", () => {
  const classifier = loadClassifier(join(GLYPHS, "classifier.safetensors"), kernels);
  for (const [name, folder] of [["full precision", GLYPHS], ["4 bits", packed.dit]] as const) {
    test(`at ${name} looks like the digits that were asked for`, () => {
      const out = place.fresh("digits.png");
      const args = ["--class", "0,1,2,3,4,5,6,7,8,9", "--zoom", "1", "--seed", "1", "--quiet", "--out", out];
      const { code, stdout } = run("generate.ts", [folder, ...args]);
      expect([code, stdout]).toEqual([0, `${out}\n`]);
      const { width, height, pixels } = grayPixels(out);
      expect([width, height]).toEqual([160, 16]); // all in one row
      const images = new Float32Array(10 * 256);
      for (let i = 0; i < 10; i++) {
        for (let y = 0; y < 16; y++) {
          for (let x = 0; x < 16; x++) {
            images[i * 256 + y * 16 + x] = pixels[y * 160 + i * 16 + x]! / 127.5 - 1;
          }
        }
      }
      const { classes } = classifier.classify(images);
      const right = [...classes].filter((found, i) => found === i).length;
      // 84 % are recognized on average; by chance seven of ten would be once in a hundred thousand times
      expect(right).toBeGreaterThanOrEqual(7);
    });
  }
});

describe("options that are missing, unknown or contradict the model", () => {
  const llada = store(place.fresh("llada"), lladaCheckpoint());
  const out = place.fresh("never.png");
  const cases: [string[], number, string][] = [
    [["--prompt", "x"], 2, "one MODEL is needed, got 0"],
    [[DREAM, GLYPHS], 2, "one MODEL is needed, got 2"],
    [[DREAM], 2, "--prompt is needed"],
    [[DREAM, "--prompt", ""], 2, '"--prompt" needs a value'],
    [[DREAM, "--promt", "47+38="], 2, 'did you mean "--prompt"?'],
    [[DREAM, "--prompt", "47+38=", "--class", "3"], 2, "--class is not for a model that writes"],
    [[DREAM, "--prompt", "47+38=", "--out", out], 2, "--out is not for a model that writes"],
    [[DREAM, "--prompt", "47+38=", "--block-length", "2"], 2, "--block-length is not for a Dream model"],
    [[DREAM, "--prompt", "47+38=", "--length", "-1"], 2, '--length must be a whole number ≥ 0, got "-1"'],
    [[DREAM, "--prompt", "47+38=", "--temperature", "-1"], 2, "temperature must be a number ≥ 0, got -1"],
    [[DREAM, "--prompt", "47+38=", "--temperature", "hot"], 2, '--temperature must be a number, got "hot"'],
    [[DREAM, "--prompt", "47+38=", "--top-k", "0"], 2, "topK must be a whole number ≥ 1, got 0"],
    [[DREAM, "--prompt", "47+38=", "--seed", "-1"], 2, '--seed must be a whole number ≥ 0, got "-1"'],
    [[DREAM, "--prompt", "47+38=", "--backend", "gpu"], 2, "backend"],
    [[DREAM, "--prompt", "47", "--length", "0"], 2, "nothing to write"],
    [[GLYPHS, "--prompt", "47+38="], 2, "--prompt is not for a model that draws"],
    [[GLYPHS, "--top-k", "3"], 2, "--top-k is not for a model that draws"],
    [[GLYPHS, "--class", "three", "--out", out], 2, '--class must be a whole number ≥ 0, got "three"'],
    [[GLYPHS, "--zoom", "0", "--out", out], 2, "--zoom must be a whole number from 1 to 64"],
    [[GLYPHS, "--sampler", "euler", "--out", out], 2, "--sampler must be one of ddim, ddpm"],
    [[llada, "--prompt", "x", "--top-p", "0.5"], 2, "--top-p is not for a LLaDA model"],
    [[llada, "--prompt", "x"], 3, "got none: copy the tokenizer's files from where the model came from"],
  ];
  test("--guidance goes before the stored cfg_scale of a LLaDA model", () => {
    const { config, tensors } = lladaCheckpoint();
    const model = store(place.fresh("llada"), {
      tensors,
      config: { ...config, mask_token_id: 1, eos_token_id: 3 },
    });
    for (const name of ["tokenizer.json", "tokenizer_config.json"]) {
      copyFileSync(join(DREAM, name), join(model, name));
    }
    const write = (...more: string[]) =>
      run("generate.ts", [model, "--prompt", "47", "--length", "2", ...more]);
    expect(write("--guidance", "-2").stderr).toContain("guidance must be a number ≥ 0, got -2");
    const tokens = (...more: string[]) => JSON.parse(write("--json", ...more).stdout).tokens as number[];
    const plain = tokens();
    writeFileSync(join(model, "generation_config.json"), '{"cfg_scale": 9}');
    expect(tokens("--guidance", "0")).toEqual(plain);
    expect(tokens()).not.toEqual(plain);
  });

  // The parser is the same in both runtimes: Deno need but see each exit code.
  const seen = new Set<number>();
  for (const [args, code, message] of cases) {
    if (isDeno && seen.has(code)) continue;
    seen.add(code);
    test(args.map((arg) => arg.includes("/") ? "…" : arg).join(" ") || "nothing", () => {
      const result = run("generate.ts", args);
      expect([result.code, result.stdout]).toEqual([code, ""]);
      expect(result.stderr).toContain(message);
      expect(result.stderr).not.toMatch(/^ +at /m);
      expect(result.stderr).not.toContain("takes about"); // refused before the run was even announced
      expect(existsSync(out)).toBe(false);
    });
  }

  test("--help says what there is", () => {
    const { code, stdout, stderr } = run("generate.ts", ["--help"]);
    expect([code, stderr]).toEqual([0, ""]);
    for (const option of ["--prompt", "--class", "--steps", "--trace", "--ignore-memory", "--out"]) {
      expect(stdout).toContain(option);
    }
  });
});
