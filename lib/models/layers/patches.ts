/** Images as the patches that a diffusion transformer reads and writes. */
import { checkArray, checkCounts } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Sizes of images and of the square patches that a transformer sees them as. */
export interface PatchShape {
  readonly batch: number;
  readonly channels: number;
  readonly height: number;
  readonly width: number;
  /** Divides height and width. */
  readonly patch: number;
}

/**
 * Images to the rows that a patch embedding multiplies.
 *
 * **Shapes** `images: f32[batch, channels, height, width]` →
 * `f32[batch, height/patch, width/patch, channels, patch, patch]`. `out` must not be `images`.
 */
export function patchify(
  kernels: Kernels,
  images: Float32Array,
  shape: PatchShape,
  out: Floats = new Float32Array(images.length),
): Floats {
  const doing = "take images apart", { batch, channels, height, width, patch } = shape;
  checkPatches(doing, shape, { images, out });
  native.patchify(kernels, doing, images, batch, channels, height, width, patch, out);
  return out;
}

/**
 * Patches predicted by a diffusion transformer to images: channels last in a token, unlike in {@linkcode
 * patchify}.
 *
 * **Shapes** `tokens: f32[batch, height/patch, width/patch, patch, patch, channels]` →
 * `f32[batch, channels, height, width]`. `out` must not be `tokens`.
 */
export function unpatchify(
  kernels: Kernels,
  tokens: Float32Array,
  shape: PatchShape,
  out: Floats = new Float32Array(tokens.length),
): Floats {
  const doing = "put images together", { batch, channels, height, width, patch } = shape;
  checkPatches(doing, shape, { tokens, out });
  native.unpatchify(kernels, doing, tokens, batch, channels, height, width, patch, out);
  return out;
}

function checkPatches(
  doing: string,
  { batch, channels, height, width, patch }: PatchShape,
  arrays: Readonly<Record<string, Float32Array>>,
): void {
  checkCounts(doing, { batch, channels, height, width, patch });
  if (patch === 0 || height % patch !== 0 || width % patch !== 0) {
    throw new RangeError(`Cannot ${doing}: patch must divide ${height} × ${width} pixels, got ${patch}`);
  }
  for (const name in arrays) checkArray(doing, name, arrays[name], batch * channels * height * width);
}
