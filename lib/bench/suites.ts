/** The suites of the bench by name: one more entry here is one more suite of `scripts/bench.ts`. */
import { accuracySuite } from "./accuracy/suite.ts";
import { checkpointSuite } from "./checkpoint/suite.ts";
import { kernelSuite } from "./kernels/suite.ts";
import { correctionsSuite, peersSuite, solversSuite } from "./peers/suite.ts";
import { phasesSuite } from "./phases/suite.ts";
import { processSuite } from "./process/suite.ts";
import type { Suite } from "./suite.ts";

/** In the order of `--help`; the first is the default. */
export const SUITES: readonly Suite[] = [
  accuracySuite,
  checkpointSuite,
  correctionsSuite,
  kernelSuite,
  peersSuite,
  phasesSuite,
  processSuite,
  solversSuite,
];
