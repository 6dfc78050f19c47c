/** The suites of the bench by name: one more entry here is one more suite of `scripts/bench.ts`. */
import { accuracySuite } from "./accuracy_suite.ts";
import { checkpointSuite } from "./checkpoint_suite.ts";
import { kernelSuite } from "./kernel_suite.ts";
import { peersSuite, solversSuite } from "./peers_suite.ts";
import { processSuite } from "./process_suite.ts";
import type { Suite } from "./suite.ts";

/** In the order of `--help`; the first is the default. */
export const SUITES: readonly Suite[] = [
  accuracySuite,
  checkpointSuite,
  kernelSuite,
  peersSuite,
  processSuite,
  solversSuite,
];
