/** The stages of a run that runs the model: its own samples, held-out distances, phases. */
import { thatRuns } from "../../calibration/statistics/alone.ts";
import { OWN_BATCH_LOGITS, OWN_BATCH_POSITIONS, type OwnSampleWork } from "../../calibration/own_samples.ts";
import { maskedRows } from "../../calibration/step_kl.ts";
import { type ConfigInForce, wantsPhases } from "../../config/mod.ts";
import { forwardCost, gradientCost, modelRequirements } from "../../models/mod.ts";
import {
  type LayerParameterCount,
  memoryThatFits,
  parametersOf,
  REFINEMENT_HELD_OUT,
  type RefinementMemory,
  samplesOfStep,
  whatFits,
} from "../../phases/fitting.ts";
import { REFINEMENT_DEFAULTS } from "../../phases/settings.ts";
import { groupCount } from "../../quant/mod.ts";
import { candidateCount } from "../../solve/candidates.ts";
import { GRADIENT_SHARE } from "./memory_shares.ts";
import type { TimedWork } from "./timed_work.ts";
import type { ModelConfig } from "../../models/families.ts";
import {
  type CountedRun,
  CountedWork,
  most,
  type Part,
  type Pass,
  type RunStage,
  sum,
} from "./counted_work.ts";

/** Passes of two models over held-out data that a phase along the time axis takes, and over the others. */
const PHASE_PASSES = { heldOut: 8, fit: 2 };
/** Looks of the refinement at held-out samples that its time is forecast with: some by one model alone. */
const LOOKS = 4;
/** Part of a refined parameter's bytes that is kept over a stop, at each look. */
const KEPT_PART = 4 / 7;
/** Times that a parameter's bytes go through its file in a step. */
const STEP_TRAFFIC = 2;
/** Full-precision outputs that a meter and the refinement keep. */
const OUTPUTS_BYTES = 2 * 2 ** 28;
/** Logits in memory at once, of two models and a copy. */
const LOGITS_BYTES = 3 * 4 * 2 ** 25;

/** A run of a model. */
export class CountedModel extends CountedWork {
  readonly #model: ModelConfig;
  /** Weights of the largest matrix. */
  readonly #largestMatrix: number;

  constructor(run: CountedRun) {
    const { matrices, weightBytes, model } = modelRequirements(run.checkpoint);
    super(run, matrices, weightBytes);
    this.#model = model;
    this.#largestMatrix = most(matrices.map(({ rows, cols }) => rows * cols));
  }

  get width(): number {
    return this.#model.config.hiddenSize;
  }

  /** Of experts also what all read, and their sum. */
  get keptBeside(): number {
    return "mixture" in this.#model.config && this.#model.config.mixture !== undefined ? 2 * this.width : 0;
  }

  /** Outputs of image models pass gates. */
  get hasStream(): boolean {
    return this.#model.kind !== "dit";
  }

