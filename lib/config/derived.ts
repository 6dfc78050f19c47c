/** Answers of a configuration that follow from several of its keys. */
import { compilePattern } from "./patterns.ts";
import {
  CALIBRATED_SOLVERS,
  CODED_SCALE_BITS,
  type LayerBits,
  OFFSET_BITS,
  ROTATED_SCALE_BITS,
  type ScaleBits,
  type Solver,
  type ZeroPointKind,
} from "./names.ts";
import type { Config } from "./schema.ts";

/** What `auto` chose for a model. */
export interface ChosenSolver {
  /** Solver of matrices of fewer than 8 bits whose inputs are not known. */
  readonly byWeights: "round" | "clip";
  /** Whether layers of 8 bits are rounded. */
  readonly roundsEight: boolean;
  /** Why, as a part of a sentence. */
  readonly why: string;
}

/** A configuration in force: its solver is one, not `auto`. */
export interface ConfigInForce extends Config {
  readonly solver: Solver;
  /** Undefined where the configuration itself names the solver. */
  readonly chosen?: ChosenSolver | undefined;
}

/** Whether a configuration leaves nothing to choose. */
export const isInForce = (config: Config): config is ConfigInForce => config.solver !== "auto";

/** Phase 3 needs a calibrated solver, `best` unless another one is configured. */
export function withPhaseSolver(config: Config): Config {
  const { solver, thermodynamic: { transitionOptimization } } = config;
  return !transitionOptimization.enabled || (CALIBRATED_SOLVERS as readonly string[]).includes(solver)
    ? config
    : { ...config, solver: "best" };
}

/** Whether a configuration asks for a phase. */
export function wantsPhases({ thermodynamic }: Config): boolean {
  const { validation, boundarySmoothing, transitionOptimization } = thermodynamic;
  return validation.enabled || boundarySmoothing.enabled || transitionOptimization.enabled;
}

/** Whether a budget chooses the bits. */
export function hasBudget({ targetBitsPerWeight, targetModelSizeMb }: Config): boolean {
  return targetBitsPerWeight !== null || targetModelSizeMb !== null;
}

/** Whether a configuration needs calibration data. */
export function isCalibrated(config: ConfigInForce): boolean {
  return CALIBRATED_SOLVERS.includes(config.solver) || hasBudget(config) || wantsPhases(config);
}

/** Bits of a tensor by `layer_bit_widths`: its own name wins, of several patterns the one with most bits. */
export function layerBitWidth({ layerBitWidths }: Config, tensor: string): LayerBits | undefined {
  return byName(layerBitWidths, tensor).sort((a, b) => b - a)[0];
}

/** The target's type of a tensor by `layer_types`: its own name wins, of several patterns the first. */
export const layerType = ({ layerTypes }: Config, tensor: string): string | undefined =>
  byName(layerTypes, tensor)[0];

/** What a map by names or patterns has for a tensor: its own name's, or those of all patterns that fit. */
function byName<V>(map: Readonly<Record<string, V>>, tensor: string): V[] {
  for (const name of [tensor, layerName(tensor)]) {
    if (Object.hasOwn(map, name)) return [map[name]!];
  }
  return Object.entries(map).filter(([pattern]) => compilePattern(pattern).test(tensor)).map(([, value]) =>
    value
  );
}

/** Whether `sensitive_layer_names` or `sensitive_layer_patterns` name a tensor. */
export function isSensitiveLayer(config: Config, tensor: string): boolean {
  return config.sensitiveLayerNames.some((name) => name === tensor || name === layerName(tensor)) ||
    config.sensitiveLayerPatterns.some((pattern) => compilePattern(pattern).test(tensor));
}

const layerName = (tensor: string): string => tensor.replace(/\.weight$/, "");

/** Whether scales are of trellis codes alone: coded ones, or one for a rotated tensor. */
export const hasTrellisScales = ({ scaleBits }: Pick<Config, "scaleBits">): boolean =>
  scaleBits === CODED_SCALE_BITS || scaleBits === ROTATED_SCALE_BITS;

/** Whether uniform codes have one level of scales. */
export const hasPlainScales = ({ scaleBits }: Pick<Config, "scaleBits">): boolean =>
  scaleBits === 16 || hasTrellisScales({ scaleBits });

/** How a configuration stores the scales of a packed matrix; offsets count as scales of their own. */
export function storedScales(
  { zeroPoint, scaleBits }: Pick<Config, "zeroPoint" | "scaleBits">,
): { readonly zeroPoint: ZeroPointKind; readonly scaleBits: ScaleBits | undefined } {
  if (zeroPoint === "offset") return { zeroPoint: "real", scaleBits: OFFSET_BITS };
  return { zeroPoint, scaleBits: hasPlainScales({ scaleBits }) ? undefined : scaleBits };
}
