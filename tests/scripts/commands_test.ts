import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { WORK_FOLDER } from "../../lib/pipeline/mod.ts";
import { findProgram } from "../../scripts/_command/programs.ts";
import { progressText } from "../../scripts/_command/progress.ts";
import { formatBytes, formatCells } from "../../lib/eval/table.ts";
import { formatCount, formatSeconds } from "../../scripts/_command/text.ts";
import {
  contents,
  differences,
  gaussian,
  isDeno,
  matrix,
  MODELS,
  ROOT,
  run,
  runAndSignal,
  workplace,
  writeCheckpoint,
} from "../_checkpoints.ts";
import { randomIntegers } from "../tensor/_files.ts";

const place = workplace();
afterAll(place.remove);

const DREAM = join(MODELS, "dream-mini");
const DIT = join(MODELS, "glyph-dit");

/** 19 million weights: enough for a run to be stopped on its way. */
const large = place.fresh("large");
const made = run("make_checkpoint.ts", [large, "--hidden", "512", "--layers", "4", "--shards", "3"]);
const LARGE_OPTIONS = ["--bits", "2", "--solver", "clip", "--threads", "1", "--zero-point", "integer"];
const reference = place.fresh("reference");
const startedAt = performance.now();
const unbroken = run("quantize.ts", [large, reference, ...LARGE_OPTIONS]);
const unbrokenMilliseconds = performance.now() - startedAt;

