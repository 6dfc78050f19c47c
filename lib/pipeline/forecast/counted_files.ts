/** The stages of a run that reads weights and statistics alone: the model is not run. */
import type { CalibratedLayers } from "../../calibration/statistics/alone.ts";
import { type CountedRun, CountedWork, type Pass } from "./counted_work.ts";

const NO_PASS: Pass = { positions: 0, ofPosition: 0, bytes: 0, statesBytes: 0, seconds: () => 0 };

/** A run on saved statistics. */
export class CountedFiles extends CountedWork {
  readonly width = 0;
  readonly keptBeside = 0;
  readonly hasStream = false;

  constructor(run: CountedRun, { model: { stages } }: CalibratedLayers) {
    const { tensors } = run.checkpoint;
    super(
      run,
      stages.flatMap(({ layers }) =>
        layers.map(({ name, weights: { rows, cols } }) => {
          return { name, rows, cols, bytes: tensors.get(name)!.info.byteLength };
        })
      ),
    );
  }

  pass(): Pass {
    return NO_PASS;
  }

  heldOut(): [] {
    return [];
  }

  phases(): [] {
    return [];
  }

  refinementBytes(): number {
    return 0;
  }
}
