/** Writes lib/native/signatures.ts and lib/native/functions.ts from the headers of kernels/include. */
import { readFileSync } from "node:fs";
import { join } from "node:path";

const ELEMENTS: Readonly<Record<string, string>> = {
  void: "any",
  uint8_t: "u8",
  uint16_t: "u16",
  uint32_t: "u32",
  uint64_t: "u64",
  int32_t: "i32",
  float: "f32",
  double: "f64",
};

const SCALARS: Readonly<Record<string, string>> = {
  size_t: "usize",
  int32_t: "i32",
  float: "f32",
  double: "f64",
  aq_cuda_buffer: "handle",
  aq_cuda_stream: "handle",
};

interface Parameter {
  readonly name: string;
  /** As signatures.ts writes it. */
  readonly kind: string;
}

/** One parameter of a declaration; undefined for a type that signatures.ts has no word for. */
function parameterOf(declaration: string): Parameter | undefined {
  const [, marks, type, pointer, name] = /^((?:AQ_INOUT |const )?)(\w+) (\*?)(\w+)$/.exec(declaration) ?? [];
  if (name === undefined) return undefined;
  if (pointer !== "*") {
    const kind = marks === "" ? SCALARS[type!] : undefined;
    return kind === undefined ? undefined : { name, kind };
  }
  const element = ELEMENTS[type!];
  const direction = marks === "const " ? "in" : marks === "AQ_INOUT " ? "inout" : "out";
  return element === undefined ? undefined : { name, kind: `${direction}:${element}` };
}

/**
 * The functions that a header declares, by name.
 *
 * @throws {Error} for a declaration whose result is no `int32_t`, or that has a parameter of another type
 */
function declarationsOf(header: string): Map<string, Parameter[]> {
  const found = new Map<string, Parameter[]>();
  const text = header.replaceAll(/\/\*[^]*?\*\//g, "").replaceAll(/^#.*$/gm, "");
  for (const [declaration, name, list] of text.matchAll(/AQ_API\b(?:\s+int32_t\s+(\w+)\(([^)]*)\);|.*)/g)) {
    if (name === undefined) throw new Error(`Cannot write the signature of "${declaration}": no int32_t`);
    const parameters = list!.trim() === "void" ? [] : list!.split(",").map((parameter) => {
      const written = parameterOf(parameter.trim().replaceAll(/\s+/g, " "));
      if (written === undefined) {
        throw new Error(`Cannot write the signature of ${name}: unknown parameter "${parameter.trim()}"`);
      }
      return written;
    });
    found.set(name, parameters);
  }
  return found;
}

/** Signatures of a header's functions: name → kinds of its parameters, separated by spaces. */
export function signaturesOf(header: string): Map<string, string> {
  return new Map(
    [...declarationsOf(header)].map(([name, list]) => [name, list.map(({ kind }) => kind).join(" ")]),
  );
}

const camelCase = (name: string) => name.replaceAll(/_(\w)/g, (_, letter: string) => letter.toUpperCase());

/**
 * Elements that arrays must have at least, by their functions and names; the first line that fits counts. The
 * comments of kernels/include/arrowquant.h say the same.
 */
