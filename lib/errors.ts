/**
 * The errors a caller may want to catch, each with a stable `code` and the fields that say where it happened.
 * A wrong argument type or value in a call is a plain `TypeError` or `RangeError` instead.
 *
 * Message form: what was being done, then what was wrong with the value found and the value wanted.
 */

/** Stable codes, printed by the commands and listed in docs/errors.md. */
export type ErrorCode =
  | "AQ_CONFIG"
  | "AQ_FORMAT"
  | "AQ_CHECKPOINT"
  | "AQ_WEIGHTS"
  | "AQ_OUTPUT"
  | "AQ_INTEGRITY"
  | "AQ_CALIBRATION"
  | "AQ_KERNELS"
  | "AQ_MEMORY"
  | "AQ_INTERRUPTED";

/** Where an error happened, as far as it is known. */
export interface ErrorPlace {
  /** File or folder concerned. */
  readonly path?: string | undefined;
  /** Tensor concerned. */
  readonly tensor?: string | undefined;
  readonly cause?: unknown;
}

/** One rejected configuration key. */
export interface ConfigProblem {
  /** Path of the key, as in `thermodynamic.validation.smoothness_threshold`. */
  readonly key: string;
  /** What was found, as text. */
  readonly value: string;
  /** What is allowed, as text. */
  readonly expected: string;
  /** Where the value came from: a file's path, an environment variable, an option. */
  readonly source: string;
}

/** A configuration was rejected; `problems` holds every one of its faults, not only the first. */
export class ConfigError extends RangeError {
  readonly code = "AQ_CONFIG" satisfies ErrorCode;
  override readonly name = "ConfigError";
  constructor(message: string, readonly problems: readonly ConfigProblem[] = [], cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
  }
}

/** A file does not hold what its format promises: truncated, lying about sizes, unparsable. */
export class FormatError extends SyntaxError {
  readonly code = "AQ_FORMAT" satisfies ErrorCode;
  override readonly name = "FormatError";
  readonly path: string | undefined;
  readonly tensor: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
    this.tensor = place.tensor;
  }
}

/** A checkpoint is incomplete or not what the operation needs: missing shard, absent tensor, no model file. */
export class CheckpointError extends Error {
  readonly code = "AQ_CHECKPOINT" satisfies ErrorCode;
  override readonly name = "CheckpointError";
  readonly path: string | undefined;
  readonly tensor: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
    this.tensor = place.tensor;
  }
}

/** Weights cannot be quantized as asked: NaN or infinity among them, or too large for a half-precision scale. */
export class WeightsError extends RangeError {
  readonly code = "AQ_WEIGHTS" satisfies ErrorCode;
  override readonly name = "WeightsError";
  readonly path: string | undefined;
  readonly tensor: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
    this.tensor = place.tensor;
  }
}

/** The output cannot be written: exists, equals the input, no permission, no space. */
export class OutputError extends Error {
  readonly code = "AQ_OUTPUT" satisfies ErrorCode;
  override readonly name = "OutputError";
  readonly path: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
  }
}

/** What was read back is not what was written, or a file does not match its manifest. */
export class IntegrityError extends Error {
  readonly code = "AQ_INTEGRITY" satisfies ErrorCode;
  override readonly name = "IntegrityError";
  readonly path: string | undefined;
  readonly tensor: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
    this.tensor = place.tensor;
  }
}

/** Calibration data, or statistics made of them, are not what the model or the solver needs. */
export class CalibrationError extends RangeError {
  readonly code = "AQ_CALIBRATION" satisfies ErrorCode;
  override readonly name = "CalibrationError";
  readonly path: string | undefined;
  readonly tensor: string | undefined;
  constructor(message: string, place: ErrorPlace = {}) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
    this.tensor = place.tensor;
  }
}

/** The kernel library could not be found, opened or built as asked, or a kernel refused its arguments. */
export class KernelError extends Error {
  readonly code = "AQ_KERNELS" satisfies ErrorCode;
  override readonly name = "KernelError";
  /** The kernel's return value, where a call failed. */
  readonly status: number | undefined;
  constructor(message: string, options: { status?: number; cause?: unknown } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.status = options.status;
  }
}

/** A model would not fit into this machine's memory; said before a weight of it is read. */
export class MemoryError extends RangeError {
  readonly code = "AQ_MEMORY" satisfies ErrorCode;
  override readonly name = "MemoryError";
  readonly path: string | undefined;
  constructor(
    message: string,
    /** Bytes that would be needed. */
    readonly neededBytes: number,
    /** Bytes that there are. */
    readonly availableBytes: number,
    place: ErrorPlace = {},
  ) {
    super(message, place.cause === undefined ? undefined : { cause: place.cause });
    this.path = place.path;
  }
}

/** The work was stopped by a signal and left in a state that can be resumed. */
export class InterruptedError extends Error {
  readonly code = "AQ_INTERRUPTED" satisfies ErrorCode;
  override readonly name = "InterruptedError";
  constructor(message: string, readonly signal: string) {
    super(message);
  }
}
