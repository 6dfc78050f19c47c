/**
 * Values of ggml's blocks, bit for bit as `dequantize_row_*` gives them: every product of a half and a code
 * is exact in float32, so that only a store rounds.
 */

/** Writes the values of the block at `o` of `b` to `y` from `at` on. */
type Decode = (b: Uint8Array, o: number, y: Float32Array, at: number) => void;

const HALVES = Float32Array.from(
  new Float16Array(Uint16Array.from({ length: 2 ** 16 }, (_, bits) => bits).buffer),
);
const half = (b: Uint8Array, o: number): number => HALVES[b[o]! | b[o + 1]! << 8]!;
const signed = (byte: number): number => byte << 24 >> 24;

/** Blocks of 32 weights with `bytes` bytes in front of the codes: low nibbles first, then the high ones. */
const nibbles =
  (bytes: number, value: (b: Uint8Array, o: number) => (code: number, j: number) => number): Decode =>
  (b, o, y, at) => {
    const of = value(b, o), codes = o + bytes;
    for (let j = 0; j < 16; j++) {
      y[at + j] = of(b[codes + j]! & 15, j);
      y[at + 16 + j] = of(b[codes + j]! >> 4, j + 16);
    }
  };

/** The fifth bit of 32 codes. */
const fifth = (b: Uint8Array, o: number, j: number): number => (b[o + (j >> 3)]! >> (j & 7) & 1) << 4;

/** Sub-scale `j` and sub-minimum `j` of Q4_K and Q5_K: six bits each, in 12 bytes. */
function sixBits(b: Uint8Array, o: number, j: number, shift: 0 | 4): number {
  const first = shift === 0 ? b[o + j % 4]! : b[o + 4 + j % 4]!;
  return j < 4 ? first & 63 : b[o + 4 + j]! >> shift & 15 | first >> 6 << 4;
}

const IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const FP4_VALUES = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/** Half the value of an unsigned float8 of four bits of exponent and three of mantissa. */
function ue4m3(code: number): number {
  const exponent = code >> 3 & 15, mantissa = code & 7;
  if (code === 0 || code === 127) return 0;
  return exponent === 0 ? mantissa * 2 ** -10 : (1 + mantissa / 8) * 2 ** (exponent - 8);
}

