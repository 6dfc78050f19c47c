/** Worker thread that decodes Arrow and Parquet files: it can be ended at any time. */
import { parentPort } from "node:worker_threads";
import { columnsOfBytes, type TableAnswer, type TableBytes } from "./table_files.ts";

parentPort?.on("message", async (request: TableBytes) => {
  let answer: TableAnswer;
  try {
    answer = { columns: await columnsOfBytes(request) };
  } catch (error) {
    answer = { reason: error instanceof Error ? error.message : String(error) };
  }
  parentPort!.postMessage(answer);
});
