import { afterAll, describe, expect, test } from "bun:test";
import {
  appendFileSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { CheckpointError, IntegrityError, InterruptedError, OutputError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { MANIFEST_FILE, quantizeCheckpoint, WORK_FOLDER } from "../../lib/pipeline/mod.ts";
import { openRun } from "../../lib/pipeline/open_run.ts";
import { planRun } from "../../lib/pipeline/planned_run.ts";
import { requestOutput } from "../../lib/pipeline/write_run.ts";
import { acquireFileLock } from "../../lib/output/lock.ts";
import { contents, differences, rejection, workplace } from "../_checkpoints.ts";
import { configOf, DREAM, type Options, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);
const SHARD = "model-00001-of-00002.safetensors";

/** Changes the last bit of a file and sets its times back. */
function changeQuietly(path: string): void {
  const { atime, mtime } = statSync(path), bytes = readFileSync(path);
  bytes[bytes.length - 1]! ^= 1;
  writeFileSync(path, bytes);
  utimesSync(path, atime, mtime);
}

/** A run that is stopped when so many tensors are done. */
async function stopAfter(
  output: string,
  input: string,
  tensors: number,
  options: Options = {},
): Promise<void> {
  const controller = new AbortController();
  const error = await rejection(quantizeTo(output, input, {
    ...options,
    signal: controller.signal,
    onProgress: ({ tensorsDone }) => tensorsDone >= tensors && controller.abort("SIGINT"),
  }));
  expect(error).toBeInstanceOf(InterruptedError);
}

describe("weights that were changed, their times set back", () => {
  test("between a stop and --resume are found", async () => {
    const input = twoShards(), output = place.fresh();
    await stopAfter(output, input, 5);
    changeQuietly(join(input, SHARD));
    const error = await rejection(quantizeTo(output, input, { resume: true }));
    expect(error).toBeInstanceOf(IntegrityError);
    expect(error.message).toContain('got others in "model.layers.0.b.weight"');
    changeQuietly(join(input, SHARD)); // as it was
    await quantizeTo(output, input, { resume: true });
  });

  test("behind a finished output are found, and the same ones elsewhere are not", async () => {
    const input = twoShards(), output = place.fresh(), copy = place.fresh("copy");
    await quantizeTo(output, input);
    cpSync(input, copy, { recursive: true });
    await quantizeTo(output, copy, { resume: true });
    changeQuietly(join(copy, SHARD));
    const error = await rejection(quantizeTo(output, copy, { resume: true }));
    expect(error).toBeInstanceOf(IntegrityError);
    expect(error.message).toContain("must have the weights that it had");
  });

  test("in the middle of a run end it, and leave nothing", async () => {
    const input = twoShards(), output = place.fresh();
    let isChanged = false;
    const error = await rejection(quantizeTo(output, input, {
      onProgress: ({ tensorsDone }) => {
        if (tensorsDone < 5 || isChanged) return;
        isChanged = true;
        changeQuietly(join(input, SHARD));
      },
    }));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain("the input must not change meanwhile");
    expect(existsSync(output)).toBe(false);
  });

  test("between solving and writing end the run, which names the file", async () => {
    const input = place.fresh("input"), output = place.fresh(), path = join(input, SHARD);
    cpSync(DREAM, input, { recursive: true });
    utimesSync(path, new Date(1e12), new Date(1e12)); // whole milliseconds, that can be set back
    let isChanged = false;
    const error = await rejection(quantizeCheckpoint({
      ...{ input, output, config: configOf({ solver: "feedback", calibration_samples: 32 }), kernels },
      onEvent: ({ data }) => {
        if (isChanged || data?.["stage"] !== "solving") return;
        isChanged = true;
        changeQuietly(path);
      },
    })) as CheckpointError;
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain("got other weights than those that layers were solved on");
    expect(error.path).toBe(path);
    expect(existsSync(output)).toBe(false);
  });

  test("are another calibrated run, as are those of another instruction set", async () => {
    const input = place.fresh("input"), output = place.fresh();
    cpSync(DREAM, input, { recursive: true });
    const settings = async (isa: typeof kernels.isa) => {
      using run = openRun({ input, config: configOf({ solver: "feedback" }), kernels: { ...kernels, isa } });
      const { identity } = await requestOutput(run, await planRun(run), { output });
      return identity.settings;
    };
    const before = await settings("scalar");
    expect(await settings("scalar")).toBe(before);
    expect(await settings("avx2")).not.toBe(before);
    changeQuietly(join(input, SHARD));
    expect(await settings("scalar")).not.toBe(before);
    changeQuietly(join(input, SHARD)); // as it was
    expect(await settings("scalar")).toBe(before);
    appendFileSync(join(input, "tokenizer.json"), " ");
    expect(await settings("scalar")).not.toBe(before);
  });

  test("of another tokenizer are refused by a calibrated run, which keeps what was solved", async () => {
    const input = place.fresh("input"), output = place.fresh(), controller = new AbortController();
    cpSync(DREAM, input, { recursive: true });
    const job = {
      input,
      output,
      config: configOf({ solver: "feedback", calibration_samples: 32 }),
      kernels,
    };
    await rejection(quantizeCheckpoint({
      ...job,
      signal: controller.signal,
      onEvent: ({ kind }) => kind === "layer" && controller.abort("SIGINT"),
    }));
    const path = join(input, "tokenizer.json"), text = readFileSync(path, "utf8");
    const solved = () => readdirSync(join(output, WORK_FOLDER)).filter((name) => name.startsWith("solved-"));
    const before = solved();
    expect(before.length).toBeGreaterThan(0);
    writeFileSync(path, text.replace('"a"', '"~"'));
    const error = await rejection(quantizeCheckpoint({ ...job, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("files_sha256");
    expect(solved()).toEqual(before);
    writeFileSync(path, text);
    await quantizeCheckpoint({ ...job, resume: true });
  });
});

describe("a file of ours that was changed by hand", () => {
  test("is the journal: said, and what it names from there on is done again", async () => {
    const input = twoShards(), reference = place.fresh("reference");
    await quantizeTo(reference, input);
    const edits: [badLine: number, edit: (lines: string[]) => void][] = [
      [1, (lines) => lines[0] = lines[0]!.replace('"force"', '"resume"').replace("quantize", "dequantize")],
      [3, (lines) => lines[2] = lines[2]!.replace('"action":"', '"action":"x')],
      [2, (lines) => lines.splice(1, 1)],
      [2, (lines) => [lines[1], lines[2]] = [lines[2]!, lines[1]!]],
    ];
    for (const [badLine, edit] of edits) {
      const output = place.fresh(), path = join(output, WORK_FOLDER, "progress.jsonl");
      await stopAfter(output, input, 3);
      const lines = readFileSync(path, "utf8").split("\n");
      edit(lines);
      writeFileSync(path, lines.join("\n"));
      const messages: string[] = [];
      const onEvent = ({ message }: { message: string }) => messages.push(message);
      const { tensorsResumed } = await quantizeTo(output, input, { resume: true, onEvent });
      expect(messages.join("\n")).toContain(`line ${badLine} of the journal is not as it was written`);
      expect(tensorsResumed).toBe(Math.max(0, badLine - 2));
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("is the manifest: the output is not taken for ours any more", async () => {
    const input = twoShards(), output = place.fresh();
    await quantizeTo(output, input);
    const path = join(output, MANIFEST_FILE), text = readFileSync(path, "utf8");
    for (
      const changed of [text.replace('"bits": 4', '"bits": 3'), `${text} `, text.slice(0, -90) + "\n}\n"]
    ) {
      writeFileSync(path, changed);
      for (const options of [{ force: true }, { resume: true }]) {
        const error = await rejection(quantizeTo(output, input, options));
        expect(error).toBeInstanceOf(OutputError);
        expect(error.message).toContain(`got "${MANIFEST_FILE}" changed since`);
      }
    }
    writeFileSync(path, text);
    await quantizeTo(output, input, { resume: true });
  });

  test("is one of the output: --force keeps it, and says so before the work", async () => {
    const input = twoShards(), output = place.fresh(), config = join(output, "config.json");
    await quantizeTo(output, input);
    appendFileSync(config, " ");
    const before = contents(output);
    let steps = 0;
    const error = await rejection(quantizeTo(output, input, { force: true, onProgress: () => steps++ }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain('must have "config.json" as this tool wrote it');
    expect([steps, contents(output)]).toEqual([0, before]);
    rmSync(config);
    await quantizeTo(output, input, { force: true });
    // Changed during the work: the new output waits in the work folder, and --resume finishes it.
    let isChanged = false;
    const late = await rejection(quantizeTo(output, input, {
      force: true,
      onProgress: () => {
        if (!isChanged) appendFileSync(config, " ");
        isChanged = true;
      },
    }));
    expect(late.message).toContain('must have "config.json" as this tool wrote it');
    rmSync(config);
    await quantizeTo(output, input, { resume: true });
    expect(readdirSync(output)).toContain("config.json");
  });
});

describe("links", () => {
  test("in the output lead nothing out of it", async () => {
    const input = twoShards(), outer = place.fresh("outer"), victim = join(outer, "victim");
    mkdirSync(outer);
    writeFileSync(victim, "precious");
    const plant: ((output: string) => void)[] = [
      (output) => symlinkSync(outer, join(output, WORK_FOLDER)),
      (output) => symlinkSync(join(outer, "none"), join(output, WORK_FOLDER)),
      (output) => symlinkSync(victim, join(output, SHARD)),
      (output) => symlinkSync(join(outer, "none"), join(output, "config.json")),
      (output) => {
        mkdirSync(join(output, WORK_FOLDER));
        symlinkSync(victim, join(output, WORK_FOLDER, `${SHARD}.partial`));
      },
    ];
    for (const each of plant) {
      const output = place.fresh();
      mkdirSync(output);
      each(output);
      for (const options of [{}, { force: true }, { resume: true }]) {
        await quantizeTo(output, input, options).catch((error: Error) => {
          expect(error).toBeInstanceOf(OutputError);
        });
        expect(contents(outer)).toEqual({ victim: btoa("precious") });
      }
    }
    const dangling = place.fresh();
    symlinkSync(join(outer, "none"), dangling);
    expect((await rejection(quantizeTo(dangling, input))).message).toContain("got a link to none");
  });

  test("in place of what a run wrote are not deleted, nor what they lead to", async () => {
    const input = twoShards(), output = place.fresh(), copy = place.fresh("copy");
    await quantizeTo(output, input);
    cpSync(join(output, "config.json"), copy);
    rmSync(join(output, "config.json"));
    symlinkSync(copy, join(output, "config.json")); // the very bytes
    expect(await rejection(quantizeTo(output, input, { force: true }))).toBeInstanceOf(OutputError);
    expect(lstatSync(join(output, "config.json")).isSymbolicLink()).toBe(true);
  });

  test("beside the weights are copied from the model and its blobs alone", async () => {
    const cache = place.fresh("models--a--b"), outside = place.fresh("outside");
    const snapshot = join(cache, "snapshots", "1"), blobs = join(cache, "blobs");
    cpSync(twoShards(), snapshot, { recursive: true });
    mkdirSync(blobs);
    writeFileSync(outside, "secret");
    writeFileSync(join(blobs, "0a"), "{}");
    for (const [name, to] of [["vocab.json", "../../blobs/0a"], ["merges.txt", "LICENSE"]] as const) {
      symlinkSync(to, join(snapshot, name));
    }
    symlinkSync(outside, join(snapshot, "NOTICE"));
    symlinkSync("../../blobs/../../secret.json", join(snapshot, "x.json"));
    writeFileSync(join(cache, "..", "secret.json"), "{}");
    const output = place.fresh(), messages: string[] = [];
    const onEvent = ({ message }: { message: string }) => messages.push(message);
    const { copied, left } = await quantizeTo(output, snapshot, { onEvent });
    expect(copied).toEqual(["LICENSE", "merges.txt", "tokenizer.json", "vocab.json"]);
    expect(left).toContain("NOTICE");
    expect(left).toContain("x.json");
    expect(messages.filter((message) => message.includes("a link out of the model")).length).toBe(2);
    expect(existsSync(join(output, "NOTICE"))).toBe(false);
  });
});

test("an output around its input is refused: replacing it would delete the input", async () => {
  const outer = place.fresh("outer"), input = join(outer, "model");
  cpSync(twoShards(), input, { recursive: true });
  const before = contents(input);
  const error = await rejection(quantizeTo(outer, input, { force: true }));
  expect(error.message).toContain("must not be the input's folder, got a folder around");
  expect(contents(input)).toEqual(before);
});

test("a file has one writer at a time, and never by way of a link", () => {
  const path = place.fresh("statistics.safetensors");
  const release = acquireFileLock(path);
  expect(() => acquireFileLock(path)).toThrow("must have one run at a time");
  release();
  acquireFileLock(path)();
  expect(existsSync(`${path}.lock`)).toBe(false);
  symlinkSync(place.fresh("elsewhere"), `${path}.lock`);
  expect(() => acquireFileLock(path)).toThrow("as a folder, got a link");
});
