/** Weights of a masked transformer: their names in a checkpoint, their shapes, and reading them. */
import {
  type EmbeddingTable,
  type LinearLayer,
  type ModelTensors,
  wantedLinear,
  type WantedTensor,
} from "../layers/tensors.ts";
import type { Pass } from "../layers/loaded_weights.ts";
import type { MaskedTransformerConfig } from "./config.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Linear layers of a block's attention and of a feed-forward, in the order in which they run. */
const ATTENTION = ["query", "key", "value", "attentionOutput"] as const;
const FEED_FORWARD = ["gate", "up", "down"] as const;
type Attention = Readonly<Record<typeof ATTENTION[number], LinearLayer>>;
type BlockNorm = "attentionNorm" | "feedForwardNorm";

/** A feed-forward: `down(silu(gate x) · up x)`. */
export type FeedForward = Readonly<Record<typeof FEED_FORWARD[number], LinearLayer>>;

/** A mixture of experts. */
export interface Mixture {
  readonly router: LinearLayer;
  /** `f32[experts]`, added to their weights. */
  readonly bias: Floats | undefined;
  readonly experts: readonly FeedForward[];
}

/** One block's weights. */
export type TransformerBlock =
  & { readonly name: string }
  & Readonly<Record<BlockNorm, Floats>>
  & Attention
  & {
    /** `f32[headSize]` each; undefined where heads are not normalized. */
    readonly queryNorm: Floats | undefined;
    readonly keyNorm: Floats | undefined;
    /** Of every token; undefined where there are experts alone. */
    readonly feedForward: FeedForward | undefined;
    readonly mixture: Mixture | undefined;
  };

/** The weights of a masked transformer. */
export interface TransformerParts {
  readonly embedding: EmbeddingTable;
  readonly blocks: readonly TransformerBlock[];
  readonly finalNorm: Floats;
  readonly head: LinearLayer;
}

/** What a forward pass runs on. */
export type TransformerPass = Pass<MaskedTransformerConfig, TransformerParts>;

/** Where the tensors of a mixture are. */
interface MixtureNames {
  readonly router: string;
  /** The whole name. */
  readonly bias: string;
  /** In front of an expert's index. */
  readonly experts: string;
  /** In front of the parts of the expert of every token. */
  readonly shared: string;
  /** Behind an expert's index. */
  readonly parts: Readonly<Record<keyof FeedForward, string>>;
}

/** Where a model's tensors are: names without `.weight` and `.bias`. */
export interface TransformerNames {
  readonly embedding: string;
  readonly finalNorm: string;
  readonly head: string;
  /** In front of a block's index. */
  readonly blocks: string;
  /** Behind a block's index. */
  readonly block: Readonly<Record<BlockNorm | keyof Attention | keyof FeedForward, string>>;
  /** Behind a block's index, of heads that are normalized. */
  readonly headNorms?: Readonly<Record<"queryNorm" | "keyNorm", string>> | undefined;
  /** Behind a block's index, of mixtures. */
  readonly mixture?: MixtureNames | undefined;
  /** Query, key and value have a bias. */
  readonly queryKeyValueBias: boolean;
  /** What attention gives goes through a layer with a bias; default as others. */
  readonly attentionOutputBias?: boolean | undefined;
  /** Every other linear layer has one. */
  readonly otherBias: boolean;
}

/** Whether a linear layer of attention has a bias. */
function hasBias(
  { queryKeyValueBias, otherBias, attentionOutputBias = otherBias }: TransformerNames,
  part: keyof Attention,
): boolean {
  return part === "attentionOutput" ? attentionOutputBias : queryKeyValueBias;
}

/** Whether a block has experts. */
const isMixed = ({ mixture }: MaskedTransformerConfig, block: number): boolean =>
  mixture !== undefined && !mixture.dense.includes(block);

