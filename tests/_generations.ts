/** `_generations.ts BACKEND EVERY FOLDER…`: greedy answers of each folder's model to every so manieth puzzle of dream-mini, as JSON. */
import { join } from "node:path";
import process from "node:process";
import { readPuzzles, solvePuzzles } from "../lib/eval/puzzles.ts";
import { loadDream, loadTokenizer } from "../lib/models/mod.ts";
import { type BackendChoice, openKernels } from "../lib/native/mod.ts";
import { MODELS } from "./_checkpoints.ts";

const [backend, every, ...folders] = process.argv.slice(2);
const kernels = await openKernels({ backend: backend as BackendChoice });
const reference = join(MODELS, "dream-mini");
const tokenizer = await loadTokenizer(reference);
const puzzles = readPuzzles(join(reference, "eval.jsonl")).filter((_, i) => i % Number(every) === 0);
const answers = folders.map((folder) =>
  solvePuzzles(loadDream(folder, kernels), tokenizer, puzzles).map((
    { puzzle, answer },
  ) => [puzzle.task, answer])
);
console.log(JSON.stringify({ backend: kernels.backend, runtime: kernels.runtime, answers }));
