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

/** Constructor of an error with a stable code that says where it happened. */
type PlacedError<C extends ErrorCode> = new (message: string, place?: ErrorPlace) => Error & {
  /** Stable code. */
  readonly code: C;
  /** File or folder concerned. */
  readonly path: string | undefined;
  /** Tensor concerned. */
  readonly tensor: string | undefined;
};

function placedError<C extends ErrorCode>(Base: ErrorConstructor, code: C, name: string): PlacedError<C> {
  return class extends Base {
    readonly code = code;
    override readonly name = name;
    readonly path: string | undefined;
    readonly tensor: string | undefined;
    constructor(message: string, { path, tensor, cause }: ErrorPlace = {}) {
      super(message, cause === undefined ? undefined : { cause });
      this.path = path;
      this.tensor = tensor;
    }
  };
}

const PlacedFormatError: PlacedError<"AQ_FORMAT"> = placedError(SyntaxError, "AQ_FORMAT", "FormatError");
const PlacedCheckpointError: PlacedError<"AQ_CHECKPOINT"> = placedError(
  Error,
  "AQ_CHECKPOINT",
  "CheckpointError",
);
const PlacedWeightsError: PlacedError<"AQ_WEIGHTS"> = placedError(RangeError, "AQ_WEIGHTS", "WeightsError");
const PlacedOutputError: PlacedError<"AQ_OUTPUT"> = placedError(Error, "AQ_OUTPUT", "OutputError");
const PlacedIntegrityError: PlacedError<"AQ_INTEGRITY"> = placedError(
  Error,
  "AQ_INTEGRITY",
  "IntegrityError",
);
const PlacedCalibrationError: PlacedError<"AQ_CALIBRATION"> = placedError(
  RangeError,
  "AQ_CALIBRATION",
  "CalibrationError",
);

/** A file does not hold what its format promises: truncated, lying about sizes, unparsable. */
export class FormatError extends PlacedFormatError {}

/** A checkpoint is incomplete or not what the operation needs: a missing shard or tensor, no model. */
export class CheckpointError extends PlacedCheckpointError {}

/** Weights cannot be quantized as asked: NaN, infinity, or too large for a half-precision scale. */
export class WeightsError extends PlacedWeightsError {}

/** The output cannot be written: exists, equals the input, no permission, no space. */
export class OutputError extends PlacedOutputError {}

/** What was read back is not what was written, or a file does not match its manifest. */
export class IntegrityError extends PlacedIntegrityError {}

/** Calibration data, or statistics made of them, are not what the model or the solver needs. */
export class CalibrationError extends PlacedCalibrationError {}

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