/** Every tensor of a model with these sizes. */
export function wantedTensors(config: MaskedTransformerConfig, names: TransformerNames): WantedTensor[] {
  const { hiddenSize, vocabularySize, heads, keyValueHeads, headSize } = config;
  const width = heads * headSize, keyValueWidth = keyValueHeads * headSize;
  const shapes: Readonly<Record<keyof Attention, readonly [rows: number, cols: number]>> = {
    query: [width, hiddenSize],
    key: [keyValueWidth, hiddenSize],
    value: [keyValueWidth, hiddenSize],
    attentionOutput: [hiddenSize, width],
  };
  const norm = (name: string, size = hiddenSize): WantedTensor => ({ name: `${name}.weight`, shape: [size] });
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const prefix = `${names.blocks}.${i}`, { block, headNorms } = names;
    return [
      norm(`${prefix}.${block.attentionNorm}`),
      norm(`${prefix}.${block.feedForwardNorm}`),
      ...ATTENTION.flatMap((part) =>
        wantedLinear(`${prefix}.${block[part]}`, ...shapes[part], hasBias(names, part))
      ),
      ...(config.queryKeyNorm
        ? Object.values(headNorms!).map((name) => norm(`${prefix}.${name}`, headSize))
        : []),
      ...(isMixed(config, i) ? wantedMixture(config, names, prefix) : wantedFeedForward(
        config.intermediateSize,
        config,
        (part) => `${prefix}.${block[part]}`,
        names.otherBias,
      )),
    ];
  });
  return [
    { name: `${names.embedding}.weight`, shape: [vocabularySize, hiddenSize] },
    ...blocks.flat(),
    norm(names.finalNorm),
    ...(config.tiesHead ? [] : wantedLinear(names.head, vocabularySize, hiddenSize, names.otherBias)),
  ];
}

function wantedFeedForward(
  size: number,
  { hiddenSize }: MaskedTransformerConfig,
  nameOf: (part: keyof FeedForward) => string,
  bias: boolean,
): WantedTensor[] {
  return FEED_FORWARD.flatMap((part) =>
    wantedLinear(
      nameOf(part),
      ...(part === "down" ? [hiddenSize, size] : [size, hiddenSize]) as [number, number],
      bias,
    )
  );
}

function wantedMixture(
  config: MaskedTransformerConfig,
  names: TransformerNames,
  prefix: string,
): WantedTensor[] {
  const { experts, expertSize, sharedSize, hasBias } = config.mixture!;
  const { router, bias, experts: expertNames, shared, parts } = names.mixture!;
  return [
    ...wantedLinear(`${prefix}.${router}`, experts, config.hiddenSize, false),
    ...(hasBias ? [{ name: `${prefix}.${bias}`, shape: [experts] }] : []),
    ...Array.from(
      { length: experts },
      (_, e) =>
        wantedFeedForward(
          expertSize,
          config,
          (part) => `${prefix}.${expertNames}.${e}.${parts[part]}`,
          false,
        ),
    ).flat(),
    ...(sharedSize === 0
      ? []
      : wantedFeedForward(sharedSize, config, (part) => `${prefix}.${shared}.${parts[part]}`, false)),
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
  const feedForward = (nameOf: (part: keyof FeedForward) => string, bias: boolean): FeedForward => {
    const linears = FEED_FORWARD.map((part) => [part, tensors.linear(nameOf(part), bias)] as const);
    return Object.fromEntries(linears) as Record<keyof FeedForward, LinearLayer>;
  };
  const blocks = Array.from({ length: config.blocks }, (_, i): TransformerBlock => {
    const name = `${names.blocks}.${i}`, { block, headNorms, mixture } = names;
    const linears = ATTENTION.map((part) =>
      [part, tensors.linear(`${name}.${block[part]}`, hasBias(names, part))] as const
    );
    const mixed = isMixed(config, i) ? config.mixture : undefined;
    return {
      name,
      attentionNorm: vector(`${name}.${block.attentionNorm}`),
      feedForwardNorm: vector(`${name}.${block.feedForwardNorm}`),
      ...Object.fromEntries(linears) as Record<keyof Attention, LinearLayer>,
      queryNorm: config.queryKeyNorm ? vector(`${name}.${headNorms!.queryNorm}`) : undefined,
      keyNorm: config.queryKeyNorm ? vector(`${name}.${headNorms!.keyNorm}`) : undefined,
      feedForward: mixed === undefined
        ? feedForward((part) => `${name}.${block[part]}`, names.otherBias)
        : mixed.sharedSize > 0
        ? feedForward((part) => `${name}.${mixture!.shared}.${mixture!.parts[part]}`, false)
        : undefined,
      mixture: mixed && {
        router: tensors.linear(`${name}.${mixture!.router}`, false),
        bias: mixed.hasBias ? tensors.vector(`${name}.${mixture!.bias}`) : undefined,
        experts: Array.from(
          { length: mixed.experts },
          (_, e) => feedForward((part) => `${name}.${mixture!.experts}.${e}.${mixture!.parts[part]}`, false),
        ),
      },
    };
  });
  return {
    embedding,
    blocks,
    finalNorm: vector(names.finalNorm),
    head: config.tiesHead ? { ...embedding, bias: undefined } : tensors.linear(names.head, names.otherBias),
  };
}
