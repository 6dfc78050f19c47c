/** Rules over several keys of a configuration, all of them checked at once. */
import { ConfigError, type ConfigProblem } from "../errors.ts";
import { hasBudget, hasPlainScales, hasTrellisScales, withPhaseSolver } from "./derived.ts";
import { isMapping, quoted } from "./kinds.ts";
import { CALIBRATED_SOLVERS, ROTATED_SCALE_BITS, TWO_LEVEL_GROUP_SIZES } from "./names.ts";
import { type Config, valueAt } from "./schema.ts";
import { GRIDS, TARGETS, targetTypes } from "./targets.ts";

/** A key whose value contradicts others, and the value that it must have with them. */
type Contradiction = readonly [key: string, expected: string];

/** @param from a key with its value and its source, for messages */
function* contradictions(config: Config, from: (key: string) => string): Generator<Contradiction> {
  const { scaleBits, groupSize, zeroPoint, bitPlan } = config;
  const { validation, boundarySmoothing, transitionOptimization } = config.thermodynamic;
  const hasTimeScales = config.timeScales === "per_group";
  const isOffset = zeroPoint === "offset";
  const [own, plain] = isOffset ? ["zero_point", "real, integer or symmetric"] : ["scale_bits", "16"];
  if (hasTrellisScales(config) && config.codes !== "trellis") {
    yield ["scale_bits", `16, 4 or 6 with ${from("codes")}`];
  }
  if (!hasPlainScales(config) || isOffset) {
    const why = `with ${from(own)}`;
    if (!TWO_LEVEL_GROUP_SIZES.includes(groupSize)) {
      yield ["group_size", `one of ${TWO_LEVEL_GROUP_SIZES.join(", ")} ${why}`];
    }
    if (isOffset && scaleBits !== 16) yield ["scale_bits", `16 ${why}`];
    else if (!isOffset && zeroPoint !== "real") yield ["zero_point", `real ${why}`];
    if (bitPlan !== null || hasBudget(config)) yield [own, `${plain} with a bit plan or a budget`];
  }
  if (config.codes === "trellis") yield* ofTrellis(config, from);
  yield* ofTarget(config, from);
  const effective = withPhaseSolver(config).solver;
  if ((CALIBRATED_SOLVERS as readonly string[]).includes(effective) && config.minAccuracy > 0) {
    yield ["min_accuracy", `0 with solver ${effective}: the cosine of weights is not what it minimizes`];
  }
  if (bitPlan !== null && hasBudget(config)) {
    yield ["bit_plan", "null with target_bits_per_weight or target_model_size_mb"];
  }
  if (transitionOptimization.enabled) {
    const why = `with ${from("thermodynamic.transition_optimization.enabled")}: its gradients`;
    if (scaleBits !== 16 || isOffset) yield [own, `${plain} ${why} know one level of scales`];
  }
  if (!config.enableTimeAware) {
    const why = "it looks at the activations' quantization parameters";
    const expected = `false with ${from("enable_time_aware")}: ${why}`;
    if (validation.enabled) yield ["thermodynamic.validation.enabled", expected];
    if (boundarySmoothing.enabled) yield ["thermodynamic.boundary_smoothing.enabled", expected];
  }
  if (hasTimeScales && config.outputCorrection) {
    yield ["time_scales", `shared with ${from("output_correction")}`];
  }
  if (hasTimeScales && (scaleBits !== 16 || isOffset)) yield ["time_scales", `shared with ${from(own)}`];
}

/** Rules of trellis codes: a scale and an offset a group, searched on what a layer reads. */
function* ofTrellis(config: Config, from: (key: string) => string): Generator<Contradiction> {
  const why = `with ${from("codes")}`;
  if (config.solver !== "best" && config.solver !== "auto") yield ["solver", `best or auto ${why}`];
  if (config.zeroPoint !== "real") yield ["zero_point", `real ${why}`];
  if (!hasPlainScales(config)) yield ["scale_bits", `16, 3 or 0 ${why}`];
  if (config.scaleBits === ROTATED_SCALE_BITS && config.groupSize !== 0) {
    yield ["group_size", `0 with ${from("scale_bits")}`];
  }
  if (hasTrellisScales(config) && (config.bitPlan !== null || hasBudget(config))) {
    yield ["scale_bits", "16 with a bit plan or a budget, which counts bytes of half floats"];
  }
  if (config.target !== null) yield ["target", `null ${why}, which no other program reads`];
  if (config.timeScales === "per_group") yield ["time_scales", `shared ${why}`];
  if (config.minAccuracy > 0) {
    yield ["min_accuracy", `0 ${why}: the cosine of weights is not what it minimizes`];
  }
  if (config.thermodynamic.transitionOptimization.entropyWeight > 0) {
    yield ["thermodynamic.transition_optimization.entropy_weight", `0 ${why}: it is of uniform codes`];
  }
}