  get #vocabularySize(): number {
    return "vocabularySize" in this.#model.config ? this.#model.config.vocabularySize : 0;
  }

  pass(parts: readonly Part[]): Pass {
    const costs = parts.map(({ samples, weights: { length } }) =>
      forwardCost(this.#model, { batch: samples, tokens: length / samples, rows: 1 })
    );
    const positions = sum(parts.map(({ weights }) => weights.length));
    const multiplyAdds = sum(costs.map((cost) => cost.multiplyAdds));
    return {
      positions,
      ofPosition: multiplyAdds / Math.max(1, positions),
      bytes: most(costs.map(({ activationBytes }) => activationBytes)),
      statesBytes: 4 * positions * this.width,
      seconds: (timed: TimedWork) =>
        positions === 0 ? 0 : positions * timed.position(multiplyAdds / positions),
    };
  }

  /**
   * The model making its own samples; about half of the positions are written to.
   *
   * @param heldBytes of weights that stay in memory: where they are fewer than all, each pass reads all again
   */
  ownSamples({ positions, passes, isRounded }: OwnSampleWork, heldBytes: () => number): RunStage {
    const { data: { fit } } = this.run.calibrated, pass = this.pass(fit), width = this.width;
    const form = { bits: 8, groupSize: 0, zeroPoint: "real" } as const;
    const vocabularySize = this.#vocabularySize;
    const logits = Math.min(OWN_BATCH_LOGITS, OWN_BATCH_POSITIONS * vocabularySize);
    return {
      name: "its own samples",
      bytes: pass.bytes + 4 * logits + (isRounded ? this.#largestMatrix : 0),
      statesBytes: 0,
      seconds: (timed) => {
        const ofLogits = 0.5 * vocabularySize * width;
        const read = heldBytes() < this.weights.bytes ? passes : 1;
        const around = read * timed.reading(this.weights.bytes) +
          timed.logits(0.5 * positions, vocabularySize);
        if (!isRounded) {
          return around +
            positions * (pass.seconds(timed) / pass.positions + ofLogits * timed.multiplyAdd(width));
        }
        // Weights are rounded again in each pass.
        return around + positions * (pass.ofPosition + ofLogits) * timed.integerMultiplyAdd() +
          passes * timed.packing(pass.ofPosition + 2 * ofLogits, "round", form);
      },
    };
  }

  heldOut(config: ConfigInForce): RunStage[] {
    const { calibrated } = this.run, { data: { heldOut } } = calibrated, tables = this.tableBytes;
    if (heldOut.length === 0) return [];
    const count = candidateCount(calibrated, config), packed = this.packedBytes, held = this.pass(heldOut);
    const rows = this.#maskedRows(), vocabularySize = this.#vocabularySize;
    return [{
      name: "held-out distances",
      bytes: held.bytes + 2 * held.statesBytes + tables + Math.min(2, count) * packed +
        (rows === 0 ? 0 : Math.min(LOGITS_BYTES, 12 * rows * vocabularySize)),
      statesBytes: 0,
      seconds: (timed: TimedWork) =>
        this.readingAgain(timed) + (1 + count) * held.seconds(timed) +
        count * (2 * rows * vocabularySize * this.width * timed.multiplyAdd(this.width) +
            timed.logits(rows, vocabularySize)),
    }];
  }

  /** Held-out positions whose logits are compared. */
  #maskedRows(): number {
    const { calibrated } = this.run;
    if (calibrated.kind !== "sequences") return 0;
    const { data, model: { config }, shift } = calibrated;
    return data.heldOut.reduce(
      (sum, { batch: { inputIds }, samples }) =>
        sum + maskedRows(inputIds, inputIds.length / samples, config.maskToken, shift).length,
      0,
    );
  }

  phases(config: ConfigInForce): RunStage[] {
    if (!wantsPhases(config)) return [];
    const { kind, data: { fit, heldOut } } = thatRuns(this.run.calibrated, "run the phases");
    const { validation, boundarySmoothing, transitionOptimization: refinement } = config.thermodynamic;
    const pass = this.pass(fit), held = this.pass(heldOut), [first] = fit;
    const axis = validation.enabled || boundarySmoothing.enabled || config.enableTimeAware;
    const length = first === undefined ? 1 : first.weights.length / first.samples,
      size = samplesOfStep(length);
    const asked = refinement.maxIterations ?? REFINEMENT_DEFAULTS[kind].maxIterations;
    const fits = (timed: TimedWork) =>
      whatFits({
        passSeconds: pass.positions === 0 ? 1 : 2 * size * length * pass.seconds(timed) / pass.positions,
        batches: Math.ceil(REFINEMENT_HELD_OUT[kind] / size),
        iterations: asked,
        seconds: (refinement.maxMinutes ?? Infinity) * 60,
      });
    const memory = refinement.enabled ? this.#refinementMemory(config) : undefined;
    // The phases' models share their scratch; the full ones have their own.
    const models = 3 * Math.max(pass.bytes, held.bytes) + this.packedBytes + this.tableBytes;
    return [{
      name: "phases",
      bytes: models + this.#outputBytes() +
        (memory === undefined ? 0 : memory.stepBytes + memory.heldBytes),
      statesBytes: 0,
      seconds: (timed) => {
        const { iterations, stepSeconds, lookSeconds } = fits(timed);
        const { parameterBytes, heldBytes } = memory ?? { parameterBytes: 0, heldBytes: 0 };
        const isFiled = heldBytes < parameterBytes, states = LOOKS * KEPT_PART * parameterBytes;
        const filed = isFiled ? STEP_TRAFFIC * timed.reading(parameterBytes) : 0;
        // Read where parameters lie in a file, hashed and written.
        const kept = timed.reading(isFiled ? 2 * states : states) + timed.hashing(states);
        const refined = iterations === 0
          ? 0
          : iterations * (stepSeconds + filed) + LOOKS * lookSeconds + kept;
        return (refinement.enabled ? refined : 0) +
          (axis ? PHASE_PASSES.fit * pass.seconds(timed) + PHASE_PASSES.heldOut * held.seconds(timed) : 0);
      },
      note: (timed) =>
        refinement.enabled ? `${fits(timed).iterations} of ${asked} steps of gradients` : undefined,
    }];
  }

  /** Bytes of outputs: of a part by two models with a copy, and those of full precision that are kept. */
  #outputBytes(): number {
    const calibrated = thatRuns(this.run.calibrated, "run the phases"), { data: { heldOut } } = calibrated;
    if (calibrated.kind === "images") {
      const { model: { imageElements, config: { outputChannels, channels } } } = calibrated;
      const ofImage = 4 * imageElements * outputChannels / channels;
      return 3 * ofImage * most(heldOut.map(({ samples }) => samples)) +
        Math.min(OUTPUTS_BYTES, 2 * ofImage * heldOut.reduce((sum, { samples }) => sum + samples, 0));
    }
    const { data, model: { config }, shift } = calibrated;
    const rows = data.heldOut.map(({ batch: { inputIds }, samples }) =>
      maskedRows(inputIds, inputIds.length / samples, config.maskToken, shift).length
    );
    const ofRow = 4 * config.vocabularySize;
    return 3 * ofRow * most(rows) +
      Math.min(OUTPUTS_BYTES, 2 * ofRow * rows.reduce((sum, count) => sum + count, 0));
  }

  /** Memory of a step's gradients and of what the optimizer keeps. */
  #refinementMemory(config: ConfigInForce): RefinementMemory {
    const { data: { fit: [first] } } = thatRuns(this.run.calibrated, "run the phases");
    const tokens = first === undefined ? 1 : first.weights.length / first.samples;
    const cost = gradientCost(this.#model, { batch: samplesOfStep(tokens), tokens });
    return memoryThatFits(cost, this.#refinedParameters(config), GRADIENT_SHARE * this.run.memoryBytes);
  }

  /** Scales, zero points and biases that the refinement moves. */
  #refinedParameters(config: ConfigInForce): LayerParameterCount[] {
    const perRow = 1 + (config.enableTimeAware && config.outputCorrection ? config.numTimeGroups : 0);
    const { stages } = this.run.calibrated.model, head = stages.at(-1)?.block;
    const quantized = this.run.rows.filter(({ action }) => action === "quantize");
    const rowsOf = new Map(quantized.map((row) => [row.name, row]));
    return stages.flatMap(({ block, layers }) =>
      layers.flatMap(({ name }) => {
        const row = rowsOf.get(name);
        if (row === undefined) return [];
        const { shape: [rows, cols], groupSize, zeroPoint } = row;
        const groups = groupCount(cols!, groupSize!), isReal = zeroPoint === "real";
        return parametersOf(block === head ? undefined : block, { rows: rows!, groups, isReal, perRow });
      })
    );
  }

  /** Bytes of the refinement in the work folder: its state over a stop, and parameters out of memory. */
  refinementBytes(config: ConfigInForce): number {
    if (!config.thermodynamic.transitionOptimization.enabled) return 0;
    const { parameterBytes, heldBytes } = this.#refinementMemory(config);
    // While a state is written, the last one stands.
    return 2 * KEPT_PART * parameterBytes + (heldBytes < parameterBytes ? parameterBytes : 0);
  }
}
