/** Settings of generation_config.json: those that are honoured, and the names of the others. */
import { DREAM_ALGORITHMS, type DreamAlgorithm } from "../masked/dream.ts";
import { MAX_STEPS } from "../masked/generation.ts";
import { type Remasking, REMASKINGS } from "../masked/llada.ts";
import { ConfigFields } from "../model_config.ts";
import { GENERATION_KEYS, unheededKeys } from "./keys.ts";

/** `max_length` of a transformers configuration in which nobody set it. */
const UNSET_LENGTH = 20;

/** Families of language models, by what generates from them. */
export type LanguageKind = keyof typeof GENERATION_KEYS;

/** Stored settings of generation; what is absent is left to the sampler. */
export interface StoredGeneration {
  readonly steps?: number | undefined;
  readonly temperature?: number | undefined;
  /** Tokens to write. */
  readonly newTokens?: number | undefined;
  /** Tokens of prompt and text together, where `newTokens` is not set. */
  readonly allTokens?: number | undefined;
  /** Order in which Dream or LLaDA fills masks. */
  readonly algorithm?: DreamAlgorithm | Remasking | undefined;
  readonly algorithmTemperature?: number | undefined;
  readonly eps?: number | undefined;
  readonly topP?: number | undefined;
  readonly topK?: number | undefined;
  readonly blockLength?: number | undefined;
  readonly guidance?: number | undefined;
  /** SDAR writes all proposals that are more probable. */
  readonly threshold?: number | undefined;
  /** Keys that ask for something and are not honoured. */
  readonly notHonoured: readonly string[];
}

/**
 * The settings of generation_config.json in a folder, none where it is missing.
 *
 * @throws {CheckpointError} naming the key that is wrong
 * @throws {FormatError} when the file is not JSON
 */
export function storedGeneration(folder: string, kind: LanguageKind): StoredGeneration {
  const fields = new ConfigFields(`${folder}/config.json`, {}).beside("generation_config.json");
  if (fields === undefined) return { notHonoured: [] };
  const count = (key: string, most?: number) => fields.optionalCount(key, 1, most);
  const notNegative = (key: string) => fields.optionalNumber(key, "a number ≥ 0", (value) => value >= 0);
  const newTokens = count("max_new_tokens"), allTokens = count("max_length");
  const isUnset = newTokens === undefined && allTokens === UNSET_LENGTH;
  const isDream = kind === "dream", isSdar = kind === "sdar", temperature = notNegative("temperature");
  const draws = fields.has("do_sample") ? fields.flag("do_sample", false) : undefined;
  const choose = <T extends string>(key: string, allowed: readonly T[]) =>
    fields.has(key) ? fields.choice(key, allowed) : undefined;
  return {
    steps: count("steps", MAX_STEPS),
    temperature,
    allTokens: newTokens === undefined && !isUnset ? allTokens : undefined,
    ...(isDream
      ? {
        algorithm: choose("alg", DREAM_ALGORITHMS),
        algorithmTemperature: notNegative("alg_temp"),
        eps: fields.optionalNumber("eps", "a number between 0 and 1", (value) => value > 0 && value < 1),
      }
      : {}),
    ...(isSdar ? { threshold: storedThreshold(fields) } : {}),
    ...(isDream || isSdar
      ? {
        newTokens,
        topP: fields.optionalNumber(
          "top_p",
          "a number above 0, at most 1",
          (value) => value > 0 && value <= 1,
        ),
        topK: fields.optionalCount("top_k") || undefined,
      }
      : {
        newTokens: newTokens ?? count("gen_length"),
        algorithm: choose("remasking", REMASKINGS),
        blockLength: count("block_length"),
        guidance: notNegative("cfg_scale"),
      }),
    notHonoured: [
      ...(isUnset ? ["max_length"] : []),
      ...(draws === undefined || draws === (temperature ?? 0) > 0 ? [] : ["do_sample"]),
      ...unheededKeys(fields, GENERATION_KEYS[kind]),
    ],
  };
}

/** The threshold of SDAR's dynamic strategy, undefined for the static one. */
function storedThreshold(fields: ConfigFields): number | undefined {
  const threshold = fields.optionalNumber(
    "confidence_threshold",
    "a number from 0 to 1",
    (value) => value >= 0 && value <= 1,
  );
  return fields.fields["remasking_strategy"] === "low_confidence_dynamic" ? threshold ?? 0.85 : undefined;
}
