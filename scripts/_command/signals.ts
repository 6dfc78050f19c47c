/** Signals to a command: the first one stops it where it is, a second one ends the process at once. */
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import process from "node:process";
import { type Kernels, openKernels, type OpenOptions } from "../../lib/native/mod.ts";

const SIGNALS = ["SIGHUP", "SIGINT", "SIGTERM"] as const;
type StopSignal = typeof SIGNALS[number];

/** As a shell reports the end by a signal. */
export const signalExitCode = (signal: string): number => 128 + constants.signals[signal as StopSignal];

/** Signals this soon after the first one are the same: a terminal and a launcher (npx) both send them. */
const SAME_MILLISECONDS = 100;

/** Handlers of the command that runs. */
const handlers = new Map<StopSignal, () => void>();
/** Aborted by them. */
let stopped: AbortSignal | undefined;

/** Signals abort `controller`; a second one ends the process. Until {@linkcode dropSignals}. */
export function catchSignals(controller: AbortController): void {
  let first = 0;
  stopped = controller.signal;
  for (const signal of SIGNALS) {
    if (signal === "SIGHUP" && ignoresHangUp()) continue;
    const handler = () => {
      const now = performance.now();
      if (controller.signal.aborted && now - first < SAME_MILLISECONDS) return;
      if (controller.signal.aborted) process.exit(signalExitCode(signal));
      first = now;
      controller.abort(signal);
      process.stderr.write(`\n${signal}: stopping; a second signal ends the process at once\n`);
    };
    handlers.set(signal, handler);
    process.on(signal, handler);
  }
}

/** Signals end the process, as by default. */
export function dropSignals(): void {
  for (const [signal, handler] of handlers) process.off(signal, handler);
  handlers.clear();
}

/** Whether the process was started to outlive its terminal (`nohup`): that stays so. */
function ignoresHangUp(): boolean {
  try {
    const ignored = /^SigIgn:\s*[0-9a-f]*([0-9a-f])$/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1];
    return ignored === undefined || (Number.parseInt(ignored, 16) & 1) !== 0;
  } catch {
    return true; // not Linux, or Deno without the permission to look
  }
}

/**
 * Opens the kernels of a command: signals also stop them within a call. WebAssembly cannot be stopped there,
 * so with it a signal ends the process at once; what is on disk by then goes on with `--resume`, as after any
 * kill.
 */
export async function openCommandKernels(options: OpenOptions): Promise<Kernels> {
  const kernels = await openKernels({ ...options, catchSignals: true, signal: stopped });
  if (kernels.backend === "wasm") dropSignals();
  return kernels;
}
