/** `mod.ts` for bundles, which hold the analysis too: its import has to be seen to be taken in. */
export * from "../../mod.ts";

/** Instead of the one of mod.ts. */
export function loadAnalysis(): Promise<typeof import("../../lib/analysis/mod.ts")> {
  return import("../../lib/analysis/mod.ts");
}
