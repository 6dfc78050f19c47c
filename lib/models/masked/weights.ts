/** Weights of a masked transformer: their names in a checkpoint, their shapes, and reading them. */
import {
  type EmbeddingTable,
  type LinearLayer,
  type ModelTensors,
  wantedLinear,
  type WantedTensor,
} from "../layers/tensors.ts";
import type { MaskedTransformerConfig } from "./config.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A block's linear layers, in the order in which they run. */
const BLOCK_LINEARS = ["query", "key", "value", "attentionOutput", "gate", "up", "down"] as const;
type BlockLinear = typeof BLOCK_LINEARS[number];
type BlockNorm = "attentionNorm" | "feedForwardNorm";

/** One block's weights. */
export type TransformerBlock =
  & { readonly name: string }
  & Readonly<Record<BlockNorm, Floats>>
  & Readonly<Record<BlockLinear, LinearLayer>>;

/** The weights of a masked transformer. */
export interface TransformerParts {
  readonly embedding: EmbeddingTable;
  readonly blocks: readonly TransformerBlock[];
  readonly finalNorm: Floats;
  readonly head: LinearLayer;
}

/** Where a model's tensors are: names without `.weight` and `.bias`. */
export interface TransformerNames {
  readonly embedding: string;
  readonly finalNorm: string;
  readonly head: string;
  /** In front of a block's index. */
  readonly blocks: string;
  /** Behind a block's index. */
  readonly block: Readonly<Record<BlockNorm | BlockLinear, string>>;
  /** Query, key and value have a bias. */
  readonly queryKeyValueBias: boolean;
  /** Every other linear layer has one. */
  readonly otherBias: boolean;
}

/** Whether a linear layer of a block has a bias. */
function hasBias({ queryKeyValueBias, otherBias }: TransformerNames, part: BlockLinear): boolean {
  return part === "query" || part === "key" || part === "value" ? queryKeyValueBias : otherBias;
}

/** Every tensor of a model with these sizes. */
export function wantedTensors(config: MaskedTransformerConfig, names: TransformerNames): WantedTensor[] {
  const { hiddenSize, intermediateSize, vocabularySize, heads, keyValueHeads, headSize } = config;
  const width = heads * headSize, keyValueWidth = keyValueHeads * headSize;
  const shapes: Readonly<Record<BlockLinear, readonly [rows: number, cols: number]>> = {
    query: [width, hiddenSize],
    key: [keyValueWidth, hiddenSize],
    value: [keyValueWidth, hiddenSize],
    attentionOutput: [hiddenSize, width],
    gate: [intermediateSize, hiddenSize],
    up: [intermediateSize, hiddenSize],
    down: [hiddenSize, intermediateSize],
  };
  const norm = (name: string): WantedTensor => ({ name: `${name}.weight`, shape: [hiddenSize] });
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const prefix = `${names.blocks}.${i}`, { block } = names;
    return [
      norm(`${prefix}.${block.attentionNorm}`),
      norm(`${prefix}.${block.feedForwardNorm}`),
      ...BLOCK_LINEARS.flatMap((part) =>
        wantedLinear(`${prefix}.${block[part]}`, ...shapes[part], hasBias(names, part))
      ),
    ];
  });
  return [
    { name: `${names.embedding}.weight`, shape: [vocabularySize, hiddenSize] },
    ...blocks.flat(),
    norm(names.finalNorm),
    ...(config.tiesHead ? [] : wantedLinear(names.head, vocabularySize, hiddenSize, names.otherBias)),
  ];
}

/** Reads the weights. */
export function readTransformerParts(
  config: MaskedTransformerConfig,
  names: TransformerNames,
  tensors: ModelTensors,
): TransformerParts {
  const vector = (name: string) => tensors.vector(`${name}.weight`);
  const embedding = tensors.table(`${names.embedding}.weight`);
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const name = `${names.blocks}.${i}`;
    const linears = BLOCK_LINEARS.map((part) =>
      [part, tensors.linear(`${name}.${names.block[part]}`, hasBias(names, part))] as const
    );
    return {
      name,
      attentionNorm: vector(`${name}.${names.block.attentionNorm}`),
      feedForwardNorm: vector(`${name}.${names.block.feedForwardNorm}`),
      ...Object.fromEntries(linears) as Record<BlockLinear, LinearLayer>,
    };
  });
  return {
    embedding,
    blocks,
    finalNorm: vector(names.finalNorm),
    head: config.tiesHead ? { ...embedding, bias: undefined } : tensors.linear(names.head, names.otherBias),
  };
}
