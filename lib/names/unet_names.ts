/**
 * The two spellings of the UNet of Stable Diffusion 1, 2 and XL, whose stages have two blocks: that of the
 * original code (`input_blocks.4.1`) and that of diffusers (`down_blocks.1.attentions.0`).
 */

/** Blocks of a stage on the way down; a stage on the way up has one more. */
const BLOCKS = 2;

/** Parts of a residual block: original, diffusers. */
const PARTS: readonly (readonly [string, string])[] = [
  ["in_layers.0", "norm1"],
  ["in_layers.2", "conv1"],
  ["emb_layers.1", "time_emb_proj"],
  ["out_layers.0", "norm2"],
  ["out_layers.3", "conv2"],
  ["skip_connection", "conv_shortcut"],
];
const OUTSIDE: readonly (readonly [string, string])[] = [
  ["time_embed.0", "time_embedding.linear_1"],
  ["time_embed.2", "time_embedding.linear_2"],
  ["label_emb.0.0", "add_embedding.linear_1"],
  ["label_emb.0.2", "add_embedding.linear_2"],
  ["input_blocks.0.0", "conv_in"],
  ["out.0", "conv_norm_out"],
  ["out.2", "conv_out"],
];

const other = (pairs: typeof PARTS, name: string): string | undefined => {
  const pair = pairs.find((pair) => pair.includes(name));
  return pair?.[pair[0] === name ? 1 : 0];
};

/** Names of a module in the other spelling: one, or none where it is of no such UNet. */
export function unetNames(module: string): readonly string[] {
  const outside = other(OUTSIDE, module);
  if (outside !== undefined) return [outside];
  const found = toDiffusers(module) ?? toOriginal(module);
  return found === undefined ? [] : [found];
}

function toDiffusers(module: string): string | undefined {
  const [, side, first, second, rest] =
    /^(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.(.+)$/.exec(module) ?? [];
  if (side === undefined) return undefined;
  const stage = (count: number, index: number) => [Math.floor(index / count), index % count] as const;
  const part = (kind: string) => kind === "resnets" ? other(PARTS, rest!) : rest;
  const named = (block: string, kind: string, index: number) =>
    part(kind) === undefined ? undefined : `${block}.${kind}.${index}.${part(kind)}`;
  if (side === "middle_block") {
    const [, index, own] = /^middle_block\.(\d)\.(.+)$/.exec(module)!;
    if (index === "1") return `mid_block.attentions.0.${own}`;
    const inner = other(PARTS, own!);
    return inner && `mid_block.resnets.${index === "0" ? 0 : 1}.${inner}`;
  }
  if (second === undefined) return undefined;
  const isIn = side === "input_blocks", count = BLOCKS + 1;
  const [block, index] = stage(count, Number(first) - (isIn ? 1 : 0));
  const folder = `${isIn ? "down" : "up"}_blocks.${block}`;
  if (rest === "op") return `${folder}.downsamplers.0.conv`;
  if (rest === "conv") return `${folder}.upsamplers.0.conv`;
  return named(folder, second === "0" ? "resnets" : "attentions", index);
}

function toOriginal(module: string): string | undefined {
  const [, side, block, kind, index, rest] =
    /^(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)$/.exec(module) ?? [];
  if (side === undefined) return undefined;
  const inner = kind === "resnets" ? other(PARTS, rest!) : rest;
  if (inner === undefined) return undefined;
  if (side === "mid") return `middle_block.${kind === "attentions" ? 1 : 2 * Number(index)}.${inner}`;
  const at = Number(block) * (BLOCKS + 1) + Number(index);
  if (kind === "downsamplers") return `input_blocks.${(Number(block) + 1) * (BLOCKS + 1)}.0.op`;
  const sub = kind === "attentions" ? 1 : 0;
  return side === "down" ? `input_blocks.${at + 1}.${sub}.${inner}` : `output_blocks.${at}.${sub}.${inner}`;
}
