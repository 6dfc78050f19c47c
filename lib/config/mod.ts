/**
 * Configuration: YAML text, environment variables and command-line values in, one frozen and validated
 * `Config` out. schema.ts lists the keys; what they do belongs to the modules that use them.
 */
export {
  type ChosenSolver,
  type ConfigInForce,
  hasBudget,
  isCalibrated,
  isInForce,
  isSensitiveLayer,
  layerBitWidth,
  layerType,
  storedScales,
  wantsPhases,
  withPhaseSolver,
} from "./derived.ts";
export { checkConfig } from "./checks.ts";
export { compilePattern, type NamePattern } from "./patterns.ts";
export { loadConfig, MAX_CONFIG_BYTES, parseConfig } from "./load.ts";
export type { BitWidth, GroupSize, LayerBits } from "./names.ts";
export { type ConfigOverrides, DEFAULT_CONFIG, resolveConfig, type ResolvedConfig } from "./resolve.ts";
export { type Config, type DeploymentProfile, LATER_KEYS } from "./schema.ts";
export { type Grid, gridFor, GRIDS, type Target, TARGETS } from "./targets.ts";
export { canonicalConfig, configTable, formatConfig } from "./text.ts";
