import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, statfsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { IntegrityError, OutputError } from "../../lib/errors.ts";
import { EXPORT_FORMATS, exportCheckpoint } from "../../lib/interop/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, WORK_FOLDER } from "../../lib/pipeline/mod.ts";
import { TensorSink } from "../../lib/output/tensor_sink.ts";
import { SafetensorsWriter } from "../../lib/tensor/mod.ts";
import { differences, rejection, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { configOf, DIT, DREAM, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);

describe("faults of the disk", () => {
  test("that gives back other bytes than were written are found", () => {
    const spec = { name: "a", dtype: "U8", shape: [4] } as const;
    using writer = SafetensorsWriter.create(place.fresh("file"), {
      reservedHeaderBytes: SafetensorsWriter.headerBytes([spec]),
    });
    const sink = new TensorSink(writer, () => Promise.resolve());
    sink.begin([spec]);
    sink.write("a", Uint8Array.of(1, 2));
    const readInto = writer.readInto.bind(writer);
    writer.readInto = (name, byteStart, target) => {
      readInto(name, byteStart, target);
      target[1]! ^= 0x10;
    };
    expect(() => sink.write("a", Uint8Array.of(3, 4))).toThrow(IntegrityError);
  });

  test("that show in a background sync end the run", async () => {
    const input = writeCheckpoint(place.fresh("input"), {
      // More than is written between two syncs.
      "a.bias": { dtype: "F32", shape: [25 * 2 ** 20], data: new Uint8Array(100 * 2 ** 20) },
    });
    const output = place.fresh();
    const partial = join(output, WORK_FOLDER, "model.safetensors.partial");
    const error = await rejection(quantizeTo(output, input, {
      // The file under another name cannot be opened for the sync; back again, nothing else notices.
      onProgress: ({ bytesDone, bytes }) => {
        if (bytesDone === 8 * 2 ** 20) renameSync(partial, `${partial}.away`);
        if (bytesDone === bytes && existsSync(`${partial}.away`)) renameSync(`${partial}.away`, partial);
      },
    }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("Cannot sync");
  });
});

describe("a full disk", () => {
  /** A small file system of its own; undefined where mounting is not permitted. */
  function mountSmall(megabytes: number): string | undefined {
    const path = place.fresh("disk");
    mkdirSync(path);
    const { status } = spawnSync("mount", ["-t", "tmpfs", "-o", `size=${megabytes}m`, "tmpfs", path]);
    if (status === 0) return path;
    console.log("skipped: no permission to mount a small file system");
    return undefined;
  }

  test("is noticed before anything is written", async () => {
    const disk = mountSmall(1);
    if (disk === undefined) return;
    try {
      const output = join(disk, "out");
      const error = await rejection(quantizeTo(output, DIT, { config: { bit_width: 8 } }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("free bytes");
      expect(existsSync(output)).toBe(false);
    } finally {
      spawnSync("umount", [disk]);
    }
  });

  test("that holds the output but not the solved layers beside it is refused before the work", async () => {
    const disk = mountSmall(3);
    if (disk === undefined) return;
    try {
      const output = join(disk, "out"),
        config = { solver: "feedback", calibration_samples: 32, bit_width: 3 };
      const job = { input: DIT, output, config: configOf(config), kernels };
      const { totals: { fileBytesAfter: bytesAfter } } = await quantizeCheckpoint({ ...job, dryRun: true });
      // Half of the solved layers have room.
      const { bavail, bsize } = statfsSync(disk), filler = bavail * bsize - 1.5 * bytesAfter;
      writeFileSync(join(disk, "filler"), new Uint8Array(filler));
      const error = await rejection(quantizeCheckpoint(job));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toMatch(
        /must have .*B free until the run is finished \(.*B solved layers; with them first .*, then .*B of the output\), got/,
      );
      expect(existsSync(output)).toBe(false);
      rmSync(join(disk, "filler"));
      await quantizeCheckpoint(job);
    } finally {
      spawnSync("umount", [disk]);
    }
  });

  test("that small files fill, a block each, is refused before the work too", async () => {
    const disk = mountSmall(1);
    if (disk === undefined) return;
    try {
      const output = join(disk, "out"),
        config = { solver: "feedback", calibration_samples: 32, bit_width: 2 };
      const job = { input: DREAM, output, config: configOf(config), kernels };
      const { totals: { fileBytesAfter: bytesAfter } } = await quantizeCheckpoint({ ...job, dryRun: true });
      const { bavail, bsize } = statfsSync(disk), filler = join(disk, "filler");
      writeFileSync(filler, new Uint8Array(bavail * bsize - 2.2 * bytesAfter)); // solved layers and output
      const error = await rejection(quantizeCheckpoint(job));
      expect(error.message).toMatch(/must have .*B free until the run is finished/);
      expect(existsSync(output)).toBe(false);
      rmSync(filler);
      await quantizeCheckpoint(job);
    } finally {
      spawnSync("umount", [disk]);
    }
  });

  test("in the middle of another program's file leaves no half of it", async () => {
    const disk = mountSmall(2);
    if (disk === undefined) return;
    try {
      const [output, filler] = [join(disk, "model.gguf"), join(disk, "filler")];
      const format = EXPORT_FORMATS.find(({ name }) => name === "gguf")!;
      const error = await rejection(exportCheckpoint({
        ...{ input: DREAM, output, format, kernels, types: [{ pattern: /./, type: "F32" }] },
        onProgress: ({ bytesDone, bytes }) => {
          if (bytesDone < bytes / 4 || existsSync(filler)) return;
          const { bavail, bsize } = statfsSync(disk);
          writeFileSync(filler, new Uint8Array(bavail * bsize - 100_000));
        },
      }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toMatch(/no space left on the device \(about \d+ more bytes are needed\)/);
      expect(readdirSync(disk)).toEqual(["filler"]);
    } finally {
      spawnSync("umount", [disk]);
    }
  });

  test("in the middle names file and need, and can be resumed once there is room", async () => {
    const disk = mountSmall(8);
    if (disk === undefined) return;
    try {
      const [output, filler, reference] = [join(disk, "out"), join(disk, "filler"), place.fresh()];
      const config = { bit_width: 8 };
      await quantizeTo(reference, DIT, { config });
      let isFull = false;
      const error = await rejection(quantizeTo(output, DIT, {
        config,
        onProgress: ({ tensorsDone }) => {
          if (tensorsDone < 20 || isFull) return;
          isFull = true;
          const { bavail, bsize } = statfsSync(disk);
          writeFileSync(filler, new Uint8Array(bavail * bsize - 100_000));
        },
      }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("diffusion_pytorch_model.safetensors.partial");
      expect(error.message).toMatch(/\d+ more bytes are needed/);
      expect(readdirSync(output)).toEqual([WORK_FOLDER]);
      rmSync(filler);
      const { tensorsResumed } = await quantizeTo(output, DIT, { config, resume: true });
      expect(tensorsResumed).toBeGreaterThanOrEqual(20);
      expect(differences(output, reference)).toEqual([]);
    } finally {
      spawnSync("umount", [disk]);
    }
  });
});
