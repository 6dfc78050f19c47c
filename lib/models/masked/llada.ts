/**
 * LLaDA: a masked diffusion language model (https://github.com/ML-GSAI/LLaDA) over the same transformer as Dream, with names and
 * configuration of its own, no shift of the logits, and generation block after block.
 */
import { CheckpointError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { type Checkpoint, openCheckpoint } from "../../tensor/mod.ts";
import {
  checkChoice,
  checkCount,
  checkNotNegative,
  checkTokens,
  type Generation,
  type GenerationStep,
  runGeneration,
  type TraceOptions,
} from "./generation.ts";
import {
  MaskedTransformer,
  type MaskedTransformerConfig,
  type TransformerNames,
  wantedTensors,
} from "./transformer.ts";
import { ConfigFields, MAX_BLOCKS, shown } from "../layers/model_config.ts";
import { RandomStream } from "../random.ts";
import { type LoadOptions, ModelTensors, type TensorList } from "../layers/tensors.ts";
import {
  checkSamplingOptions,
  indexOfLargest,
  selectMostConfident,
  softmaxInPlace,
} from "./token_sampling.ts";

function names(queryKeyValueBias: boolean, otherBias: boolean): TransformerNames {
  return {
    embedding: "model.transformer.wte",
    finalNorm: "model.transformer.ln_f",
    head: "model.transformer.ff_out",
    queryKeyValueBias,
    otherBias,
    block: (index) => {
      const prefix = `model.transformer.blocks.${index}`;
      return {
        attentionNorm: `${prefix}.attn_norm`,
        query: `${prefix}.q_proj`,
        key: `${prefix}.k_proj`,
        value: `${prefix}.v_proj`,
        attentionOutput: `${prefix}.attn_out`,
        feedForwardNorm: `${prefix}.ff_norm`,
        gate: `${prefix}.ff_proj`,
        up: `${prefix}.up_proj`,
        down: `${prefix}.ff_out`,
      };
    },
  };
}

/** LLaDA's sizes out of config.json. @throws {CheckpointError} naming the key that is missing, wrong or not supported */
export function lladaConfig(fields: ConfigFields): MaskedTransformerConfig {
  fields.choice("block_type", ["llama"], "llama");
  fields.choice("layer_norm_type", ["rms"], "rms");
  fields.choice("activation_type", ["silu", "swiglu"], "silu");
  fields.refuse("alibi", false);
  fields.refuse("rope", true);
  fields.refuse("attention_layer_norm", false);
  fields.refuse("bias_for_layer_norm", false);
  fields.refuse("layer_norm_with_affine", true);
  fields.refuse("clip_qkv");
  fields.refuse("block_group_size", 1);
  const vocabularySize = fields.count("embedding_size", fields.count("vocab_size"));
  const hiddenSize = fields.count("d_model"), heads = fields.count("n_heads");
  const keyValueHeads = fields.count("n_kv_heads", fields.flag("multi_query_attention", false) ? 1 : heads);
  if (heads % keyValueHeads !== 0) {
    throw fields.fault("n_kv_heads", `a divisor of ${heads} heads`, keyValueHeads);
  }
  if (hiddenSize % (2 * heads) !== 0) {
    throw fields.fault("d_model", `a multiple of 2 · ${heads} heads, for rotary positions`, hiddenSize);
  }
  const maskToken = fields.token("mask_token_id", vocabularySize);
  if (maskToken === undefined) throw fields.fault("mask_token_id", `a token from 0 to ${vocabularySize - 1}`);
  return {
    vocabularySize,
    hiddenSize,
    intermediateSize: fields.count("mlp_hidden_size", fields.count("mlp_ratio", 4) * hiddenSize),
    blocks: fields.count("n_layers", undefined, 1, MAX_BLOCKS),
    heads,
    keyValueHeads,
    headSize: hiddenSize / heads,
    maxTokens: fields.count("max_sequence_length"),
    normEpsilon: fields.positive("rms_norm_eps", 1e-5),
    rotaryTheta: fields.positive("rope_theta", 10_000),
    logitShift: 0,
    tiesHead: fields.flag("weight_tying", false),
    logitScale: fields.flag("scale_logits", false) ? 1 / Math.sqrt(hiddenSize) : 1,
    embeddingScale: fields.flag("input_emb_norm", false) ? Math.sqrt(hiddenSize) : 1,
    maskToken,
    padToken: fields.token("pad_token_id", vocabularySize),
    bosToken: fields.token("bos_token_id", vocabularySize),
    eosToken: fields.token("eos_token_id", vocabularySize),
  };
}

/** A LLaDA model out of an open checkpoint, full precision or packed. @throws as {@linkcode loadLlada} */
export function lladaFrom(
  checkpoint: Checkpoint,
  kernels: Kernels,
  options: LoadOptions = {},
): MaskedTransformer {
  if (checkpoint.kind !== "llada") {
    throw new CheckpointError(
      `Cannot load ${shown(checkpoint.path)}: model_type must be "llada", got ${
        shown(checkpoint.config?.["model_type"])
      }`,
      { path: checkpoint.path },
    );
  }
  const fields = ConfigFields.of(checkpoint);
  const config = lladaConfig(fields);
  const tensors = new ModelTensors(checkpoint, kernels, lladaTensors(fields, config), options);
  return new MaskedTransformer(checkpoint.path, config, kernels, tensors, namesOf(fields), options);
}

function namesOf(fields: ConfigFields): TransformerNames {
  const otherBias = fields.flag("include_bias", false);
  return names(otherBias || fields.flag("include_qkv_bias", false), otherBias);
}

/** What a LLaDA model of this configuration has. */
export function lladaTensors(fields: ConfigFields, config: MaskedTransformerConfig): TensorList {
  return {
    wanted: wantedTensors(config, namesOf(fields)),
    ignored: config.tiesHead ? [/^model\.transformer\.ff_out\.weight$/] : [],
  };
}

/**
 * Loads a LLaDA model, full precision or packed. Weights stay as they are stored.
 *
 * @throws {CheckpointError} when config.json or the tensors are not a LLaDA model's: everything missing or in excess is listed
 * @throws {FormatError} when a file is not what its format promises
 */
export function loadLlada(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  using checkpoint = openCheckpoint(path);
  return lladaFrom(checkpoint, kernels, options);
}

/** Which proposals are kept: the most probable, or any. */
export type Remasking = "low_confidence" | "random";
export const REMASKINGS: readonly Remasking[] = ["low_confidence", "random"];

export interface LladaGenerationOptions {
  /** Tokens to generate. Default 128. */
  readonly generationLength?: number | undefined;
  /** Tokens of a block; a block is finished before the next begins. Default: all at once. */
  readonly blockLength?: number | undefined;
  /** Steps of the whole generation, a multiple of the number of blocks. Default: one a token. */
  readonly steps?: number | undefined;
  /** Of Gumbel noise on the proposals; 0 takes the most probable. Default 0. */
  readonly temperature?: number | undefined;
  /** Guidance: logits = none + (scale + 1) · (prompt − none), none being the logits with the prompt masked. Default 0. */
  readonly guidance?: number | undefined;
  /** Default `low_confidence`. */
  readonly remasking?: Remasking | undefined;
  /** Tokens never proposed. Default: the mask, so that nothing stays masked. */
  readonly excludedTokens?: readonly number[] | undefined;
  /** Default 0. */
  readonly seed?: number | undefined;
  /** Number of the first sequence's stream of random numbers. Default 0. */
  readonly firstStream?: number | undefined;
}

/**
 * Continues prompts as LLaDA's `generate` does, one step a turn: first the prompts with their masks, then what each step left.
 *
 * **Shapes** `prompts: i32[batch, tokens]` → `i32[batch, tokens + generationLength]`
 *
 * @throws {RangeError | TypeError} when an option or the prompts are not allowed, before any work
 * @throws {WeightsError} as {@linkcode MaskedTransformer.forward}
 */
export function* lladaSteps(
  model: MaskedTransformer,
  prompts: Int32Array,
  batch: number,
  options: LladaGenerationOptions = {},
): Generator<GenerationStep, Int32Array> {
  const { maskToken, vocabularySize } = model.config;
  const { generationLength = 128, temperature = 0, guidance = 0, remasking = "low_confidence", seed = 0 } =
    options;
  const { blockLength = generationLength, steps = generationLength, firstStream = 0 } = options;
  const { excludedTokens = [maskToken] } = options;
  checkCount("generationLength", generationLength, 1);
  checkCount("blockLength", blockLength, 1);
  checkCount("steps", steps, 1);
  checkNotNegative("guidance", guidance);
  checkChoice("remasking", remasking, REMASKINGS);
  checkSamplingOptions("generate", { temperature, excludedTokens }, vocabularySize);
  const promptTokens = checkTokens(model, "prompts", prompts, batch, generationLength);
  const tokens = promptTokens + generationLength;
  if (generationLength % blockLength !== 0) {
    throw new RangeError(
      `Cannot generate: blockLength must divide ${generationLength} tokens, got ${blockLength}`,
    );
  }
  const blocks = generationLength / blockLength;
  if (steps % blocks !== 0) {
    throw new RangeError(`Cannot generate: steps must be a multiple of ${blocks} blocks, got ${steps}`);
  }
  const x = new Int32Array(batch * tokens).fill(maskToken);
  for (let b = 0; b < batch; b++) {
    x.set(prompts.subarray(b * promptTokens, (b + 1) * promptTokens), b * tokens);
  }
  const unconditional = x.map((token) => guidance > 0 ? maskToken : token);
  const randoms = Array.from({ length: batch }, (_, b) => new RandomStream(seed, firstStream + b));
  const values = new Float64Array(vocabularySize);
  const masks = () => x.reduce((sum, token) => sum + (token === maskToken ? 1 : 0), 0);
  const timeOf = (step: number) => 1 - step / steps;
  const state = (step: number): GenerationStep => ({
    step,
    steps,
    time: timeOf(step),
    sequences: x,
    masks: masks(),
  });

  yield state(0);
  const stepsPerBlock = steps / blocks;
  for (let step = 0; step < steps; step++) {
    const block = Math.floor(step / stepsPerBlock), stepOfBlock = step % stepsPerBlock;
    const begin = promptTokens + block * blockLength;
    const masked = Array.from({ length: batch }, (_, b) => {
      const places: number[] = [];
      for (let i = b * tokens + begin; i < b * tokens + begin + blockLength; i++) {
        if (x[i] === maskToken) places.push(i);
      }
      return places;
    });
    const rows = Int32Array.from(masked.flat(), (place) => model.logitRow(place, tokens));
    if (rows.length > 0) {
      const t = timeOf(step);
      const logits = guidance > 0
        ? guidedLogits(model, x, unconditional, batch, rows, promptTokens, guidance, t)
        : model.forward(x, batch, { rows, t });
      let row = 0;
      for (const [b, places] of masked.entries()) {
        const random = randoms[b]!;
        const proposals = places.map(() => {
          values.set(logits.subarray(row * vocabularySize, (row + 1) * vocabularySize));
          row++;
          for (const token of excludedTokens) values[token] = -Infinity;
          const token = temperature > 0 ? gumbelChoice(values, temperature, random) : indexOfLargest(values);
          if (remasking === "random") return { token, confidence: random.uniform() };
          softmaxInPlace(values);
          return { token, confidence: values[token]! };
        });
        // The masks left are spread over the steps left as evenly as whole numbers allow, larger shares first.
        const left = stepsPerBlock - stepOfBlock;
        const wanted = Math.ceil(places.length / left);
        const confidences = proposals.map(({ confidence }) => confidence);
        for (const i of selectMostConfident(confidences, wanted, 0, random)) {
          x[places[i]!] = proposals[i]!.token;
        }
      }
    }
    yield state(step + 1);
  }
  return x;
}

/** none + (scale + 1) · (prompt − none) */
function guidedLogits(
  model: MaskedTransformer,
  x: Int32Array,
  unconditional: Int32Array,
  batch: number,
  rows: Int32Array,
  promptTokens: number,
  guidance: number,
  t: number,
): Float32Array {
  const tokens = x.length / batch;
  const both = new Int32Array(2 * x.length);
  both.set(x);
  for (let i = 0; i < x.length; i++) {
    both[x.length + i] = i % tokens < promptTokens ? unconditional[i]! : x[i]!;
  }
  const bothRows = new Int32Array(2 * rows.length);
  bothRows.set(rows);
  bothRows.set(rows.map((row) => row + x.length), rows.length);
  const logits = model.forward(both, 2 * batch, { rows: bothRows, t });
  const half = logits.length / 2;
  for (let i = 0; i < half; i++) {
    const none = logits[half + i]!;
    logits[i] = none + (guidance + 1) * (logits[i]! - none);
  }
  return logits.subarray(0, half);
}

/** Argmax of `exp(logit) / (−log u)^temperature`, as LLaDA draws, in logarithms. */
function gumbelChoice(logits: Float64Array, temperature: number, random: RandomStream): number {
  let best = 0, largest = -Infinity;
  for (let i = 0; i < logits.length; i++) {
    const key = logits[i]! - temperature * Math.log(-Math.log(random.uniform()));
    if (key > largest) [best, largest] = [i, key];
  }
  return best;
}

/** Continues prompts; {@linkcode lladaSteps} with a callback instead of turns. */
export function lladaGenerate(
  model: MaskedTransformer,
  prompts: Int32Array,
  batch: number,
  options: LladaGenerationOptions & TraceOptions = {},
): Generation {
  return runGeneration(lladaSteps(model, prompts, batch, options), options);
}