/** Rules of a target, which chooses the form of scales and zero points. */
function* ofTarget(config: Config, from: (key: string) => string): Generator<Contradiction> {
  const { target, targetType, layerTypes, scaleBits, zeroPoint, minAccuracy, thermodynamic } = config;
  if (target === null) {
    if (targetType !== null) yield ["target_type", "null without a target"];
    if (Object.keys(layerTypes).length > 0) yield ["layer_types", "empty without a target"];
    return;
  }
  const why = `with ${from("target")}`, own = TARGETS[target]!, types = targetTypes(own);
  const isOther = (type: string) => !types.includes(type);
  if (targetType !== null && isOther(targetType)) yield ["target_type", `one of ${types.join(", ")} ${why}`];
  if (Object.values(layerTypes).some(isOther)) {
    yield ["layer_types", `types among ${types.join(", ")} ${why}`];
  }
  if (targetType === null && own.types[config.bitWidth] === undefined) {
    yield ["bit_width", `one of ${Object.keys(own.types).join(", ")} ${why}`];
  }
  if (scaleBits !== 16) yield ["scale_bits", `16 ${why}, which chooses the scales`];
  if (zeroPoint !== "real") yield ["zero_point", `real, the default, ${why}, which chooses the zero points`];
  if (minAccuracy > 0) yield ["min_accuracy", `0 ${why}: other bits would be of another type`];
  for (const key of ["target_bits_per_weight", "target_model_size_mb", "bit_plan"]) {
    if (valueAt(config, key) === null) continue;
    yield [key, `null ${why}, which chooses groups and zero points: layer_types gives layers their types`];
  }
  const hasTwoLevels = types.some((type) => GRIDS[type]!.scaleBits !== undefined);
  if (hasTwoLevels && thermodynamic.transitionOptimization.enabled) {
    const gradients = "the gradients know one level of scales";
    yield ["thermodynamic.transition_optimization.enabled", `false ${why}: ${gradients}`];
  }
  if (hasTwoLevels && config.timeScales === "per_group") yield ["time_scales", `shared ${why}`];
}

/**
 * Checks the rules over several keys.
 *
 * @param origins source of each key's value, for messages; a configuration that was made otherwise has none
 * @throws {ConfigError} with every rule that is broken
 */
export function checkConfig(config: Config, origins: Readonly<Record<string, string>> = {}): void {
  const source = (key: string) => origins[key] ?? "configuration";
  const from = (key: string) => `${key} ${valueAt(config, key)} (${source(key)})`;
  throwProblems([...contradictions(config, from)].map(([key, expected]) => (
    { key, value: preview(valueAt(config, key)), expected, source: source(key) }
  )));
}

/** Most problems that a message lists. */
const MAX_SHOWN = 100;

/** @throws {ConfigError} with every problem, when there is one */
export function throwProblems(problems: readonly ConfigProblem[]): void {
  if (problems.length === 0) return;
  const lines = problems.slice(0, MAX_SHOWN).map((p) =>
    `  "${p.key}": got ${p.value}, expected ${p.expected} (${p.source})`
  );
  if (problems.length > MAX_SHOWN) lines.push(`  and ${problems.length - MAX_SHOWN} more`);
  const count = problems.length === 1 ? "1 problem" : `${problems.length} problems`;
  throw new ConfigError(`Cannot use configuration: ${count}\n${lines.join("\n")}`, problems);
}

/** A short text for any value; never descends, so aliases that expand to gigabytes cost nothing. */
export function preview(value: unknown): string {
  if (typeof value === "string") return quoted(value.length > 80 ? `${value.slice(0, 79)}…` : value);
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (value instanceof Date) return "a date";
  if (isMapping(value)) return `a mapping of ${Object.keys(value).length}`;
  if (typeof value === "object" && value !== null) return `a ${value.constructor?.name ?? "object"}`;
  return Object.is(value, -0) ? "-0" : String(value);
}