describe("quantize.ts", () => {
  test("quantizes, and inspect.ts and dequantize.ts follow", () => {
    const output = place.fresh();
    const { code, stdout } = run("quantize.ts", [
      DREAM,
      output,
      "--bits",
      "3",
      "--group-size",
      "32",
      "--solver",
      "clip",
    ]);
    expect(code).toBe(0);
    expect(stdout).toContain("bits/weight");
    expect(stdout).toContain("4.021 bits per weight");
    expect(stdout).toMatch(/backend +(native|wasm)/);

    const inspected = run("inspect.ts", [output, "--against", DREAM, "--verify"]);
    expect(inspected.code).toBe(0);
    expect(inspected.stdout).toContain("every file is as written");
    expect(inspected.stdout).toMatch(/q_proj\.weight +BF16 +\[64, 64\] +3 +32 +2,064 +4\.031 +0\.1/);

    const plain = place.fresh("plain");
    expect(run("dequantize.ts", [output, plain, "--quiet"])).toEqual({ code: 0, stdout: "", stderr: "" });
    const again = JSON.parse(run("inspect.ts", [plain, "--against", output, "--json"]).stdout);
    expect(again.totals.quantizedTensors).toBe(0);
    expect(again.tensors.length).toBe(51);
  });

  test("inspect.ts does not call codes of other programs unquantized", () => {
    const codes = { dtype: "I32", shape: [8, 64], data: new Int32Array(512) };
    const folder = writeCheckpoint(place.fresh("gptq"), {
      "a.qweight": codes,
      "a.scales": matrix(1, 64, gaussian(64, 1)),
    });
    const { code, stdout } = run("inspect.ts", [folder]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/note +the weights are not plain: GPTQ weights/);
    expect(stdout).toMatch(/quantized +by none of this tool's forms: see the note/);
  });

  test("prints its report as JSON", () => {
    const { code, stdout } = run("quantize.ts", [
      DIT,
      place.fresh(),
      "--json",
      "--quiet",
      "--bits",
      "2",
      "--solver",
      "round",
    ]);
    const report = JSON.parse(stdout);
    expect(code).toBe(0);
    // Nine layers in each of six blocks, and the last but one; tables of classes and the head are kept.
    expect(report.totals.tensors).toBe(6 * 9 + 1);
    expect(report.layers.length).toBe(120);
    expect(report.seconds).toBeGreaterThan(0);
    expect(report.backend).toMatch(/native|wasm/);
  });

  test("shows the plan and writes nothing on --dry-run", () => {
    const output = place.fresh();
    const { code, stdout } = run("quantize.ts", [DIT, output, "--dry-run"]);
    expect(code).toBe(0);
    expect(stdout).toContain("Kept by rule:");
    expect(stdout).toMatch(/proj_out_2\.weight +F32 \[4, 128\] +keep +head/);
    expect(existsSync(output)).toBe(false);
  });

  test("takes the configuration from file, environment and options, in this order", () => {
    const file = join(place.path, "config.yaml");
    writeFileSync(file, "bit_width: 8\ngroup_size: 128\nsolver: round\n");
    const variables = { ARROW_QUANT_GROUP_SIZE: "32", ARROW_QUANT_BIT_WIDTH: "4" };
    const args = ["--config", file, "--bits", "3", "--print-config"];
    const { code, stdout } = run("quantize.ts", args, variables);
    expect(code).toBe(0);
    expect(stdout).toMatch(/bit_width: 3 +# from --bits/);
    expect(stdout).toMatch(/group_size: 32 +# from environment ARROW_QUANT_GROUP_SIZE/);
    expect(stdout).toMatch(/solver: round +# from .*config\.yaml/);
  });

  test("takes phases and time groups from options, over file and environment", () => {
    const file = join(place.path, "phases.yaml");
    writeFileSync(file, "num_time_groups: 4\nthermodynamic: {validation: {enabled: true}}\n");
    const variables = { ARROW_QUANT_THERMODYNAMIC_BOUNDARY_SMOOTHING_ENABLED: "true" };
    const enabled = (phases: string[]) => {
      const args = ["--config", file, ...phases, "--print-config"];
      const { code, stdout } = run("quantize.ts", args, variables);
      expect(code).toBe(0);
      return [...stdout.matchAll(/enabled: (true|false) +# from ([^\n]*)/g)].map(([, value, source]) =>
        `${value} ${source!.replace(/.*phases\.yaml/, "file")}`
      );
    };
    expect(enabled(["--phases", "1,3"])).toEqual(["true --phases", "false --phases", "true --phases"]);
    expect(enabled(["--phases=all"])).toEqual(Array(3).fill("true --phases"));
    expect(enabled(["--phases", "none"])).toEqual(Array(3).fill("false --phases"));
    expect(enabled([])).toEqual([
      "true file",
      "true environment ARROW_QUANT_THERMODYNAMIC_BOUNDARY_SMOOTHING_ENABLED",
      "false default",
    ]);
    const { stdout } = run("quantize.ts", ["--config", file, "--time-groups", "7", "--print-config"]);
    expect(stdout).toMatch(/num_time_groups: 7 +# from --time-groups/);
  });

  test("runs the phases that an option names", () => {
    const output = place.fresh();
    const args = [
      DREAM,
      output,
      "--phases",
      "1",
      "--time-groups",
      "3",
      "--samples",
      "32",
      "--solver",
      "round",
    ];
    const { code, stderr } = run("quantize.ts", args);
    expect(code).toBe(0);
    expect(stderr).toMatch(/phase: validation: Markov score .* over 3 time groups/);
    expect(existsSync(join(output, "time_parameters.safetensors"))).toBe(true);
  });

  test("says that a key has no effect yet", () => {
    const { stderr } = run("quantize.ts", [DREAM, place.fresh(), "--solver", "clip"], {
      ARROW_QUANT_MODALITY: "text",
    });
    expect(stderr).toContain("warning: modality");
  });

  test("gives the same files on WebAssembly", () => {
    const [native, wasm] = [place.fresh(), place.fresh()];
    run("quantize.ts", [DIT, native, "--bits", "3", "--solver", "clip"]);
    const { code, stderr } = run("quantize.ts", [
      DIT,
      wasm,
      "--bits",
      "3",
      "--solver",
      "clip",
      "--backend",
      "wasm",
      "--threads",
      "2",
    ]);
    expect(code).toBe(0);
    expect(stderr).toContain("wasm");
    expect(differences(native, wasm)).toEqual([]);
  });
});

describe("exit codes", () => {
  const nan = gaussian(64, 1);
  nan[5] = NaN;
  const broken = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(1, 64, nan) });
  const finished = place.fresh();
  run("quantize.ts", [DREAM, finished, "--solver", "clip"]);
  const nothing = place.fresh("nothing");
  const cases: [what: string, script: string, args: string[], code: number, message: string][] = [
    ["help", "quantize.ts", ["--help"], 0, ""],
    ["help", "inspect.ts", ["--help"], 0, ""],
    ["help", "dequantize.ts", ["--help"], 0, ""],
    ["an unknown option", "quantize.ts", [DREAM, nothing, "--bit", "3"], 2, 'did you mean "--bits"?'],
    [
      "an option that every object has",
      "quantize.ts",
      [DREAM, nothing, "--constructor"],
      2,
      'option "--constructor"',
    ],
    [
      "a far-off option",
      "quantize.ts",
      [DREAM, nothing, "--frobnicate"],
      2,
      'unknown option "--frobnicate"\n',
    ],
    ["a missing path", "quantize.ts", [DREAM], 2, "MODEL and OUT are needed"],
    ["a path too many", "inspect.ts", [DREAM, DIT], 2, "one PATH is needed"],
    ["an option without its value", "quantize.ts", [DREAM, nothing, "--bits"], 2, '"--bits" needs a value'],
    [
      "a value that none takes",
      "quantize.ts",
      [DREAM, nothing, "--dry-run=maybe"],
      2,
      '"--dry-run" takes no value',
    ],
    ["a negative number", "quantize.ts", [DREAM, nothing, "--threads", "-1"], 2, '"num_threads": got -1'],
    ["an empty OUT", "quantize.ts", [DREAM, ""], 4, "output must be a path"],
    ["an empty OUT", "dequantize.ts", [finished, "", "--force"], 4, "output must be a path"],
    ["a folder that cannot be made", "bench.ts", ["--out", "/proc/nope/x"], 4, "/proc/nope/x"],
    ["a fourth phase", "quantize.ts", [DREAM, nothing, "--phases", "1,4"], 2, 'as in 1,3, got "1,4"'],
    ["phases of nothing", "quantize.ts", [DREAM, nothing, "--phases", "1,"], 2, "--phases must be all, none"],
    ["0 time groups", "quantize.ts", [DREAM, nothing, "--time-groups", "0"], 2, '"num_time_groups": got 0'],
    ["5 bits", "quantize.ts", [DREAM, nothing, "--bits", "5"], 2, '"bit_width": got 5'],
    ["no configuration file", "quantize.ts", [DREAM, nothing, "--config", "none.yaml"], 2, "none.yaml"],
    ["resume and force", "quantize.ts", [DREAM, nothing, "--resume", "--force"], 2, "exclude each other"],
    ["an unknown type", "dequantize.ts", [finished, nothing, "--dtype", "F8"], 2, "--dtype must be one of"],
    ["no model", "quantize.ts", [join(place.path, "none"), nothing], 3, "no such file or folder"],
    ["an unquantized model", "dequantize.ts", [DREAM, nothing], 3, "must hold quantized tensors"],
    ["a quantized model", "quantize.ts", [finished, nothing], 3, "dequantize it first"],
    ["NaN", "quantize.ts", [broken, nothing], 3, "row 0, column 5"],
    ["a finished output", "quantize.ts", [DREAM, finished, "--solver", "clip"], 4, "--force"],
    ["the input as output", "quantize.ts", [DREAM, DREAM, "--force"], 4, "must not be the input's folder"],
    ["no manifest", "inspect.ts", [DREAM, "--verify"], 3, "must have a manifest"],
  ];
  // What is refused is the same in both runtimes: Deno need but see each command's exit codes.
  const seen = new Set<string>();
  for (const [what, script, args, code, message] of cases) {
    if (isDeno && seen.has(`${script} ${code}`)) continue;
    seen.add(`${script} ${code}`);
    test(`${script}: ${code} for ${what}`, () => {
      const before = contents(finished);
      const result = run(script, args);
      expect(result.code).toBe(code);
      expect(result.stderr).toContain(message);
      if (code === 0) expect(result.stdout).toContain("Usage:");
      else expect(result.stderr).not.toMatch(/^ +at /m); // no stack for a foreseen error
      expect(existsSync(nothing)).toBe(false);
      expect(contents(finished)).toEqual(before);
    });
  }

  test("4 when standard output is full, with one message", () => {
    if (!existsSync("/dev/full")) return console.log("skipped: no /dev/full");
    for (const args of [[DREAM], [DREAM, "--json"]]) {
      const { code, stderr } = run("inspect.ts", args, {}, { stdoutPath: "/dev/full" });
      expect(code).toBe(4);
      expect(stderr).toMatch(/^error: Cannot print on standard output: .*no space left on device/i);
      expect(stderr).not.toMatch(/^ +at /m);
    }
  });

  test("the error's own when standard error is full", () => {
    if (!existsSync("/dev/full")) return console.log("skipped: no /dev/full");
    const { code, stdout } = run("report.ts", [place.fresh("none")], {}, { stderrPath: "/dev/full" });
    expect([code, stdout]).toEqual([3, ""]);
  });

  test("0 without the permissions that Deno need not give", () => {
    if (!isDeno) return console.log("skipped: only Deno has permissions");
    const args = (output: string) => [DREAM, output, "--solver", "clip", "--backend", "wasm"];
    const outputs = [place.fresh(), place.fresh()] as const;
    const noHost = run("quantize.ts", args(outputs[0]), {}, { permissions: ["-R", "-E", "-W"] });
    expect([noHost.code, noHost.stderr.includes("notice")]).toEqual([0, false]);
    const permissions = ["-R", "-W", "--allow-sys"];
    const noEnvironment = run("quantize.ts", args(outputs[1]), {}, { permissions });
    expect(noEnvironment.code).toBe(0);
    expect(noEnvironment.stderr).toContain("notice: ARROW_QUANT_* variables are not read");
    expect(differences(...outputs)).toEqual([]);
  });

  test("5 for kernels that cannot be opened", () => {
    const { code, stderr } = run("quantize.ts", [DREAM, nothing, "--backend", "native"], {
      ARROWQUANT_LIBRARY: join(place.path, "none.so"),
    });
    expect(code).toBe(5);
    expect(stderr).toContain("none.so");
  });

  test("with --json the error is JSON too", () => {
    const { code, stdout } = run("quantize.ts", [broken, nothing, "--json"]);
    const { error } = JSON.parse(stdout);
    expect(error.code).toBe("AQ_WEIGHTS");
    expect(error.exitCode).toBe(code);
    expect(error.tensor).toBe("a.weight");
    expect(error.path).toBe(join(broken, "model.safetensors"));
  });

  test("4 for a file that differs from its manifest", () => {
    const folder = place.fresh();
    cpSync(finished, folder, { recursive: true });
    const shard = join(folder, "model-00001-of-00002.safetensors");
    const bytes = readFileSync(shard);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(shard, bytes);
    const { code, stdout } = run("inspect.ts", [folder, "--verify", "--json"]);
    expect(code).toBe(4);
    expect(JSON.parse(stdout).mismatches.map(({ name }: { name: string }) => name)).toEqual([
      "model-00001-of-00002.safetensors",
    ]);
  });

  test("3 for a missing shard, a lying index and a truncated file, with nothing written", () => {
    const damages: [string, (folder: string) => void][] = [
      [
        "model-00002-of-00002.safetensors",
        (folder) => rmSync(join(folder, "model-00002-of-00002.safetensors")),
      ],
      ["no.such.weight", (folder) => {
        const path = join(folder, "model.safetensors.index.json");
        const index = JSON.parse(readFileSync(path, "utf8"));
        index.weight_map["no.such.weight"] = "model-00001-of-00002.safetensors";
        writeFileSync(path, JSON.stringify(index));
      }],
      ["model-00001-of-00002.safetensors", (folder) => {
        const path = join(folder, "model-00001-of-00002.safetensors");
        writeFileSync(path, readFileSync(path).subarray(0, 5000));
      }],
    ];
    for (const [message, damage] of damages) {
      const folder = place.fresh("input");
      cpSync(DREAM, folder, { recursive: true });
      damage(folder);
      const { code, stderr } = run("quantize.ts", [folder, nothing]);
      expect(code).toBe(3);
      expect(stderr).toContain(message);
      expect(existsSync(nothing)).toBe(false);
    }
  });
});

describe("a run that is stopped", () => {
  test("(the unbroken run)", () => {
    expect(made.code).toBe(0);
    expect(unbroken.code).toBe(0);
  });

  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    test(`by ${signal} exits with ${code} and goes on with --resume`, async () => {
      const output = place.fresh();
      const args = [large, output, ...LARGE_OPTIONS];
      const result = await runAndSignal("quantize.ts", args, signal, (stderr) => /native|wasm/.test(stderr));
      expect(result.code).toBe(code);
      expect(result.stderr).toContain("--resume");
      expect(readdirSync(output)).toEqual([WORK_FOLDER]);
      expect(run("inspect.ts", [output]).code).toBe(3);
      expect(run("quantize.ts", args).code).toBe(4);
      expect(run("quantize.ts", [...args, "--resume"]).code).toBe(0);
      expect(differences(output, reference)).toEqual([]);
    });
  }

  test("by SIGKILL at any moment goes on with --resume, to the same bytes", async () => {
    const random = randomIntegers(7);
    const output = place.fresh();
    const args = [large, output, ...LARGE_OPTIONS, "--resume"];
    let kills = 0;
    for (let attempt = 0; attempt < (isDeno ? 3 : 5); attempt++) {
      const delay = unbrokenMilliseconds * (0.15 + 0.8 * random(1000) / 1000);
      const result = await runAndSignal("quantize.ts", args, "SIGKILL", delay);
      if (result.signal === "SIGKILL") kills++;
      else expect(result.code).toBe(0);
    }
    expect(kills).toBeGreaterThan(0);
    const last = run("quantize.ts", args);
    expect(last.stderr).not.toContain("error");
    expect(last.code).toBe(0);
    expect(differences(output, reference)).toEqual([]);
  });
});

describe("text", () => {
  test("bytes, counts, durations and tables", () => {
    expect([0, 999, 1000, 12_345, 2e9, 3.5e13].map(formatBytes)).toEqual([
      "0 B",
      "999 B",
      "1.00 kB",
      "12.3 kB",
      "2.00 GB",
      "35.0 TB",
    ]);
    expect([0, 999, 1000, 1234567].map(formatCount)).toEqual(["0", "999", "1,000", "1,234,567"]);
    expect([0, 9.6, 61, 3723].map(formatSeconds)).toEqual(
      ["0", "10", "1:01", "1:02:03"].map((t) => t.includes(":") ? t : `0:${t.padStart(2, "0")}`),
    );
    expect(formatCells([["a", "1"], ["bb", "22"]], [1])).toBe("a    1\nbb  22");
  });

  test("progress: share, rates and remaining time of this run alone", () => {
    const text = progressText({
      tensor: "a.weight",
      tensorsDone: 3,
      tensors: 10,
      weightsDone: 60e6,
      weights: 100e6,
      bytesDone: 120e6,
      bytes: 200e6,
      bytesResumed: 40e6,
    }, 2);
    expect(text).toBe(
      "writing  60%  3/10 tensors  0:02 elapsed  0:02 left  20 M weights/s  40.0 MB/s  a.weight",
    );
    expect(progressText({
      stage: "solving",
      parts: "layers",
      tensorShare: 0.25,
      tensor: "b.weight (solving)",
      tensorsDone: 1,
      tensors: 4,
      weightsDone: 1.25e6,
      weights: 4e6,
      bytesDone: 20,
      bytes: 100,
      bytesResumed: 0,
    }, 100)).toBe(
      "solving  20%  1/4 layers and 25% of one  1:40 elapsed  6:40 left  0.01 M weights/s  b.weight (solving)",
    );
  });
});

test("bench.ts says that it was stopped, and that nothing is kept", async () => {
  if (isDeno) return console.log("skipped: Bun's tests stop it");
  const args = ["--model", join(MODELS, "dream-mini"), "--bits", "4"];
  const stopped = await runAndSignal("bench.ts", args, "SIGINT", (stderr) => stderr.includes("accuracy: "));
  expect(stopped.code).toBe(130);
  expect(stopped.stderr).toContain("\nerror: Stopped by SIGINT: nothing of this measurement is kept\n");
});

test("collect_statistics.py says what it needs where there is no PyTorch", () => {
  const python = findProgram("python3");
  if (python === undefined) return console.log("skipped: no python3");
  // -S: a Python without its packages.
  const script = join(ROOT, "scripts", "collect_statistics.py");
  const { status, stderr } = spawnSync(python, ["-I", "-S", script, "--help"], { encoding: "utf8" });
  expect([status, stderr.trim().split("\n").length]).toEqual([1, 1]);
  expect(stderr).toMatch(/^collect_statistics.py needs PyTorch, which .+ lacks: run it by the Python/);
});
