import { afterAll, describe, expect, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { CheckpointError, OutputError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  MANIFEST_FILE,
  quantizeCheckpoint,
  readManifest,
  verifyFiles,
  WORK_FOLDER,
} from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { contents, rejection, workplace } from "../_checkpoints.ts";
import { configOf, DIT, DREAM, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);

describe("the output folder", () => {
  test("is refused when it is finished, and replaced with force", async () => {
    const output = place.fresh();
    await quantizeTo(output, twoShards());
    writeFileSync(join(output, "notes.txt"), "mine");
    const error = await rejection(quantizeTo(output, DIT));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("--force");
    await quantizeTo(output, DIT, { force: true });
    expect(readdirSync(output).sort()).toEqual([
      MANIFEST_FILE,
      "config.json",
      "diffusion_pytorch_model.safetensors",
      "notes.txt",
      "scheduler_config.json",
    ]);
    expect(readFileSync(join(output, "notes.txt"), "utf8")).toBe("mine");
    openCheckpoint(output).close();
  });

  test("stays as it is while a forced run is not finished", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM);
    const before = contents(output);
    const controller = new AbortController();
    await rejection(quantizeTo(output, DIT, {
      force: true,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone > 50 && controller.abort("SIGINT"),
    }));
    rmSync(join(output, WORK_FOLDER), { recursive: true });
    expect(contents(output)).toEqual(before);
  });

  test("of somebody else is refused, also with force, and left alone", async () => {
    for (const force of [false, true]) {
      const output = place.fresh();
      mkdirSync(output);
      writeFileSync(join(output, "config.json"), "precious");
      const error = await rejection(quantizeTo(output, DREAM, { force }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("--force does not delete");
      expect(contents(output)).toEqual({ "config.json": btoa("precious") });
    }
  });

  test("is not taken for ours by a manifest or a journal that names files elsewhere", async () => {
    const outer = place.fresh("outer");
    const output = join(outer, "out");
    const victim = join(outer, "victim");
    for (const name of ["../victim", victim, ".."]) {
      await quantizeTo(output, DREAM, { force: true });
      writeFileSync(victim, "precious");
      const path = join(output, MANIFEST_FILE);
      const text = readFileSync(path, "utf8");
      const manifest = JSON.parse(text);
      manifest.files[name] = { bytes: 8, sha256: "" };
      writeFileSync(path, JSON.stringify(manifest));
      const error = await rejection(quantizeTo(output, DREAM, { force: true }));
      expect(error).toBeInstanceOf(OutputError);
      writeFileSync(path, text);
      const work = join(output, WORK_FOLDER);
      mkdirSync(work);
      const header = {
        journal: 1,
        identity: manifest.identity,
        sourceTimes: [],
        files: [`../${name}`, name],
      };
      writeFileSync(join(work, "progress.jsonl"), `${JSON.stringify(header)}\n`);
      await quantizeTo(output, DREAM, { force: true });
      expect(readFileSync(victim, "utf8")).toBe("precious");
    }
  });

  test("that is finished and another one is not resumed but replaced", async () => {
    const output = place.fresh();
    await quantizeTo(output, DIT);
    const error = await rejection(quantizeTo(output, DIT, { config: { bit_width: 8 }, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("no stopped run but a finished output with bit_width 4, not 8");
    expect(error.message).toContain("replace it with --force instead of --resume");
  });

  test("with a file of somebody else under a name that is needed is refused", async () => {
    const output = place.fresh();
    await quantizeTo(output, DIT);
    writeFileSync(join(output, "tokenizer.json"), "precious");
    const error = await rejection(quantizeTo(output, DREAM, { force: true }));
    expect(error.message).toContain('"tokenizer.json"');
    expect(readFileSync(join(output, "tokenizer.json"), "utf8")).toBe("precious");
  });

  test("must not be an empty text, nor the input", async () => {
    const folder = process.cwd();
    const here = place.fresh("here");
    mkdirSync(here);
    writeFileSync(join(here, "config.json"), "precious");
    process.chdir(here); // what an empty path would mean
    try {
      for (const options of [{}, { force: true }, { resume: true }, { dryRun: true as const }]) {
        const error = await rejection(
          quantizeCheckpoint({ kernels, ...options, input: DREAM, output: "", config: configOf() }),
        );
        expect(error).toBeInstanceOf(OutputError);
      }
      const back = await rejection(dequantizeCheckpoint({ kernels, input: DREAM, output: "" }));
      expect(back).toBeInstanceOf(OutputError);
      for (
        const work of [quantizeTo("out", ""), dequantizeCheckpoint({ kernels, input: "", output: "out" })]
      ) {
        expect(await rejection(work)).toBeInstanceOf(CheckpointError);
      }
      expect(contents(here)).toEqual({ "config.json": btoa("precious") });
    } finally {
      process.chdir(folder);
    }
  });

  test("may be there and empty", async () => {
    const output = place.fresh();
    mkdirSync(output);
    await quantizeTo(output, DREAM);
    expect(readdirSync(output)).toContain(MANIFEST_FILE);
  });

  test("must not be the input, by whatever path", async () => {
    const input = place.fresh("input");
    cpSync(DREAM, input, { recursive: true });
    const before = contents(input);
    const [link, outer] = [place.fresh("link"), place.fresh("outer")];
    symlinkSync(input, link);
    mkdirSync(outer);
    symlinkSync(link, join(outer, "nested"));
    const shards = place.fresh("shards"); // as a download cache does it: a folder of links to files elsewhere
    mkdirSync(shards);
    for (const name of readdirSync(input)) symlinkSync(join(input, name), join(shards, name));
    for (
      const [from, to] of [
        [input, input],
        [input, link],
        [link, input],
        [input, join(outer, "nested")],
        [
          input,
          join(input, "..", input.split("/").at(-1)!),
        ],
        [shards, input],
        [join(input, "model-00001-of-00002.safetensors"), input],
      ] as const
    ) {
      for (const force of [false, true]) {
        const error = await rejection(quantizeTo(to, from, { force }));
        expect(error).toBeInstanceOf(OutputError);
        expect(error.message).toContain("must not be the input's folder");
      }
    }
    expect(contents(input)).toEqual(before);
  });

  test("that cannot be made is refused with its path", async () => {
    const file = place.fresh("file");
    writeFileSync(file, "");
    for (const output of [file, join(file, "below"), "/proc/arrowquant-test"]) {
      const error = await rejection(quantizeTo(output, DREAM));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain(output);
    }
    expect(readFileSync(file, "utf8")).toBe("");
  });

  test("takes one run at a time", async () => {
    const output = place.fresh();
    let second: Promise<Error> | undefined;
    await quantizeTo(output, DREAM, {
      onProgress: () => second ??= rejection(quantizeTo(output, DREAM, { force: true })),
    });
    const error = await second!;
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("one run at a time");
    expect(await verifyFiles(output, readManifest(output)!)).toEqual([]);
  });

  test("is free again when its holder is dead", async () => {
    const output = place.fresh();
    const work = join(output, WORK_FOLDER);
    const host = hostname().replace(/[^\w.-]/g, "_");
    const [boot, namespace] = process.platform !== "linux" ? ["", ""] : [
      readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim().replaceAll("-", ""),
      /\d+/.exec(readlinkSync("/proc/self/ns/pid"))![0],
    ];
    // A number that a process has which started at another time; one that nobody has; this process before it
    // was this.
    const other = process.platform === "linux" ? [`1-${boot}.5.${namespace}`] : [];
    for (const holder of [...other, `${2 ** 22 + 1}-0`, `${process.pid}-0`]) {
      mkdirSync(work, { recursive: true });
      writeFileSync(join(work, `lock-${host}-${holder}-0`), "");
      await quantizeTo(output, DREAM, { force: true });
      expect(existsSync(work)).toBe(false);
    }
    mkdirSync(work);
    // Of another host; before a restart, or on a machine of the same name; in another container; none of
    // ours.
    const dead = 2 ** 22 + 1, elsewhere = ["elsewhere.invalid-1-0-0", "x"];
    if (process.platform === "linux") {
      elsewhere.push(`${host}-${dead}-${"0".repeat(32)}.5.${namespace}-0`, `${host}-${dead}-${boot}.5.1-0`);
      elsewhere.push(`${host}-${dead}-${boot}.5-0`);
    }
    for (const name of elsewhere.map((rest) => `lock-${rest}`)) {
      writeFileSync(join(work, name), "");
      const error = await rejection(quantizeTo(output, DREAM, { force: true }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain(`delete "${join(work, name)}"`);
      rmSync(join(work, name));
    }
  });
});
