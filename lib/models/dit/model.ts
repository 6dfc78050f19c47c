/**
 * DiT: class-conditional image diffusion by a transformer with adaLN-zero (https://arxiv.org/abs/2212.09748),
 * with the names and the configuration of diffusers' `DiTTransformer2DModel`. Noise schedules are in
 * schedulers.ts, the sampler is in sampler.ts.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs, type ModelFamily, type ModelSource } from "../family.ts";
import {
  type Blockwise,
  checkPlain,
  firstFault,
  heldPass,
  heldStages,
  type PassOptions,
  type Stage,
  type StagedRun,
} from "../layers/blockwise.ts";
import { type BlockPass, LoadedWeights } from "../layers/loaded_weights.ts";
import { shown } from "../model_config.ts";
import type { LinearLayer, LoadOptions } from "../layers/tensors.ts";
import { ditConfig } from "../configuration/dit.ts";
import { DIT_KEYS } from "../configuration/keys.ts";
import { type DitConfig, ditForwardCost, ditGradientCost } from "./config.ts";
import {
  embed,
  embedTimesteps,
  type ImageConditions,
  runBlock,
  runOutput,
  stagesOfBlock,
  stagesOfOutput,
  tokensOf,
} from "./forward.ts";
import { type DitParts, ditTensors, readDitParts } from "./weights.ts";

/** Noisy images that are run together, for a model run block by block. */
export interface ImageBatch extends ImageConditions {
  /** `f32[batch, channels, size, size]` */
  readonly samples: Float32Array;
}

/** A loaded DiT: noisy images, timesteps and classes in, the prediction out. */
export class DitModel extends LoadedWeights<DitConfig, DitParts> implements Blockwise<ImageBatch> {
  constructor(source: ModelSource<DitConfig>, options: LoadOptions = {}) {
    super(source, readDitParts(source.config, source.tensors), options);
  }

  override get linearLayers(): readonly LinearLayer[] {
    return [this.parts.patch, ...super.linearLayers];
  }

  /** Bytes of positions and of scratch held for the largest call so far. */
  override get scratchBytes(): number {
    return this.parts.positions.byteLength + super.scratchBytes;
  }

  /** Numbers of one input image. */
  get imageElements(): number {
    return this.config.channels * this.config.sampleSize ** 2;
  }

  /**
   * The model's prediction of each image.
   *
   * **Shapes** `samples: f32[batch, channels, size, size]`, `timesteps` and `labels: [batch]` →
   * `f32[batch, output channels, size, size]`. The result is scratch: the next call overwrites it.
   *
   * @throws {TypeError} when a shape does not fit
   * @throws {RangeError} when a label or a timestep is not allowed
   * @throws {WeightsError} when values come out NaN or infinite, naming the first block that made one
   */
  forward(
    samples: Float32Array,
    timesteps: ArrayLike<number>,
    labels: ArrayLike<number>,
    options: PassOptions = {},
  ): Float32Array {
    const batch = this.checkInput(samples, timesteps, labels);
    if (options.weights !== undefined) checkPlain(this);
    const pass = this.pass(options), call = { samples, timesteps, labels };
    this.timeAware?.begin(timesteps, batch);
    const output = this.#run(pass, call);
    if (!allFinite(output)) this.#run(pass, call, firstFault(this.path));
    return output;
  }

  /** Images of a batch. @throws as {@linkcode DitModel.forward} */
  checkInput(samples: Float32Array, timesteps: ArrayLike<number>, labels: ArrayLike<number>): number {
    const fail = (reason: string) => `Cannot run ${shown(this.path)}: ${reason}`;
    const { channels, sampleSize, classes } = this.config, batch = samples.length / this.imageElements;
    if (!(samples instanceof Float32Array) || !Number.isInteger(batch) || batch < 1) {
      const wanted = `f32[batch, ${channels}, ${sampleSize}, ${sampleSize}]`;
      throw new TypeError(fail(`samples must be ${wanted}, got ${samples?.length} numbers`));
    }
    if (timesteps.length !== batch || labels.length !== batch) {
      const got = `${timesteps.length} and ${labels.length}`;
      throw new TypeError(fail(`${batch} images must have a timestep and a label each, got ${got}`));
    }
    for (let i = 0; i < batch; i++) {
      const label = labels[i]!, timestep = timesteps[i]!;
      if (!Number.isInteger(label) || label < 0 || label > classes) {
        throw new RangeError(
          fail(`labels must be from 0 to ${classes}, the last for no class, got ${label}`),
        );
      }
      if (!(timestep >= 0 && timestep < Infinity)) {
        throw new RangeError(fail(`timesteps must be numbers ≥ 0, got ${timestep}`));
      }
    }
    return batch;
  }