const SIZES: readonly (readonly [functions: RegExp, arrays: RegExp, size: string])[] = [
  [/./, /^(words|groups|index|floats)$/, "1"],
  [/./, /^sizes$/, "2"],
  [/./, /^statistics$/, "6"],
  [/./, /^packed$/, "rows * packedWordsOf(cols, bits)"],
  [/./, /^sub(Scale|Min)$/, "rows * subBytesOf(cols, groupSize, scaleBits)"],
  [/./, /^super(Scale|Min)$/, "rows * superblocksOf(cols)"],
  [/./, /^columnWeights$/, "cols"],
  [/quantize_activations/, /^(scale|zeroPoint)$/, "tokens"],
  [/(quantize|round)_activations/, /./, "tokens * cols"],
  [/choose_experts/, /^logits$/, "rows * experts"],
  [/choose_experts/, /^bias$/, "experts"],
  [/choose_experts/, /./, "rows * perToken"],
  [/scale_rows/, /^factor$/, "rows"],
  [/(gather|add)_rows/, /^place$/, "count"],
  [/gather_rows/, /^out$/, "count * cols"],
  [/add_rows/, /^x$/, "count * cols"],
  [/(gather|scale|add)_rows/, /./, "rows * cols"],
  [/trellis_table/, /^levels$/, "2 ** (bits + 6)"],
  [
    /clipped|feedback|refine|trellis|linear_packed|quantize|fit_two|packed_|ggml/,
    /^(d?scale|zeroPoint|dzero|d?offset|minimum|groupWeights)$/,
    "rows * groupsOf(cols, groupSize)",
  ],
  [/ggml/, /^blocks$/, "rows * ggmlBytesOf(cols, type)"],
  [/convert|statistics$|nonfinite|silu|gelu|aq_add|adam/, /^(?!packed|weights)/, "n"],
  [/linear/, /^x(Scale|ZeroPoint)$/, "tokens"],
  [/linear/, /^(x|codes)$/, "tokens * cols"],
  [/linear/, /^out$/, "tokens * rows"],
  [/linear/, /^bias$/, "rows"],
  [/attention/, /^d?[kv]$/, "batch * tokens * kvHeads * headSize"],
  [/attention/, /^keyMask$/, "batch * tokens"],
  [/attention/, /./, "batch * tokens * heads * headSize"],
  [/rotate/, /./, "batch * rows * cols"],
  [/rotary/, /^positions$/, "rows"],
  [/rotary/, /./, "rows * heads * headSize"],
  [/modulate|gate_add/, /^(scale|shift|gate)$/, "stridedOf(batch, stride, cols)"],
  [/column_sums/, /^out$/, "stridedOf(batch, stride, cols)"],
  [/modulate|gate_add|column_sums/, /./, "batch * tokens * cols"],
  [/patchify/, /./, "batch * channels * height * width"],
  [/timestep/, /^timesteps$/, "n"],
  [/timestep/, /./, "n * channels"],
  [/multiply$/, /^a$/, "rows * k"],
  [/multiply$/, /^b$/, "k * cols"],
  [/multiply$/, /^c$/, "rows * cols"],
  [/accumulate/, /^x$/, "tokens * cols"],
  [/accumulate/, /^y$/, "tokens * rows"],
  [/accumulate/, /^weight$/, "tokens"],
  [/accumulate/, /^out$/, "momentElements(rows, cols, block)"],
  [/(factor|solve)_moment/, /^(m|factor)$/, "n * n"],
  [/(factor|solve)_moment/, /^pivots$/, "n"],
  [/(factor|solve)_moment/, /^b$/, "rows * n"],
  [/(factor|solve)_moment/, /^work$/, "workOf(own, n, 0)"],
  [/./, /^work$/, "workOf(own, cols, groupSize)"],
  [/trellis/, /^table$/, "2 ** (bits + 6)"],
  [/feedback|refine|trellis/, /^(factor|moment)$/, "momentElements(cols, cols, block)"],
  [/feedback|trellis/, /^pivots$/, "cols"],
  [/./, /^order$/, "cols"],
  [/./, /^objective$/, "rows"],
  [/norm/, /^(weight|bias)$/, "cols"],
  [/./, /^(weights|codes|x|dw|dx|dy|input|out)$/, "rows * cols"],
];

function sizeOf(name: string, array: string): string {
  const found = SIZES.find(([functions, arrays]) => functions.test(name) && arrays.test(array));
  if (found === undefined) throw new Error(`Cannot write ${name}: SIZES must say how long "${array}" is`);
  return found[2];
}

/**
 * A function of functions.ts: it checks numbers, and types and lengths of arrays, supplies instruction set
 * and threads, and looks at the status.
 */
