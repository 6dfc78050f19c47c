import { afterAll, describe, expect, test } from "bun:test";
import { Buffer } from "node:buffer";
import { cpSync, existsSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { blockRuns, collectStatistics, statisticsByRun } from "../../lib/calibration/collect.ts";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { calibrationGroups, saveStatistics } from "../../lib/calibration/saved_statistics.ts";
import { type Blockwise, loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  type CalibrationStatistics,
  readCalibrationStatistics,
  statisticsBytes,
} from "../../lib/time/mod.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, SMALL_IMAGE, SMALL_LANGUAGE, store } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const FOLDERS = {
  dream: store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 3 })),
  dit: store(place.fresh(), ditCheckpoint({ ...SMALL_IMAGE, blocks: 3 })),
};

const SCHEDULER = "scheduler_config.json";
cpSync(join(MODELS, "glyph-dit", SCHEDULER), join(FOLDERS.dit, SCHEDULER));

const calibratedOf = async (name: keyof typeof FOLDERS): Promise<Calibrated> =>
  await loadCalibration(loadModel(FOLDERS[name], kernels), { source: "synthetic", samples: 16, seed: 3 });

const optionsOf = ({ data }: Calibrated) => ({
  kernels,
  fingerprint: "",
  groups: calibrationGroups(data.axis, 2),
  second: "total" as const,
  run: { identity: "one", source: data.source, isSynthetic: data.isSynthetic, samples: data.samples },
});

/** Everything that is in statistics. */
const contentOf = ({ inputs }: CalibrationStatistics) =>
  [...inputs].map(([name, { second, sum, weight, tokens, histograms, ...rest }]) => [
    name,
    rest.layers,
    [second!, sum, weight, tokens].map((values) => Buffer.from(values.buffer).toString("base64")),
    histograms.map(({ state }) => [state.minimum, state.maximum, ...state.counts].join()),
  ]);

describe("statistics of a block at a time", () => {
  for (const name of ["dream", "dit"] as const) {
    test(`are those of all blocks at once (${name})`, async () => {
      const calibrated = await calibratedOf(name), options = optionsOf(calibrated);
      const all = await collectStatistics(calibrated, options);
      const parts: CalibrationStatistics[] = [];
      for await (const part of statisticsByRun(calibrated, { ...options, bytesAtOnce: 0 })) parts.push(part);
      expect(parts.length).toBeGreaterThan(3);
      expect(parts.flatMap(contentOf)).toEqual(contentOf(all));
    });
  }

  test("take no more memory than was allowed, as far as a block does not", async () => {
    const { model, data } = await calibratedOf("dream"), groups = calibrationGroups(data.axis, 2);
    const bytesAtOnce = 400_000;
    const runs = blockRuns(model as Blockwise<unknown>, { groups, second: "total", bytesAtOnce });
    expect(runs.length).toBeGreaterThan(1);
    expect(runs.some(({ begin, end }) => end - begin > 1)).toBe(true);
    for (const { begin, end, inputs } of runs) {
      if (end - begin > 1) {
        expect(statisticsBytes(inputs.values(), 2, "total")).toBeLessThanOrEqual(bytesAtOnce);
      }
    }
  });

  test("are saved as the same file, also after a stop in any of them", async () => {
    const calibrated = await calibratedOf("dream");
    const save = (path: string, bytesAtOnce: number, onProgress?: (parts: number) => void) =>
      saveStatistics(calibrated, {
        path,
        force: false,
        second: "total",
        groups: 2,
        fingerprint: "f",
        modelName: "m",
        dataIdentity: "d",
        kernels,
        bytesAtOnce,
        onProgress: ({ tensorsDone }) => onProgress?.(tensorsDone),
      });
    const whole = `${place.fresh("whole")}.safetensors`;
    await save(whole, Infinity);
    const path = `${place.fresh("blocks")}.safetensors`;
    for (const stop of [2, 3]) {
      const error = await rejection(save(path, 0, (parts) => {
        if (parts === stop) throw new Error("killed");
      }));
      expect(error.message).toBe("killed");
      expect(existsSync(`${path}.progress-0`)).toBe(true);
    }
    const saved = await save(path, 0);
    expect(readFileSync(path).equals(readFileSync(whole))).toBe(true);
    expect(existsSync(`${path}.progress-0`)).toBe(false);
    const later = readCalibrationStatistics(path, { fingerprint: "f" }, 0).statistics;
    expect([saved.isLoaded, later.isLoaded]).toEqual([false, true]);
    // Files of somebody else where the pass would write, and links, stay.
    const other = `${place.fresh("other")}.safetensors`, victim = place.fresh("victim");
    writeFileSync(victim, "precious");
    symlinkSync(place.fresh("nowhere"), other);
    expect((await rejection(save(other, 0))).message).toContain("got a link");
    rmSync(other);
    for (const name of [`${other}.progress`, `${other}.progress-1`]) {
      writeFileSync(name, "precious");
      expect((await rejection(save(other, 0))).message).toContain("a file that this tool did not write");
      rmSync(name);
      symlinkSync(victim, name);
      expect((await rejection(save(other, 0))).message).toContain("got a link");
      rmSync(name);
    }
    writeFileSync(`${other}.partial`, "precious, not a tensor");
    expect((await rejection(save(other, Infinity))).message).toContain("something has that name");
    expect(readFileSync(victim, "utf8")).toBe("precious");

    expect(contentOf(later)).toEqual(contentOf(saved));
  });
});
