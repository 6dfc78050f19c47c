/** Weights of a DiT: their names in a checkpoint, their shapes, and reading them. */
import {
  type EmbeddingTable,
  type LinearLayer,
  type ModelTensors,
  type TensorList,
  wantedLinear,
} from "../layers/tensors.ts";
import { type DitConfig, TIMESTEP_CHANNELS } from "./config.ts";

type Floats = Float32Array<ArrayBuffer>;

/** One block's weights. */
export interface DitBlock extends Readonly<Record<BlockLinear, LinearLayer>> {
  readonly name: string;
  readonly labels: EmbeddingTable;
  readonly normWeight: Floats | undefined;
  readonly normBias: Floats | undefined;
}

/** The weights of a DiT, and the embedding of its positions. */
export interface DitParts {
  readonly patch: LinearLayer;
  /** `f32[tokens, width]` */
  readonly positions: Floats;
  readonly blocks: readonly DitBlock[];
  readonly output1: LinearLayer;
  readonly output2: LinearLayer;
}

type BlockLinear =
  | ("timestep1" | "timestep2" | "modulation")
  | ("query" | "key" | "value" | "attentionOutput")
  | ("feedForward1" | "feedForward2");

const blockName = (index: number) => `transformer_blocks.${index}`;
const LABELS = "norm1.emb.class_embedder.embedding_table.weight";

/** A block's linear layers: name behind that of the block, sizes, whether there is a bias. */
function blockLinears(
  { hiddenSize: width, attentionBias }: DitConfig,
): Readonly<Record<BlockLinear, readonly [name: string, rows: number, cols: number, bias: boolean]>> {
  return {
    timestep1: ["norm1.emb.timestep_embedder.linear_1", width, TIMESTEP_CHANNELS, true],
    timestep2: ["norm1.emb.timestep_embedder.linear_2", width, width, true],
    modulation: ["norm1.linear", 6 * width, width, true],
    query: ["attn1.to_q", width, width, attentionBias],
    key: ["attn1.to_k", width, width, attentionBias],
    value: ["attn1.to_v", width, width, attentionBias],
    attentionOutput: ["attn1.to_out.0", width, width, true],
    feedForward1: ["ff.net.0.proj", 4 * width, width, true],
    feedForward2: ["ff.net.2", width, 4 * width, true],
  };
}

/** Every tensor of a DiT of these sizes. */
export function ditTensors(config: DitConfig): TensorList {
  const { hiddenSize: width, patchSize, channels, outputChannels, classes } = config;
  const linears = Object.values(blockLinears(config));
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const prefix = blockName(i), norms = config.normHasWeights ? ["weight", "bias"] : [];
    return [
      ...linears.flatMap(([name, ...shape]) => wantedLinear(`${prefix}.${name}`, ...shape)),
      { name: `${prefix}.${LABELS}`, shape: [classes + 1, width] },
      ...norms.map((part) => ({ name: `${prefix}.norm3.${part}`, shape: [width] })),
    ];
  });
  const wanted = [
    { name: "pos_embed.proj.weight", shape: [width, channels, patchSize, patchSize] },
    { name: "pos_embed.proj.bias", shape: [width] },
    ...blocks.flat(),
    ...wantedLinear("proj_out_1", 2 * width, width, true),
    ...wantedLinear("proj_out_2", patchSize * patchSize * outputChannels, width, true),
  ];
  return { wanted, ignored: [/^pos_embed\.pos_embed$/] };
}

/** Reads the weights. */
export function readDitParts(config: DitConfig, tensors: ModelTensors): DitParts {
  const linears = Object.entries(blockLinears(config)), { normHasWeights } = config;
  return {
    patch: tensors.linear("pos_embed.proj", true),
    positions: positionEmbedding(config.sampleSize / config.patchSize, config.hiddenSize),
    blocks: Array.from({ length: config.blocks }, (_, i) => {
      const name = blockName(i);
      const layers = linears.map(([part, [own, , , bias]]) =>
        [part, tensors.linear(`${name}.${own}`, bias)] as const
      );
      return {
        name,
        labels: tensors.table(`${name}.${LABELS}`),
        normWeight: normHasWeights ? tensors.vector(`${name}.norm3.weight`) : undefined,
        normBias: normHasWeights ? tensors.vector(`${name}.norm3.bias`) : undefined,
        ...Object.fromEntries(layers) as Record<BlockLinear, LinearLayer>,
      };
    }),
    output1: tensors.linear("proj_out_1", true),
    output2: tensors.linear("proj_out_2", true),
  };
}

/** diffusers' 2-D sine-cosine positions: first half of a row for the column, second for the row. */
function positionEmbedding(side: number, width: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(side * side * width);
  const half = width / 2, quarter = width / 4;
  const wave = (position: number, at: number) => {
    for (let i = 0; i < quarter; i++) {
      const angle = position / 10_000 ** (i / quarter);
      out[at + i] = Math.sin(angle);
      out[at + quarter + i] = Math.cos(angle);
    }
  };
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      wave(x, (y * side + x) * width);
      wave(y, (y * side + x) * width + half);
    }
  }
  return out;
}
