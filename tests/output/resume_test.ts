import { afterAll, describe, expect, test } from "bun:test";
import {
  appendFileSync,
  cpSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { IntegrityError, InterruptedError, OutputError } from "../../lib/errors.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, MANIFEST_FILE, WORK_FOLDER } from "../../lib/pipeline/mod.ts";
import { Journal, readJournal } from "../../lib/output/journal.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { contents, differences, rejection, workplace } from "../_checkpoints.ts";
import { DREAM, type Options, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);

describe("a stopped run", () => {
  const reference = place.fresh("reference");
  const input = twoShards();
  const config = { bit_width: 3, zero_point: "integer" };
  const ready = quantizeTo(reference, input, { config });

  /** Runs until `tensors` tensors are done, then stops by signal. */
  async function stopAfter(output: string, tensors: number, options: Options = {}): Promise<Error> {
    const controller = new AbortController();
    return await rejection(quantizeTo(output, input, {
      config,
      ...options,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => {
        if (tensorsDone >= tensors) controller.abort("SIGINT");
      },
    }));
  }

  test("can be resumed from each tensor on, to the same bytes", async () => {
    await ready;
    for (let tensors = 0; tensors <= 7; tensors++) {
      const output = place.fresh();
      const error = await stopAfter(output, tensors);
      expect(error).toBeInstanceOf(InterruptedError);
      expect(error.message).toContain("--resume");
      expect(readdirSync(output)).toEqual([WORK_FOLDER]);
      const { tensorsResumed } = await quantizeTo(output, input, { config, resume: true });
      expect(tensorsResumed).toBeGreaterThanOrEqual(Math.max(0, tensors - 1));
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("can be stopped again and again", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 1);
    for (let tensors = 2; tensors <= 6; tensors++) await stopAfter(output, tensors, { resume: true });
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is not taken for a checkpoint", async () => {
    const output = place.fresh();
    await stopAfter(output, 5);
    expect(() => openCheckpoint(output)).toThrow(/stopped/);
  });

  test("needs --resume or --force", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 3);
    const error = await rejection(quantizeTo(output, input, { config }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("--resume");
    expect(error.message).toContain("--force");
    await quantizeTo(output, input, { config, force: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is not resumed with another configuration or input", async () => {
    const output = place.fresh();
    await stopAfter(output, 3);
    const other = await rejection(
      quantizeTo(output, input, { config: { ...config, bit_width: 8 }, resume: true }),
    );
    expect(other).toBeInstanceOf(OutputError);
    expect(other.message).toContain("bit_width 3, not 8");
    const changed = await rejection(quantizeTo(output, DREAM, { config, resume: true }));
    expect(changed.message).toContain("another input");
    const threads = await quantizeTo(output, input, { config: { ...config, num_threads: 2 }, resume: true });
    expect(threads.tensorsResumed).toBeGreaterThanOrEqual(2);
  });

  test("is not resumed where its trellis codes have other levels", async () => {
    const output = place.fresh(), trellis = { codes: "trellis", bit_width: 2, solver: "auto" };
    await stopAfter(output, 3, { config: trellis });
    const path = join(output, WORK_FOLDER, "progress.jsonl"), { entries, ...journal } = readJournal(path);
    const header = journal.header!;
    const settings = header.identity.settings.replace('"trellis_table":2', '"trellis_table":1');
    expect(settings).not.toBe(header.identity.settings);
    const identity = { ...header.identity, settings };
    Journal.begin(path, { ...header, identity }, entries).close();
    const error = await rejection(quantizeTo(output, input, { config: trellis, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("trellis_table 1, not 2");
  });

  test("is not resumed once the input was written again, not even with the same bytes", async () => {
    const copy = place.fresh("input");
    cpSync(input, copy, { recursive: true });
    const output = place.fresh();
    const controller = new AbortController();
    await rejection(quantizeTo(output, copy, {
      config,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone >= 3 && controller.abort("SIGINT"),
    }));
    utimesSync(join(copy, "model-00002-of-00002.safetensors"), new Date(1e12), new Date(1e12));
    const error = await rejection(quantizeTo(output, copy, { config, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("must not have changed");
  });

  test("counts only whole lines of its journal", async () => {
    const output = place.fresh();
    await stopAfter(output, 3);
    const path = join(output, WORK_FOLDER, "progress.jsonl");
    const { length } = readJournal(path).entries;
    expect(length).toBeGreaterThanOrEqual(2);
    truncateSync(path, readFileSync(path).length - 1); // the line feed alone: the rest still parses
    expect(readJournal(path).entries.length).toBe(length - 1);
  });

  test("is done again where its bytes or its journal are damaged", async () => {
    await ready;
    const damages: ((work: string) => void)[] = [
      (work) => {
        const path = join(work, "model-00001-of-00002.safetensors.partial");
        const bytes = readFileSync(path);
        bytes[bytes.length - 20]! ^= 1;
        writeFileSync(path, bytes);
      },
      (work) => truncateSync(join(work, "model-00001-of-00002.safetensors.partial"), 3000),
      (work) => rmSync(join(work, "model-00001-of-00002.safetensors.partial")),
      (work) => appendFileSync(join(work, "model-00001-of-00002.safetensors.partial"), "junk"),
      (work) => appendFileSync(join(work, "progress.jsonl"), '{"record":{"name":"model.la'),
      (work) => {
        const path = join(work, "progress.jsonl");
        truncateSync(path, readFileSync(path).length - 10);
      },
      (work) => truncateSync(join(work, "progress.jsonl"), 20),
      (work) => rmSync(join(work, "progress.jsonl")),
    ];
    for (const damage of damages) {
      const output = place.fresh();
      await stopAfter(output, 3);
      damage(join(output, WORK_FOLDER));
      await quantizeTo(output, input, { config, resume: true });
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("with damage is resumed twice", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 6);
    const shard = join(output, WORK_FOLDER, "model-00001-of-00002.safetensors");
    const bytes = readFileSync(shard);
    bytes[bytes.length - 20]! ^= 1;
    writeFileSync(shard, bytes);
    await stopAfter(output, 3, { resume: true });
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is finished from every state of the last step", async () => {
    await ready;
    const names = readdirSync(reference).filter((name) => name !== MANIFEST_FILE);
    for (let moved = 0; moved <= names.length; moved++) {
      const output = place.fresh();
      await stopAfter(output, 7);
      const work = join(output, WORK_FOLDER);
      for (const name of [...names, MANIFEST_FILE]) cpSync(join(reference, name), join(work, name));
      for (const name of names.slice(0, moved)) renameSync(join(work, name), join(output, name));
      await quantizeTo(output, input, { config, resume: true });
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("that was cut off in the last step can be started over", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 7);
    const work = join(output, WORK_FOLDER);
    for (const name of readdirSync(reference)) cpSync(join(reference, name), join(work, name));
    renameSync(join(work, "config.json"), join(output, "config.json"));
    const stopped = await stopAfter(output, 2, { force: true });
    expect(stopped).toBeInstanceOf(InterruptedError);
    expect(readdirSync(output)).toEqual([WORK_FOLDER]);
    await quantizeTo(output, input, { config, force: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("that was cut off behind the last step only cleans up", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 2);
    for (const name of readdirSync(reference)) cpSync(join(reference, name), join(output, name));
    const { tensorsResumed } = await quantizeTo(output, input, { config, resume: true });
    expect(tensorsResumed).toBe(7);
    expect(differences(output, reference)).toEqual([]);
    const again = await quantizeTo(output, input, { config, resume: true });
    expect(again.tensorsResumed).toBe(7);
    appendFileSync(join(output, "config.json"), " ");
    expect(await rejection(quantizeTo(output, input, { config, resume: true }))).toBeInstanceOf(
      IntegrityError,
    );
  });

  test("before its first tensor, and a fresh folder, are resumed too", async () => {
    await ready;
    const output = place.fresh();
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("of the way back is resumed to the same bytes", async () => {
    await ready;
    const [plain, output] = [place.fresh("plain"), place.fresh()];
    await dequantizeCheckpoint({ kernels, input: reference, output: plain });
    const controller = new AbortController();
    const stopped = await rejection(dequantizeCheckpoint({
      kernels,
      input: reference,
      output,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => {
        if (tensorsDone >= 3) controller.abort("SIGTERM");
      },
    }));
    expect(stopped).toBeInstanceOf(InterruptedError);
    await dequantizeCheckpoint({ kernels: withThreads(kernels, 2), input: reference, output, resume: true });
    expect(differences(output, plain)).toEqual([]);
    expect(contents(plain)["config.json"]).toBe(contents(input)["config.json"]!);
    expect(contents(plain)["tokenizer.json"]).toBe(contents(input)["tokenizer.json"]!);
  });
});
