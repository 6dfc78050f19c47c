/** Progress, events and stopping of long runs; sizes and durations as text. */
import { setImmediate } from "node:timers/promises";
import { InterruptedError } from "./errors.ts";

/** How far a run is. */
export interface Progress {
  /** The present stage; default `writing`, the only stage whose bytes are those of files. */
  readonly stage?: string | undefined;
  /** Things that `tensors` counts; default tensors. */
  readonly parts?: "layers" | "parts" | "phases" | "steps" | undefined;
  /** Things that `weights` counts; default weights. */
  readonly unit?: "positions" | "tokens" | "images" | undefined;
  /** Done part of the tensor at work, 0 to 1, where it takes long. */
  readonly tensorShare?: number | undefined;
  /** Tensor at work. */
  readonly tensor: string;
  readonly tensorsDone: number;
  readonly tensors: number;
  /** Elements of the tensors so far and of all. */
  readonly weightsDone: number;
  readonly weights: number;
  /** Bytes of the input so far and of all; in other stages than writing any measure of the work. */
  readonly bytesDone: number;
  readonly bytes: number;
  /** Part of `bytesDone` that an earlier run did. */
  readonly bytesResumed: number;
}

/** Progress of a stage that is nothing but steps. */
export const stepProgress = (stage: string, done: number, of: number): Progress => ({
  stage,
  parts: "steps",
  tensor: "",
  tensorsDone: done,
  tensors: of,
  weightsDone: 0,
  weights: 0,
  bytesDone: done,
  bytes: of,
  bytesResumed: 0,
});

/** Something worth a line in a log. */
export interface RunEvent {
  /** `layer`: one was solved or stored; `stage`: another kind of work begins. */
  readonly kind:
    | "input"
    | "calibrate"
    | "shard"
    | "resume"
    | "solver"
    | "fallback"
    | "kept"
    | "phase"
    | "warning"
    | "commit"
    | "layer"
    | "stage";
  readonly message: string;
  /** The message's numbers by name, for machines, where it has any; JSON can hold them. */
  readonly data?: Readonly<Record<string, unknown>> | undefined;
}

/** Callbacks of a run, and the signal that stops it. */
export interface RunOptions {
  /** After the current chunk the run stops and can be resumed; the reason names the signal. */
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((progress: Progress) => void) | undefined;
  readonly onEvent?: ((event: RunEvent) => void) | undefined;
}

/**
 * Functions that long work of one thread calls now and then, set by whoever owns the process. `run`: where
 * signals also stop kernels (`catchSignals` of `openKernels`), throws once one has come. `beat`: a display
 * shows that time goes on.
 */
export const stopCheck: { run: () => void; beat: (() => void) | undefined } = {
  run: () => {},
  beat: undefined,
};

/**
 * For loops of this language that run for longer than a moment, about every 100 microseconds: a handler of
 * signals is not called before they end.
 *
 * @throws {InterruptedError} when a signal came that the kernels catch
 */
export function throwIfStopped(): void {
  stopCheck.beat?.();
  stopCheck.run();
}

/** Lets the event loop run, so that a signal is seen. @throws the signal's reason when it was aborted */
export async function pause(signal?: AbortSignal): Promise<void> {
  await setImmediate();
  signal?.throwIfAborted();
  throwIfStopped();
}

/**
 * Runs a part of a run that {@linkcode pause}, or a signal inside a kernel, may stop.
 *
 * @param remedy what the user can do after a stop
 * @throws {InterruptedError} when the signal stopped it
 */
export async function stoppable<T>(
  signal: AbortSignal | undefined,
  remedy: string,
  run: () => T | Promise<T>,
): Promise<T> {
  try {
    return await run();
  } catch (error) {
    const isPaused = signal?.aborted === true && error === signal.reason;
    if (!isPaused && !(error instanceof InterruptedError)) throw error;
    const reason = isPaused ? String(signal.reason) : (error as InterruptedError).signal;
    throw new InterruptedError(`Stopped by ${reason}: ${remedy}`, reason);
  }
}

/** Bytes in decimal units, three digits. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit++;
  }
  return `${unit === 0 ? bytes.toFixed(0) : bytes.toPrecision(3)} ${units[unit]}`;
}

/** A duration in the unit that fits. */
export function secondsText(seconds: number): string {
  if (seconds < 1) return `${Math.max(0.01, seconds).toFixed(2)} s`;
  if (seconds < 120) return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  if (hours === 0) return `${minutes} min`;
  return hours < 10 && minutes % 60 > 0 ? `${hours} h ${minutes % 60} min` : `${Math.round(minutes / 60)} h`;
}
