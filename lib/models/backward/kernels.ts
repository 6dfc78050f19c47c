/**
 * The gradients' kernels as functions, arguments checked on this side. For a loss L, `dy` stands for ∂L/∂y. Tensors are flat float32 arrays,
 * row-major. Results depend neither on `threads` nor on the instruction set.
 */
import { KernelError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { groupCount, type OneLevelTensor, packedWords } from "../../quant/packed/layout.ts";
import type { AttentionShape } from "../layers/kernels.ts";

type Floats = Float32Array<ArrayBuffer>;

function check(status: number, doing: string): void {
  if (status === 0) return;
  throw new KernelError(`Cannot ${doing}: the kernel reports status ${status}`, { status });
}

function checkFloats(doing: string, arrays: Readonly<Record<string, readonly [Float32Array, number]>>): void {
  for (const [name, [array, length]] of Object.entries(arrays)) {
    if (!(array instanceof Float32Array) || array.length !== length) {
      throw new TypeError(
        `Cannot ${doing}: ${name} must be ${length} float32 values, got ${array?.length ?? typeof array}`,
      );
    }
  }
}

function checkCounts(doing: string, counts: Readonly<Record<string, number>>): void {
  for (const [name, count] of Object.entries(counts)) {
    if (!Number.isSafeInteger(count) || count < 0) {
      throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ≥ 0, got ${count}`);
    }
  }
}

/** The gradients' kernels, bound to opened kernels; results go to the last arguments. */
export class BackwardOperations {
  constructor(readonly kernels: Kernels) {}

  /** `x: f32[rows, cols]` → `out: f32[cols, rows]`; `out` must not be `x`. */
  transpose(x: Float32Array, rows: number, cols: number, out: Floats): void {
    const doing = "transpose a matrix";
    checkCounts(doing, { rows, cols });
    checkFloats(doing, { x: [x, rows * cols], out: [out, rows * cols] });
    const { calls, size, isaNumber } = this.kernels;
    check(calls.aq_transpose(x, size(rows), size(cols), out, isaNumber, this.kernels.threads), doing);
  }

  /**
   * What the gradient of the weights `s (q − z)` means for scales and zero points: `Σ dw (q − z)` and `−s Σ dw` over each group.
   *
   * **Shapes** `dw: f32[rows, cols]` → `dscale` and `dzero: f32[rows, groups]`; `dzero` undefined: not wanted
   */
  packedGradient(dw: Float32Array, weights: OneLevelTensor, dscale: Floats, dzero: Floats | undefined): void {
    const doing = "find the gradient of scales";
    const { rows, cols, bits, groupSize, packed, scale, zeroPoint } = weights;
    checkCounts(doing, { rows, cols });
    const groups = rows * groupCount(cols, groupSize);
    checkFloats(doing, { dw: [dw, rows * cols], dscale: [dscale, groups] });
    if (dzero !== undefined) checkFloats(doing, { dzero: [dzero, groups] });
    if (
      packed.length !== rows * packedWords(cols, bits) || scale.length !== groups ||
      (zeroPoint !== undefined && zeroPoint.length !== groups)
    ) {
      throw new TypeError(
        `Cannot ${doing}: the packed tensor must have ${groups} scales, got ${scale.length}`,
      );
    }
    if (dzero !== undefined && zeroPoint === undefined) {
      throw new TypeError(`Cannot ${doing}: dzero must be undefined for symmetric weights, got an array`);
    }
    const { calls, size, isaNumber } = this.kernels;
    check(
      calls.aq_packed_gradient(
        dw,
        packed,
        scale,
        zeroPoint ?? null,
        size(rows),
        size(cols),
        bits,
        size(groupSize),
        dscale,
        dzero ?? null,
        isaNumber,
        this.kernels.threads,
      ),
      doing,
    );
  }

  /** `dx` of `rmsNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
  rmsNorm(
    x: Float32Array,
    dy: Float32Array,
    weight: Float32Array | undefined,
    rows: number,
    cols: number,
    epsilon: number,
    dx: Floats,
  ): void {
    this.#norm("aq_rms_norm_backward", x, dy, weight, rows, cols, epsilon, dx);
  }

  /** `dx` of `layerNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
  layerNorm(
    x: Float32Array,
    dy: Float32Array,
    weight: Float32Array | undefined,
    rows: number,
    cols: number,
    epsilon: number,
    dx: Floats,
  ): void {
    this.#norm("aq_layer_norm_backward", x, dy, weight, rows, cols, epsilon, dx);
  }

  #norm(
    name: "aq_rms_norm_backward" | "aq_layer_norm_backward",
    x: Float32Array,
    dy: Float32Array,
    weight: Float32Array | undefined,
    rows: number,
    cols: number,
    epsilon: number,
    dx: Floats,
  ): void {
    const doing = "find the gradient of a norm";
    checkCounts(doing, { rows, cols });
    const n = rows * cols;
    checkFloats(doing, { x: [x, n], dy: [dy, n], dx: [dx, n] });
    if (weight !== undefined) checkFloats(doing, { weight: [weight, cols] });
    const { calls, size, isaNumber } = this.kernels;
    check(
      calls[name](
        x,
        dy,
        size(rows),
        size(cols),
        weight ?? null,
        epsilon,
        dx,
        isaNumber,
        this.kernels.threads,
      ),
      doing,
    );
  }

  /** `dq`, `dk`, `dv` of `attention` with the default scale; `out` is what it gave. No gradient may be one of the inputs. */
  attention(
    inputs: {
      readonly q: Float32Array;
      readonly k: Float32Array;
      readonly v: Float32Array;
      readonly out: Float32Array;
    },
    dout: Float32Array,
    { batch, tokens, heads, kvHeads = heads, headSize }: AttentionShape,
    keyMask: Uint8Array | undefined,
    gradients: { readonly dq: Floats; readonly dk: Floats; readonly dv: Floats },
  ): void {
    const doing = "find the gradient of attention";
    checkCounts(doing, { batch, tokens, heads, kvHeads, headSize });
    if (heads > 0 && (kvHeads === 0 || heads % kvHeads !== 0)) {
      throw new RangeError(`Cannot ${doing}: kvHeads must divide ${heads} heads, got ${kvHeads}`);
    }
    const { q, k, v, out } = inputs, { dq, dk, dv } = gradients;
    const queries = batch * tokens * heads * headSize, keys = batch * tokens * kvHeads * headSize;
    checkFloats(doing, {
      q: [q, queries],
      k: [k, keys],
      v: [v, keys],
      out: [out, queries],
      dout: [dout, queries],
      dq: [dq, queries],
      dk: [dk, keys],
      dv: [dv, keys],
    });
    if (keyMask !== undefined && keyMask.length !== batch * tokens) {
      throw new TypeError(`Cannot ${doing}: keyMask must be ${batch * tokens} bytes, got ${keyMask.length}`);
    }
    const { calls, size, isaNumber } = this.kernels;
    check(
      calls.aq_attention_backward(
        q,
        k,
        v,
        out,
        dout,
        keyMask ?? null,
        size(batch),
        size(tokens),
        size(heads),
        size(kvHeads),
        size(headSize),
        1 / Math.sqrt(headSize),
        dq,
        dk,
        dv,
        isaNumber,
        this.kernels.threads,
      ),
      doing,
    );
  }

  /** `dgate` and `dup` of `siluMultiply`; `dgate` may be `gate` or `dy`, `dup` may be `up`. */
  siluMultiply(gate: Float32Array, up: Float32Array, dy: Float32Array, dgate: Floats, dup: Floats): void {
    const doing = "find the gradient of SiLU";
    const n = gate.length;
    checkFloats(doing, { up: [up, n], dy: [dy, n], dgate: [dgate, n], dup: [dup, n] });
    const { calls, size, isaNumber } = this.kernels;
    check(
      calls.aq_silu_multiply_backward(gate, up, dy, size(n), dgate, dup, isaNumber, this.kernels.threads),
      doing,
    );
  }

  /** `dx` of `silu`; may be `x` or `dy`. */
  silu(x: Float32Array, dy: Float32Array, dx: Floats): void {
    this.#elementwise("aq_silu_backward", x, dy, dx);
  }

  /** `dx` of `geluTanh`; may be `x` or `dy`. */
  geluTanh(x: Float32Array, dy: Float32Array, dx: Floats): void {
    this.#elementwise("aq_gelu_tanh_backward", x, dy, dx);
  }

  #elementwise(
    name: "aq_silu_backward" | "aq_gelu_tanh_backward",
    x: Float32Array,
    dy: Float32Array,
    dx: Floats,
  ): void {
    const doing = "find the gradient of an activation";
    checkFloats(doing, { dy: [dy, x.length], dx: [dx, x.length] });
    const { calls, size, isaNumber } = this.kernels;
    check(calls[name](x, dy, size(x.length), dx, isaNumber, this.kernels.threads), doing);
  }

  /**
   * Sums over tokens of `a`, or of `a · b`.
   *
   * **Shapes** `a` and `b: f32[batch, tokens, cols]` → `out: f32[batch, cols]`, `stride` (default `cols`) floats from one batch item to the next
   */
  columnSums(
    a: Float32Array,
    b: Float32Array | undefined,
    shape: {
      readonly batch: number;
      readonly tokens: number;
      readonly cols: number;
      readonly stride?: number | undefined;
    },
    out: Floats,
  ): void {
    const doing = "sum over tokens";
    const { batch, tokens, cols, stride = cols } = shape;
    checkCounts(doing, { batch, tokens, cols, stride });
    checkFloats(doing, { a: [a, batch * tokens * cols] });
    if (b !== undefined) checkFloats(doing, { b: [b, batch * tokens * cols] });
    const least = batch === 0 ? 0 : (batch - 1) * stride + cols;
    if (out.length < least) {
      throw new TypeError(`Cannot ${doing}: out must be at least ${least} float32 values, got ${out.length}`);
    }
    const { calls, size, isaNumber } = this.kernels;
    check(
      calls.aq_column_sums(
        a,
        b ?? null,
        size(batch),
        size(tokens),
        size(cols),
        size(stride),
        out,
        isaNumber,
        this.kernels.threads,
      ),
      doing,
    );
  }
}
