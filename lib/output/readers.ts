/** Which programs read what is written, by the form of its weights, and what would make others read it. */
import type { Checkpoint } from "../tensor/mod.ts";

/** A form of stored weights. */
export interface StoredForm {
  /** `quant_method` of config.json; undefined for plain weights. */
  readonly method: string | undefined;
  /** Programs that read it, by kind of model. */
  readonly readers: Readonly<Record<"text" | "image" | "other", string>>;
  /** Command or option that makes others read it; empty where none is needed. */
  readonly wayOut: string;
}

/** Every form that this version writes; the first that fits counts. */
const STORED_FORMS: readonly StoredForm[] = [
  {
    method: "arrowquant",
    readers: { text: "ArrowQuant", image: "ArrowQuant", other: "ArrowQuant" },
    wayOut:
      "plain safetensors for other programs: arrowquant export --to safetensors; for compressed-tensors' form: " +
      "uniform codes, --zero-point symmetric or integer, and groups that divide every layer's columns",
  },
  {
    method: "compressed-tensors",
    readers: {
      text: "ArrowQuant, and programs that read compressed-tensors' pack-quantized and know the model",
      image: "ArrowQuant",
      other: "ArrowQuant, and programs that read compressed-tensors' pack-quantized and know the model",
    },
    wayOut: "plain safetensors for other programs: arrowquant export --to safetensors",
  },
  {
    method: "gguf",
    readers: {
      text: "llama.cpp and programs built on it",
      image: "programs that read GGUF and know the model",
      other:
        "programs that read GGUF and know the model, as ComfyUI-GGUF, stable-diffusion.cpp and diffusers do",
    },
    wayOut: "plain safetensors for other programs: arrowquant export --to safetensors",
  },
  {
    method: undefined,
    readers: {
      text: "transformers and what reads its safetensors",
      image: "diffusers and what reads its safetensors",
      other: "what reads safetensors",
    },
    wayOut: "",
  },
];

const KINDS: Readonly<Record<Checkpoint["kind"], keyof StoredForm["readers"]>> = {
  dream: "text",
  llada: "text",
  llada_moe: "text",
  sdar: "text",
  dit: "image",
  unknown: "other",
};

/** The line behind `opens in`. @param method `quant_method` of the result, undefined for plain weights */
export function opensIn(kind: Checkpoint["kind"], method: string | undefined): string {
  const form = STORED_FORMS.find((form) => form.method === method);
  if (form === undefined) return `programs that read ${method}; not ArrowQuant`;
  return form.readers[KINDS[kind]] + (form.wayOut === "" ? "" : ` (${form.wayOut})`);
}
