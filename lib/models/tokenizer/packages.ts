/** Hugging Face's packages for tokenizers and templates, loaded on the first use. */

/** Versions that Deno fetches where no package.json names them; the same as there. */
const VERSIONS = { jinja: "0.5.11", tokenizers: "0.2.0" };

const IMPORTS = {
  jinja: () => import("@huggingface/jinja"),
  tokenizers: () => import("@huggingface/tokenizers"),
};

/** @throws {Error} when the package is not installed */
export async function importPackage<Name extends keyof typeof IMPORTS>(
  name: Name,
): Promise<Awaited<ReturnType<(typeof IMPORTS)[Name]>>> {
  try {
    return await IMPORTS[name]() as Awaited<ReturnType<(typeof IMPORTS)[Name]>>;
  } catch (cause) {
    try {
      // A Deno program that took this module from a URL has no package.json. Computed, because others fail on
      // the name.
      if ("Deno" in globalThis) {
        return await import(["npm:@huggingface", `${name}@${VERSIONS[name]}`].join("/"));
      }
    } catch {
      // The first failure says what to install.
    }
    throw new Error(
      `Cannot read a tokenizer: the package "@huggingface/${name}" must be installed, got none`,
      {
        cause,
      },
    );
  }
}
