/** Synthetic sequences and images for evaluations of models without data of their own. */
import { type DitModel, imageNoise, type MaskedTransformer, RandomStream } from "../../models/mod.ts";
import type { LabelledImages } from "../../eval/images.ts";
import { type MaskedSequence, PUZZLE_TOKENS } from "../../eval/puzzles.ts";

/**
 * Sequences of random tokens, some masked, for a model without data of its own: layout and mask ratios as
 * {@linkcode maskedSequences}, tokens without meaning.
 */
export function syntheticSequences(model: MaskedTransformer, count: number, seed: number): MaskedSequence[] {
  const { vocabularySize, maskToken, padToken = -1, maxTokens } = model.config;
  const length = Math.min(PUZZLE_TOKENS, maxTokens);
  return Array.from({ length: count }, (_, i): MaskedSequence => {
    const random = new RandomStream(seed, i);
    const maskRatio = 0.001 + 0.999 * random.uniform();
    const places: number[] = [], targets: number[] = [];
    const tokens = Int32Array.from({ length }, (_, place) => {
      let token = maskToken;
      while (token === maskToken || token === padToken) token = random.below(vocabularySize);
      if (place === 0 || random.uniform() >= maskRatio) return token;
      places.push(place);
      targets.push(token);
      return maskToken;
    });
    return { task: "synthetic", maskRatio, tokens, places, targets };
  }).filter(({ places }) => places.length > 0);
}

/** Pure noise in place of images, all classes in turn. */
export function syntheticImages(model: DitModel, count: number, seed: number): LabelledImages {
  return {
    images: imageNoise(seed, 0, count, model.imageElements),
    labels: Int32Array.from({ length: count }, (_, i) => i % model.config.classes),
  };
}