function functionOf(name: string, list: readonly Parameter[]): string {
  const parameters: string[] = ["kernels: Kernels", "doing: Doing"],
    given: string[] = [],
    numbers: string[] = [];
  const names = list.map(({ name }) => name === "in" ? "input" : camelCase(name));
  list.forEach(({ kind }, i) => {
    const argument = names[i]!, element = kind.split(":")[1];
    if (argument === "isa") given.push("own.isaNumber");
    else if (argument === "threads") given.push("own.threads");
    else if (element === undefined) {
      parameters.push(`${argument}: number`);
      numbers.push(`${NUMBERS[kind]}(doing, "${argument}", ${argument}); `);
      given.push(kind === "usize" ? `own.size(${argument})` : argument);
    } else {
      parameters.push(`${argument}: ${element.toUpperCase()}`);
      // the type of elements that are only known at run time stands behind the array, as `dtype` or
      // `in_dtype`
      const dtype = element === "any" ? `, ${names.slice(i).find((name) => /dtype$/i.test(name))}` : "";
      const check = argument === "order" ? "permutation" : element;
      given.push(`${check}(doing, "${argument}", ${argument}, ${sizeOf(name, argument)}${dtype})`);
    }
  });
  const call = `own.calls.${name}(${given.join(", ")})`;
  return `export const ${camelCase(name.replace(/^aq_/, ""))} = (${
    parameters.join(", ")
  }): void => { const own = unchecked(kernels); ${numbers.join("")}finish(doing, ${call}); };`;
}

/** Checks of numbers by their kinds. */
const NUMBERS: Readonly<Record<string, string>> = {
  usize: "usize",
  i32: "int32",
  f32: "float",
  f64: "float",
};

/** Names that functions.ts imports from call_checks.ts. */
const CHECKS = [
  ...["any", "f32", "f64", "i32", "u16", "u32", "u64", "u8", "usize", "int32", "float"],
  ...[
    "ggmlBytesOf",
    "groupsOf",
    "momentElements",
    "packedWordsOf",
    "permutation",
    "stridedOf",
    "subBytesOf",
    "superblocksOf",
    "workOf",
  ],
];

/** Text of lib/native/functions.ts: every function of the CPU's header that returns a status. */
export function functionsSource(kernels: string): string {
  const header = readFileSync(join(kernels, "include/arrowquant.h"), "utf8");
  const functions = [...declarationsOf(header)].filter(([, list]) =>
    list.some(({ kind }) => kind.includes(":"))
  );
  return `// Generated by \`bun run scripts/build.ts --signatures\` from kernels/include; do not edit.
// deno-fmt-ignore-file

/**
 * The kernels as functions: each checks its numbers and the types and lengths of its arrays, supplies the
 * instruction set and the threads of the opened kernels, and throws unless the kernel reports success.
 */
import { type ANY, type Doing, type F32, type F64, finish, type I32, type U16, type U32, type U64, type U8 } from "./call.ts";
import { ${CHECKS.join(", ")} } from "./call_checks.ts";
import { type Kernels, unchecked } from "./kernels.ts";

${functions.map(([name, list]) => functionOf(name, list)).join("\n")}
`;
}

/** Text of lib/native/signatures.ts for the headers in the folder `kernels`. */
export function signaturesSource(kernels: string): string {
  const part = (file: string, prefix: string) => {
    const header = readFileSync(join(kernels, "include", file), "utf8");
    const version = new RegExp(`#define AQ_${prefix}ABI_VERSION (\\d+)`).exec(header)![1];
    const lines = [...signaturesOf(header)].map(([name, signature]) => `  ${name}: "${signature}",`);
    return [
      `/** \`AQ_${prefix}ABI_VERSION\` of kernels/include/${file}. */`,
      `export const ${prefix}ABI_VERSION = ${version};`,
      "",
      `export const ${prefix}SIGNATURES = {`,
      ...lines,
      "} as const;",
    ].join("\n");
  };
  return `// Generated by \`bun run scripts/build.ts --signatures\` from kernels/include; do not edit.
// deno-fmt-ignore-file

${part("arrowquant.h", "")}

${part("arrowquant_cuda.h", "CUDA_")}
`;
}
