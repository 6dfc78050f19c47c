/** Where this package lies: what its folder holds beside the modules is found from there. */

/**
 * The package's folder for one of its modules: a checkout's or a host's for `lib/native/….ts`; for a bundle,
 * which has all modules in one file, the folder of that file.
 *
 * @example
 * ```ts
 * packageRoot("https://host/arrowquant/lib/native/location.ts").href; // https://host/arrowquant/
 * packageRoot("https://host/arrowquant/arrowquant.js").href; // https://host/arrowquant/
 * ```
 */
export function packageRoot(moduleUrl: string): URL {
  return new URL(/\/lib\/native\/[^/]*\.ts(?:[?#].*)?$/.test(moduleUrl) ? "../../" : "./", moduleUrl);
}

/** The folder of the package that this module belongs to. */
export const PACKAGE_ROOT: URL = packageRoot(import.meta.url);

/** Whether the package was imported over HTTP, so that nothing of it lies on this machine. */
export const IS_REMOTE: boolean = PACKAGE_ROOT.protocol === "http:" || PACKAGE_ROOT.protocol === "https:";
