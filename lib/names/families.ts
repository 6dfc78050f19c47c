/**
 * Families of models whose names are known, one table: how each is told, and whether it runs here. What the
 * rules of lib/plan keep of each, and by what measurement, is in docs/models.md.
 */
import { imageModel } from "./image_names.ts";

/** A family. */
export interface Family {
  readonly name: string;
  /** `model_type`, `_class_name` or a name of `architectures`. */
  readonly classes: RegExp;
  /** Tensors by which it is told without config.json: all of a list; image models are in their table. */
  readonly tensors?: readonly (readonly string[])[] | undefined;
  /** It runs, is calibrated and is generated from here. */
  readonly runs: boolean;
}

/** Every family; the first that fits counts. Names of image models are those of their table of names. */
export const FAMILIES: readonly Family[] = [
  { name: "Dream", classes: /^dream(?:model)?$/i, runs: true },
  { name: "LLaDA-MoE", classes: /^llada[-_]?moe(?:model)?/i, runs: true },
  { name: "LLaDA2", classes: /^llada2/i, runs: false },
  { name: "LLaDA", classes: /^llada(?:model(?:lm)?)?$/i, runs: true },
  { name: "SDAR", classes: /^sdar(?:forcausallm)?$/i, runs: true },
  { name: "SDAR-MoE", classes: /^sdar_?moe/i, runs: false },
  { name: "DiffusionGemma", classes: /^diffusion_?gemma/i, runs: false },
  {
    name: "DiT",
    classes: /^DiTTransformer2DModel$/,
    tensors: [["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", "proj_out_1.weight"]],
    runs: true,
  },
  {
    name: "PixArt",
    classes: /^PixArtTransformer2DModel$/,
    tensors: [
      [
        "adaln_single.emb.timestep_embedder.linear_1.weight",
        "caption_projection.linear_1.weight",
        "pos_embed.proj.weight",
      ],
      ["t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight"],
    ],
    runs: false,
  },
  { name: "FLUX.1, FLUX.2 and Chroma", classes: /^(?:Flux2?|Chroma)Transformer2DModel$/, runs: false },
  { name: "Stable Diffusion 3", classes: /^SD3Transformer2DModel$/, runs: false },
  { name: "Qwen-Image", classes: /^QwenImageTransformer2DModel$/, runs: false },
  { name: "Wan", classes: /^Wan(?:VACE)?Transformer3DModel$/, runs: false },
  { name: "Lumina 2 and Z-Image", classes: /^(?:Lumina2|ZImage)Transformer2DModel$/, runs: false },
  { name: "LTX-Video", classes: /^LTXVideoTransformer3DModel$/, runs: false },
  { name: "HunyuanVideo", classes: /^HunyuanVideoTransformer3DModel$/, runs: false },
  { name: "AuraFlow", classes: /^AuraFlowTransformer2DModel$/, runs: false },
  { name: "HiDream-I1", classes: /^HiDreamImageTransformer2DModel$/, runs: false },
  { name: "Cosmos-Predict2", classes: /^CosmosTransformer3DModel$/, runs: false },
  { name: "Stable Diffusion XL", classes: /^UNet2DConditionModel$/, runs: false },
  { name: "Stable Diffusion 1 and 2", classes: /^UNet2DConditionModel$/, runs: false },
];

/** What checkpoints of whole pipelines put in front of the names of one model. */
const IN_FRONT = ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet."];

/** The family of a checkpoint, by its tensors' names or its config.json; undefined where it is not known. */
export function familyOf(
  names: readonly string[],
  config: Readonly<Record<string, unknown>> | undefined,
): Family | undefined {
  const image = imageModel(names);
  if (image !== undefined) return FAMILIES.find(({ name }) => name === image.family.name);
  const all = new Set(names);
  const { model_type: type, _class_name: className, architectures } = config ?? {};
  const classes = [
    ...(Array.isArray(architectures) ? architectures : []),
    className,
    type,
  ].filter((name) => typeof name === "string");
  return FAMILIES.find((family) =>
    classes.some((name) => family.classes.test(name)) ||
    (family.tensors ?? []).some((list) =>
      IN_FRONT.some((prefix) => list.every((name) => all.has(prefix + name)))
    )
  );
}