/** Decoders by the name of the type. Types with code books (IQ1, IQ2, IQ3) have none. */
export const DECODERS: Readonly<Record<string, Decode>> = {
  Q4_0: nibbles(2, (b, o) => {
    const d = half(b, o);
    return (q) => d * (q - 8);
  }),
  Q4_1: nibbles(4, (b, o) => {
    const d = half(b, o), m = half(b, o + 2);
    return (q) => d * q + m;
  }),
  Q5_0: nibbles(6, (b, o) => {
    const d = half(b, o);
    return (q, j) => d * ((q | fifth(b, o + 2, j)) - 16);
  }),
  Q5_1: nibbles(8, (b, o) => {
    const d = half(b, o), m = half(b, o + 2);
    return (q, j) => d * (q | fifth(b, o + 4, j)) + m;
  }),
  IQ4_NL: nibbles(2, (b, o) => {
    const d = half(b, o);
    return (q) => d * IQ4_VALUES[q]!;
  }),
  MXFP4: nibbles(1, (b, o) => {
    const d = 2 ** (b[o]! - 128);
    return (q) => d * FP4_VALUES[q]!;
  }),
  Q8_0: (b, o, y, at) => {
    const d = half(b, o);
    for (let j = 0; j < 32; j++) y[at + j] = d * signed(b[o + 2 + j]!);
  },
  Q1_0: (b, o, y, at) => {
    const d = half(b, o);
    for (let j = 0; j < 128; j++) y[at + j] = (b[o + 2 + (j >> 3)]! >> (j & 7) & 1) === 1 ? d : -d;
  },
  Q2_0: (b, o, y, at) => {
    const d = half(b, o);
    for (let j = 0; j < 64; j++) y[at + j] = d * ((b[o + 2 + (j >> 2)]! >> 2 * (j & 3) & 3) - 1);
  },
  Q2_K: (b, o, y, at) => {
    const d = half(b, o + 80), min = half(b, o + 82);
    for (let i = 0; i < 256; i++) {
      const scales = b[o + (i >> 4)]!;
      const q = b[o + 16 + (i >> 7) * 32 + (i & 31)]! >> 2 * (i >> 5 & 3) & 3;
      y[at + i] = d * (scales & 15) * q - min * (scales >> 4);
    }
  },
  Q3_K: (b, o, y, at) => {
    const d = half(b, o + 108), scales = o + 96;
    for (let i = 0; i < 256; i++) {
      const s = i >> 4, low = b[scales + (s & 7)]! >> (s < 8 ? 0 : 4) & 15;
      const scale = (low | (b[scales + 8 + (s & 3)]! >> 2 * (s >> 2) & 3) << 4) - 32;
      const q = b[o + 32 + (i >> 7) * 32 + (i & 31)]! >> 2 * (i >> 5 & 3) & 3;
      y[at + i] = d * scale * (q - (b[o + (i & 31)]! >> (i >> 5) & 1 ? 0 : 4));
    }
  },
  Q4_K: (b, o, y, at) => {
    const d = half(b, o), min = half(b, o + 2);
    for (let s = 0; s < 8; s++) {
      const scale = d * sixBits(b, o + 4, s, 0), offset = min * sixBits(b, o + 4, s, 4);
      const codes = o + 16 + (s >> 1) * 32, shift = 4 * (s & 1);
      for (let j = 0; j < 32; j++) y[at + 32 * s + j] = scale * (b[codes + j]! >> shift & 15) - offset;
    }
  },
  Q5_K: (b, o, y, at) => {
    const d = half(b, o), min = half(b, o + 2);
    for (let s = 0; s < 8; s++) {
      const scale = d * sixBits(b, o + 4, s, 0), offset = min * sixBits(b, o + 4, s, 4);
      const codes = o + 48 + (s >> 1) * 32, shift = 4 * (s & 1);
      for (let j = 0; j < 32; j++) {
        const q = b[codes + j]! >> shift & 15 | (b[o + 16 + j]! >> s & 1) << 4;
        y[at + 32 * s + j] = scale * q - offset;
      }
    }
  },
  Q6_K: (b, o, y, at) => {
    const d = half(b, o + 208);
    for (let i = 0; i < 256; i++) {
      const n = i >> 7, part = i >> 5 & 3, l = i & 31;
      const low = b[o + 64 * n + 32 * (part & 1) + l]! >> 4 * (part >> 1) & 15;
      const q = (low | (b[o + 128 + 32 * n + l]! >> 2 * part & 3) << 4) - 32;
      y[at + i] = d * signed(b[o + 192 + (i >> 4)]!) * q;
    }
  },
  IQ4_XS: (b, o, y, at) => {
    const d = half(b, o), high = b[o + 2]! | b[o + 3]! << 8;
    for (let s = 0; s < 8; s++) {
      const scale = d * ((b[o + 4 + (s >> 1)]! >> 4 * (s & 1) & 15 | (high >> 2 * s & 3) << 4) - 32);
      for (let j = 0; j < 16; j++) {
        const byte = b[o + 8 + 16 * s + j]!;
        y[at + 32 * s + j] = scale * IQ4_VALUES[byte & 15]!;
        y[at + 32 * s + 16 + j] = scale * IQ4_VALUES[byte >> 4]!;
      }
    }
  },
  TQ1_0: (b, o, y, at) => {
    const d = half(b, o + 52);
    // five digits of base three a byte: of 32 bytes, of 16, and four digits of 4
    for (const [from, bytes, digits] of [[0, 32, 5], [32, 16, 5], [48, 4, 4]] as const) {
      for (let n = 0; n < digits; n++) {
        for (let m = 0; m < bytes; m++) y[at++] = d * (((b[o + from + m]! * 3 ** n & 255) * 3 >> 8) - 1);
      }
    }
  },
  TQ2_0: (b, o, y, at) => {
    const d = half(b, o + 64);
    for (let i = 0; i < 256; i++) {
      y[at + i] = d * ((b[o + (i >> 7) * 32 + (i & 31)]! >> 2 * (i >> 5 & 3) & 3) - 1);
    }
  },
  NVFP4: (b, o, y, at) => {
    for (let i = 0; i < 64; i++) {
      const byte = b[o + 4 + (i >> 4) * 8 + (i & 7)]!;
      y[at + i] = ue4m3(b[o + (i >> 4)]!) * FP4_VALUES[byte >> (i & 8) / 2 & 15]!;
    }
  },
};

/** The names of the types whose values can be read. */
export const DECODED_TYPES: readonly string[] = Object.keys(DECODERS);
