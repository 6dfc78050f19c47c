import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { CheckpointError, FormatError, InterruptedError } from "../../lib/errors.ts";
import { type HeldWeights as Held, HeldWeights, modelFrom } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { stopCheck } from "../../lib/progress.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS } from "../_checkpoints.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

/** Reads a matrix that is all one byte, and counts. */
function reader(held: Held) {
  const read: string[] = [];
  const take = (name: string, bytes: number) =>
    held.take(name, bytes, (target) => void (read.push(name), target.fill(name.charCodeAt(0))));
  return { read, take };
}

describe("held weights", () => {
  test("are read once while they fit, and the one not used for longest goes first", () => {
    const held = new HeldWeights(30), { read, take } = reader(held);
    for (const name of ["a", "b", "c", "a", "d", "a", "b"]) {
      expect(take(name, 10)).toEqual(new Uint8Array(10).fill(name.charCodeAt(0)));
      expect(held.bytes).toBeLessThanOrEqual(30);
    }
    expect(read).toEqual(["a", "b", "c", "d", "b"]);
    expect(held.bytesRead).toBe(50);
  });

  test("take the memory of one of the same size", () => {
    const held = new HeldWeights(10), { take } = reader(held);
    const first = take("a", 10).buffer;
    expect(take("b", 10).buffer).toBe(first);
    expect(take("c", 6).buffer).not.toBe(first);
  });

  test("give the memory of others back at once", () => {
    const held = new HeldWeights(10), { take } = reader(held);
    const first = take("a", 10).buffer, second = take("b", 4).buffer;
    expect([first.byteLength, second.byteLength]).toEqual([0, 4]);
    held.release();
    expect(second.byteLength).toBe(0);
  });

  test("larger than the limit are held alone, and another limit counts from the next one", () => {
    const held = new HeldWeights(5), { read, take } = reader(held);
    take("a", 10);
    expect(held.bytes).toBe(10);
    take("b", 4);
    expect(held.bytes).toBe(4);
    held.limitBytes = 100;
    for (const name of ["a", "b", "c"]) take(name, 10);
    expect(held.bytes).toBe(24);
    held.release();
    expect(held.bytes).toBe(0);
    take("a", 10);
    expect(read).toEqual(["a", "b", "a", "c", "a"]);
  });

  test("are read ahead into what is left, or in place of what is not needed", () => {
    const held = new HeldWeights(30), { take } = reader(held), read: string[] = [];
    const ahead = (name: string, bytes: number, needed: string) =>
      held.takeAhead(name, bytes, () => void read.push(name), new Set(needed));
    take("a", 10);
    take("b", 10);
    expect(ahead("a", 10, "ab")).toBe(take("a", 10));
    expect(ahead("c", 10, "ab")).toBe(take("c", 10));
    expect(ahead("d", 10, "abc")).toBe(undefined);
    expect(ahead("d", 6, "")).toBe(undefined); // nothing of its size
    const { buffer } = take("b", 10);
    expect(ahead("d", 10, "ac")!.buffer).toBe(buffer);
    expect([held.bytes, read]).toEqual([30, ["c", "d"]]);
  });

  test("that are held already when they are wanted ahead were used last", () => {
    const held = new HeldWeights(20), { read, take } = reader(held);
    take("a", 10);
    take("b", 10);
    held.takeAhead("a", 10, () => {}, new Set());
    for (const name of ["c", "a"]) take(name, 10);
    expect(read).toEqual(["a", "b", "c"]);
  });

  test("that cannot be read ahead say so when they are needed; other faults are told at once", () => {
    const held = new HeldWeights(30), path = "x";
    const failing = (error: Error) => () => {
      throw error;
    };
    for (const error of [new CheckpointError("gone", { path }), new FormatError("short", { path })]) {
      expect(held.takeAhead("a", 10, failing(error), new Set())).toBe(undefined);
      expect(() => held.take("a", 10, failing(error))).toThrow(error);
    }
    const stopped = new InterruptedError("Stopped by SIGINT", "SIGINT");
    expect(() => held.takeAhead("a", 10, failing(stopped), new Set())).toThrow(stopped);
    expect(held.bytes).toBe(0);
  });

  test("that could not be read are not there", () => {
    const held = new HeldWeights(100), { take, read } = reader(held);
    expect(() => held.take("a", 10, () => { throw new Error("the disk is gone"); })).toThrow("the disk is gone");
    expect(held.bytes).toBe(0);
    take("a", 10);
    expect(read).toEqual(["a"]);
  });

  test("can be stopped", () => {
    const { run } = stopCheck;
    stopCheck.run = () => { throw new InterruptedError("Stopped by SIGINT", "SIGINT"); };
    try {
      expect(() => reader(new HeldWeights(100)).take("a", 10)).toThrow(InterruptedError);
    } finally {
      stopCheck.run = run;
    }
  });
});

describe("a model with held weights", () => {
  test("runs as one that has all, language and images", () => {
    using dream = openCheckpoint(join(MODELS, "dream-mini"));
    const inputIds = Int32Array.from({ length: 24 }, (_, i) => 4 + i % 20);
    const logits = [undefined, 1, 1e5, Infinity].map((limit) => {
      const held = limit === undefined ? undefined : new HeldWeights(limit);
      const loaded = modelFrom(dream, kernels, { held });
      if (loaded.kind !== "dream") throw new Error("expected a Dream model");
      expect(held?.bytes ?? 0).toBe(0); // nothing is read before it runs
      const { weightBytes } = loaded.model, out = loaded.model.forward(inputIds, 2).slice();
      expect(weightBytes).toBeGreaterThan(1e5);
      if (limit === Infinity) expect(held!.bytes).toBe(held!.bytesRead);
      if (limit === 1e5) expect(held!.bytes).toBeLessThanOrEqual(1e5);
      return out;
    });
    for (const other of logits) expect(other).toEqual(logits[0]!);
    using dit = openCheckpoint(join(MODELS, "glyph-dit"));
    const images = [undefined, 1e6].map((limit) => {
      const loaded = modelFrom(dit, kernels, { held: limit === undefined ? undefined : new HeldWeights(limit) });
      if (loaded.kind !== "dit") throw new Error("expected a DiT");
      const samples = new Float32Array(loaded.model.imageElements).fill(0.25);
      return loaded.model.forward(samples, [500], [3]).slice();
    });
    expect(images[1]).toEqual(images[0]!);
  });
});
