/** Files of other formats, told by the end of their names or by their first bytes, each with the way out. */

/** Bytes of a file's start that {@linkcode foreignContent} looks at. */
export const SNIFFED_BYTES = 512;

const PICKLE =
  "a pickle of PyTorch, which can run code: save it as safetensors with the library that wrote it " +
  "(transformers and diffusers: from_pretrained(…).save_pretrained(…, safe_serialization=True))";
const CONVERT = "convert it to safetensors with the library that wrote it";

/** Kinds of files by the end of their names. */
const BY_NAME: readonly (readonly [RegExp, string])[] = [
  [/^adapter_/, "a LoRA or another adapter alone, which is no model: merge it into its base first"],
  [/\.(?:bin|pt|pth|ckpt|pkl|pickle)$/i, PICKLE],
  [/\.onnx(?:_data)?$/i, "an ONNX graph: take the model's original safetensors"],
  [/\.(?:h5|keras|hdf5|msgpack|npz|npy|tflite|pb|ot|mlmodel)$/i, `weights in another format: ${CONVERT}`],
  [/\.(?:dduf|zip|tar|tgz|gz|7z)$/i, "an archive: unpack it and give the folder"],
  [/\.(?:part|incomplete|crdownload|aria2|download|tmp)$/i, "an unfinished download: fetch it again"],
  [/\.safetensors\.index(?:\.[\w-]+)?\.json$/, "an index of shards: give the folder that it lies in"],
];

/** Kinds of files by their first bytes. */
const BY_CONTENT: readonly (readonly [RegExp, string])[] = [
  [
    /^version https:\/\/git-lfs/,
    "a git-lfs pointer, not the file it stands for: fetch that with git lfs pull, or with hf download",
  ],
  [/^GGUF/, "a GGUF file under another name: rename it to *.gguf"],
  [/^\s*<(?:!doctype|html|\?xml|head)/i, "a web page, perhaps a login or an error: download the file again"],
  [/^(?:PK\p{Cc}\p{Cc}|\x80\p{Cc})/u, PICKLE],
  [/^\x89HDF/, `an HDF5 file: ${CONVERT}`],
  [/^\p{Cc}\x8b\p{Cc}/u, "a gzip archive: unpack it"],
  [
    /^\s*\{\s*"error"|^(?:Entry|Repository) not found|^Access to model/i,
    "a server's error: download the file again",
  ],
];

/** Describes a file of another format by its name, with the way out; undefined where it cannot. */
export function foreignName(name: string): string | undefined {
  return BY_NAME.find(([pattern]) => pattern.test(name))?.[1];
}

/** Describes a file that is no safetensors or no JSON by its first bytes, with the way out. */
export function foreignContent(start: Uint8Array): string | undefined {
  const text = Array.from(start, (byte) => String.fromCharCode(byte)).join("");
  return BY_CONTENT.find(([pattern]) => pattern.test(text))?.[1];
}
