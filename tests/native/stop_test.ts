import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { type Config, DEFAULT_CONFIG, resolveConfig } from "../../lib/config/mod.ts";
import { InterruptedError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, type QuantizeCheckpointOptions } from "../../lib/pipeline/mod.ts";
import { throwIfStopped } from "../../lib/progress.ts";
import { quantize } from "../../lib/quant/mod.ts";
import { differences, MODELS, rejection, runAndSignal, workplace } from "../_checkpoints.ts";

const place = workplace();

// The runtimes hear of a signal some time after it has come: where nobody listens then, it ends the process.
const handler = () => {};
process.on("SIGTERM", handler);
afterAll(async () => {
  await delay(500);
  process.off("SIGTERM", handler);
  place.remove();
});

/** Runs with kernels that catch the signals that this process handles. */
async function catching<T>(
  run: (kernels: Awaited<ReturnType<typeof openKernels>>) => T | Promise<T>,
): Promise<T> {
  using kernels = await openKernels({ threads: 1, catchSignals: true });
  return await run(kernels);
}

/** Sends this process SIGTERM when so many tensors are done; a second signal would end it. */
function once(tensors: number): (progress: { readonly tensorsDone: number }) => void {
  let isSent = false;
  return ({ tensorsDone }) => {
    if (isSent || tensorsDone < tensors) return;
    isSent = true;
    process.kill(process.pid, "SIGTERM");
  };
}

/** Quantizes twice, once stopped after so many tensors and gone on with: both must have the same bytes. */
async function stoppedRun(config: Config, tensors: number) {
  const input = join(MODELS, "dream-mini"), wanted = place.fresh("wanted"), stopped = place.fresh("stopped");
  const messages: string[] = [];
  const quantized = (output: string, options: Partial<QuantizeCheckpointOptions> = {}) =>
    catching((kernels) => quantizeCheckpoint({ input, output, config, kernels, ...options }));
  await quantized(wanted);
  const error = await rejection(quantized(stopped, { onProgress: once(tensors) }));
  expect(error).toBeInstanceOf(InterruptedError);
  await quantized(stopped, { resume: true, onEvent: ({ message }) => messages.push(message) });
  expect(differences(stopped, wanted)).toEqual([]);
  return { error, messages };
}

describe("a signal", () => {
  test("stops every later call and loop until the kernels are closed", async () => {
    const weights = { data: new Float32Array(64).fill(1), dtype: "F32" } as const;
    await catching((kernels) => {
      throwIfStopped();
      quantize(kernels, weights, 1, 64, { bits: 4 });
      process.kill(process.pid, "SIGTERM");
      for (const solver of ["round", "clip"] as const) {
        expect(() => quantize(kernels, weights, 1, 64, { bits: 4, solver })).toThrow(InterruptedError);
      }
      expect(() => throwIfStopped()).toThrow("Stopped by SIGTERM");
    });
    throwIfStopped();
    using kernels = await openKernels();
    expect(quantize(kernels, weights, 1, 64, { bits: 4 }).rows).toBe(1);
  });

  const signals = [
    ["SIGINT", 130, "uniform"],
    ["SIGTERM", 143, "uniform"],
    ["SIGHUP", 129, "uniform"],
    ["SIGINT", 130, "trellis"],
  ] as const;
  for (const [signal, code, codes] of signals) {
    // The solve would go on for many minutes: the test's time decides.
    test(`${signal} ends a command within a call of a kernel, ${codes} codes`, async () => {
      const stopped = await runAndSignal(
        "../tests/native/_long_solve.ts",
        [codes],
        signal,
        (text) => /solving/.test(text),
      );
      expect({ ...stopped, stderr: /solved|at file|\.ts:/.test(stopped.stderr) }).toEqual({
        code,
        signal: null,
        stderr: false,
      });
    }, 120_000);
  }

  test("ends a build of the library at once, with what the compiler has started", async () => {
    const compiler = join(place.path, "cc"), cache = place.fresh("cache"), started = place.fresh("started");
    writeFileSync(
      compiler,
      '#!/bin/sh\n[ "$1" = --version ] && { echo "cc 1.0"; exit; }\nsleep 60 &\necho $! >>"$STARTED"; wait\n',
    );
    chmodSync(compiler, 0o700);
    const before = { ...process.env };
    Object.assign(process.env, {
      CC: compiler,
      XDG_CACHE_HOME: cache,
      ARROWQUANT_LIBRARY: "",
      STARTED: started,
    });
    try {
      const controller = new AbortController();
      const onMessage = (line: string) => {
        if (!line.includes("building")) return;
        const timer = setInterval(() => {
          if (!existsSync(started) || !/\d\n/.test(readFileSync(started, "utf8"))) return;
          clearInterval(timer);
          controller.abort("SIGINT");
        }, 10);
      };
      const begin = performance.now();
      const error = await rejection(openKernels({ signal: controller.signal, onMessage }));
      expect(error).toBeInstanceOf(InterruptedError);
      expect(performance.now() - begin).toBeLessThan(10_000);
      expect(readdirSync(join(cache, "arrowquant"))).toEqual([expect.stringMatching(/^[^.]+$/)]);
      const children = readFileSync(started, "utf8").trim().split("\n").map(Number);
      expect(children.length).toBeLessThanOrEqual(Math.max(2, availableParallelism()));
      const isRunning = (pid: number) => {
        try {
          process.kill(pid, 0);
          return !/^\d+ \(sleep\) Z/.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
        } catch {
          return false;
        }
      };
      // A process that has closed its files may still be on its way out.
      for (let tries = 0; tries < 100 && children.some(isRunning); tries++) await delay(20);
      expect(children.filter(isRunning)).toEqual([]);
    } finally {
      for (const name of ["CC", "XDG_CACHE_HOME", "ARROWQUANT_LIBRARY", "STARTED"]) {
        if (before[name] === undefined) delete process.env[name];
        else process.env[name] = before[name];
      }
    }
  }, 120_000);

  for (const [codes, solver] of [["uniform", "feedback"], ["trellis", "best"]] as const) {
    test(`inside a layer of ${codes} codes loses nothing: the run goes on to the same bytes`, async () => {
      const { config } = resolveConfig({
        overrides: {
          ...{ solver, codes, bit_width: 2, calibration_samples: 32, num_threads: 1 },
          "solver_options.effort": "low",
        },
      });
      const { error, messages } = await stoppedRun(config, 5);
      expect(error.message).toContain("--resume");
      // a signal may take its time: another layer can be solved before it comes
      const kept = Number(/(\d+) of 28 layers were solved before/.exec(messages.join("\n"))?.[1]);
      expect(kept).toBeGreaterThanOrEqual(5);
      expect(kept).toBeLessThan(28);
    }, 120_000);
  }

  test("while weights alone are looked at, too", async () => {
    const { error } = await stoppedRun({ ...DEFAULT_CONFIG, solver: "clip" }, 7);
    expect(error.message).toMatch(/^Stopped by SIGTERM: \d+ of \d+ tensors are done; .*--resume/);
  }, 120_000);
});
