/**
 * Looking at runs: tables, charts, reports, and what notebooks show. Importing this opens and draws nothing;
 * Arquero, Vega and the others are loaded by the first call that needs them.
 */
export {
  type ColumnSchema,
  columnsOf,
  type ColumnType,
  type RowOf,
  schemaMarkdown,
  TABLE_NAMES,
  TABLE_SCHEMAS,
  TABLE_VERSION,
  type TableName,
  type TableSchema,
} from "./schema.ts";
export {
  type ColumnTable,
  type CompareOptions,
  compareRuns,
  compareSolvers,
  compareTables,
  MAX_TABLE_ROWS,
  paretoFront,
  rowsOf,
  tableFromRows,
  type TableLike,
} from "./tables.ts";
export {
  decodeTable,
  encodeTable,
  MAX_TABLE_BYTES,
  readTable,
  TABLE_FORMATS,
  type TableFormat,
  writeTable,
} from "./table_files.ts";
export * from "./charts/mod.ts";
export { type RenderOptions, renderPng, renderSvg } from "./render.ts";
export {
  activationRows,
  type ActivationSeries,
  benchTables,
  driftRows,
  layerKind,
  layerRowsOf,
  lossRows,
  maskRatioRows,
  type RowSource,
  type Tables,
  tablesOf,
  thetaRows,
  timestepRows,
} from "./rows.ts";
export { countCodes } from "./codes.ts";
export { readRun, type Run, RUN_FILE, RUN_FORMAT_VERSION, type SummaryItem, writeRun } from "./run.ts";
export { type BenchResult, benchRun, type QuantizeResult, quantizeRun } from "./make_run.ts";
export { chartsOf, type NamedChart } from "./run_charts.ts";
export { REPORT_FORMATS, type ReportFormat, reportHtml, reportMarkdown, reportText } from "./report/mod.ts";
export { writeReport, writeReportFolder } from "./report/folder.ts";
export { Display, type MediaBundle, showChart, showTable, type ShowTableOptions } from "./display.ts";
