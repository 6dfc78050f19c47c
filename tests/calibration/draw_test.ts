import { describe, expect, test } from "bun:test";
import { usualSamples } from "../../lib/calibration/draw.ts";

describe("samples where none are asked for", () => {
  const bounds = { multiplyAdds: 1e6, least: 8 };
  test("are 512 where a pass over them costs no more than is allowed", () => {
    expect(usualSamples(36, 1e6 / 512, bounds)).toEqual({ count: 512, isCostly: false });
  });
  test("are as many as the work allows above that", () => {
    expect(usualSamples(128, 1e6 / 100, bounds)).toEqual({ count: 100, isCostly: true });
  });
  test("have 4096 positions whatever they cost, and a least number of times", () => {
    expect(usualSamples(128, 1e9, bounds)).toEqual({ count: 32, isCostly: true });
    expect(usualSamples(100, 1e9, bounds)).toEqual({ count: 41, isCostly: true });
    expect(usualSamples(2048, 1e9, bounds)).toEqual({ count: 8, isCostly: true });
    expect(usualSamples(256, 1e9, { ...bounds, least: 64 })).toEqual({ count: 64, isCostly: true });
  });
});
