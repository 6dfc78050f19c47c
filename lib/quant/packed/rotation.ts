/**
 * Randomised Hadamard rotations of a layer's inputs (QuIP#, https://arxiv.org/abs/2402.04396; QuaRot,
 * https://arxiv.org/abs/2404.00456): `H = 1/√b · S D`, D random signs, S Sylvester's matrix of ±1 in blocks
 * of b columns. W x = (W Hᵀ)(H x), and W Hᵀ has no outliers. Plain TypeScript with float32 butterflies: the
 * same bytes on every machine.
 */

/** A rotation of a layer's inputs. */
export interface Rotation {
  readonly kind: "hadamard";
  /** Columns of a block, a power of two that divides the layer's columns. */
  readonly block: number;
  /** Seed of the signs, a whole number from 0 to 2³¹ − 1. */
  readonly seed: number;
}

/** Largest seed of a rotation. */
export const MAX_ROTATION_SEED = 2 ** 31 - 1;

/** Columns of the largest block: the largest power of two that divides a layer's columns. */
export function rotationBlock(cols: number): number {
  let block = 1;
  while (cols > 0 && cols % (block * 2) === 0) block *= 2;
  return block;
}

/** Sign change of column `k`: the lowest bit of MurmurHash3's finalizer of `seed + (k + 1) · 0x9E3779B9`. */
function isNegative(seed: number, k: number): boolean {
  let hash = (seed + Math.imul(k + 1, 0x9e3779b9)) >>> 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return ((hash ^ (hash >>> 16)) & 1) === 1;
}

const signs = new Map<string, Float32Array>();
/** Signs are made once: a layer runs often. Few pairs of seed and width are in use at once. */
function signsOf(seed: number, cols: number, block: number): Float32Array {
  const key = `${seed} ${cols} ${block}`;
  let found = signs.get(key);
  if (found === undefined) {
    const size = 1 / Math.sqrt(block);
    found = Float32Array.from({ length: cols }, (_, k) => isNegative(seed, k) ? -size : size);
    if (signs.size >= 64) signs.clear();
    signs.set(key, found);
  }
  return found;
}

/** Throws unless the rotation is one of so many columns. */
export function checkRotation(doing: string, { kind, block, seed }: Rotation, cols: number): void {
  if (kind !== "hadamard") {
    throw new RangeError(`Cannot ${doing}: rotation must be hadamard, got ${JSON.stringify(kind)}`);
  }
  const isPower = Number.isSafeInteger(block) && block >= 1 && Number.isInteger(Math.log2(block));
  if (!isPower || cols % block !== 0) {
    throw new RangeError(
      `Cannot ${doing}: a rotation's block must be a power of two that divides ${cols} columns, got ${block}`,
    );
  }
  if (!Number.isInteger(seed) || seed < 0 || seed > MAX_ROTATION_SEED) {
    throw new RangeError(
      `Cannot ${doing}: a rotation's seed must be a whole number from 0 to ${MAX_ROTATION_SEED}, got ${seed}`,
    );
  }
}

/**
 * Rotates rows in place: `x ← H x`, or with `inverse` `x ← Hᵀ x`, for every row.
 *
 * **Shapes** `rows: f32[n, cols]`
 *
 * @throws {TypeError | RangeError} when the rows or the rotation do not fit the columns
 */
export function rotateRows<T extends Float32Array>(
  rows: T,
  cols: number,
  rotation: Rotation,
  { inverse = false }: { readonly inverse?: boolean | undefined } = {},
): T {
  const doing = "rotate rows";
  checkRotation(doing, rotation, cols);
  if (!(rows instanceof Float32Array) || cols < 1 || rows.length % cols !== 0) {
    throw new TypeError(`Cannot ${doing}: they must be float32 rows of ${cols} columns, got ${rows?.length}`);
  }
  const { block, seed } = rotation, sign = signsOf(seed, cols, block);
  const applySigns = () => {
    for (let row = 0; row < rows.length; row += cols) {
      for (let k = 0; k < cols; k++) rows[row + k]! *= sign[k]!;
    }
  };
  if (!inverse) applySigns();
  for (let half = 1; half < block; half *= 2) {
    for (let start = 0; start < rows.length; start += 2 * half) {
      for (let i = start; i < start + half; i++) {
        const a = rows[i]!, b = rows[i + half]!;
        rows[i] = a + b;
        rows[i + half] = a - b;
      }
    }
  }
  if (inverse) applySigns();
  return rows;
}

/** `H M Hᵀ` in place, M any square matrix: second moments of inputs become those of rotated inputs. */
export function rotateMoment(moment: Float32Array, cols: number, rotation: Rotation): void {
  for (let side = 0; side < 2; side++) {
    rotateRows(moment, cols, rotation);
    for (let i = 0; i < cols; i++) {
      for (let j = 0; j < i; j++) {
        const value = moment[i * cols + j]!;
        moment[i * cols + j] = moment[j * cols + i]!;
        moment[j * cols + i] = value;
      }
    }
  }
}