  #run(
    pass: BlockPass<DitConfig, DitParts>,
    call: ImageBatch,
    inspect?: (place: string, values: Float32Array) => void,
  ): Float32Array {
    const { patch, blocks, output2 } = this.parts, batch = call.labels.length;
    const hidden = this.workspace.take("hidden", batch * tokensOf(this.config) * this.config.hiddenSize);
    embed(pass, call.samples, batch, hidden);
    inspect?.(patch.name, hidden);
    embedTimesteps(pass, call.timesteps);
    const { arrays } = this.kernels;
    const output = heldPass(this.kernels, hidden, () => {
      for (const [index, { name }] of blocks.entries()) {
        pass.begin(index, true);
        runBlock(pass, index, call, hidden);
        if (inspect === undefined) continue;
        inspect(name, arrays.release(hidden));
        arrays.hold(hidden);
      }
      pass.begin(blocks.length, true);
      return runOutput(pass, call, hidden);
    });
    inspect?.(output2.name, output);
    return output;
  }

  // A block at a time ---------------------------------------------------------------------------------------

  get stages(): readonly Stage[] {
    const { blocks, output1, output2 } = this.parts;
    return [
      ...blocks.flatMap((block, index) =>
        [
          [block.timestep1],
          [block.timestep2],
          [block.modulation],
          [block.query, block.key, block.value],
          [block.attentionOutput],
          [block.feedForward1],
          [block.feedForward2],
        ].map((layers) => ({ block: index, layers }))
      ),
      { block: blocks.length, layers: [output1] },
      { block: blocks.length, layers: [output2] },
    ];
  }

  /** @throws {TypeError} on a model with time parameters, too */
  start({ samples, timesteps, labels }: ImageBatch): Float32Array<ArrayBuffer> {
    checkPlain(this);
    const batch = this.checkInput(samples, timesteps, labels);
    const hidden = new Float32Array(batch * tokensOf(this.config) * this.config.hiddenSize);
    embed(this.pass({}), samples, batch, hidden);
    return hidden;
  }

  runBlock(block: number, batch: ImageBatch, hidden: Float32Array<ArrayBuffer>, options: PassOptions): void {
    const pass = this.pass(options);
    embedTimesteps(pass, batch.timesteps);
    heldPass(this.kernels, hidden, () => {
      pass.begin(block);
      return runBlock(pass, block, batch, hidden);
    });
  }

  *stagesOf(
    block: number,
    batch: ImageBatch,
    hidden: Float32Array<ArrayBuffer>,
    options: PassOptions,
  ): StagedRun<Float32Array> {
    const pass = this.pass(options);
    embedTimesteps(pass, batch.timesteps);
    const isOutput = block === this.parts.blocks.length;
    const run = isOutput ? stagesOfOutput(pass, batch, hidden) : stagesOfBlock(pass, block, batch, hidden);
    return yield* heldStages(this.kernels, hidden, run, () => pass.begin(block));
  }

  finish(batch: ImageBatch, hidden: Float32Array, options: PassOptions): Float32Array {
    const pass = this.pass(options);
    embedTimesteps(pass, batch.timesteps);
    return heldPass(this.kernels, hidden, () => runOutput(pass, batch, hidden));
  }
}

export const DIT: ModelFamily<"dit", DitConfig, DitModel> = {
  kind: "dit",
  named: { key: "_class_name", value: "DiTTransformer2DModel" },
  keys: DIT_KEYS,
  config: ditConfig,
  tensors: ditTensors,
  model: (source, options) => new DitModel(source, options),
  forwardCost: ditForwardCost,
  hasGradients: true,
  gradientCost: ditGradientCost,
};

/** Loads a DiT. @throws as {@linkcode loadAs} */
export function loadDit(path: string, kernels: Kernels, options: LoadOptions = {}): DitModel {
  return loadAs(DIT, path, kernels, options);
}

function allFinite(values: Float32Array): boolean {
  for (let i = 0; i < values.length; i++) if (!Number.isFinite(values[i]!)) return false;
  return true;
}
