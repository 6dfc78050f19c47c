import { afterAll, describe, expect, test } from "bun:test";
import { withThreads } from "../../lib/native/mod.ts";
import {
  adamStep,
  type OptimizationPlan,
  optimize,
  type OptimizerState,
} from "../../lib/thermo/optimizer/mod.ts";
import { allKernels, gaussians } from "../_kernels.ts";

const everywhere = await allKernels();
const { kernels } = everywhere[0]!;
afterAll(() => {
  for (const { kernels: each } of everywhere) each.close();
});

describe("Adam's step", () => {
  test("two steps by hand", () => {
    const arrays = {
      values: Float32Array.of(1),
      gradients: Float32Array.of(0.5),
      first: new Float32Array(1),
      second: new Float32Array(1),
    };
    adamStep(kernels, arrays, 1, 0.1);
    expect(arrays.values[0]).toBeCloseTo(0.9, 6); // the first step is the rate, whatever the gradient
    expect(arrays.first[0]).toBeCloseTo(0.05, 7);
    expect(arrays.second[0]).toBeCloseTo(0.00025, 8);
    arrays.gradients[0] = -1;
    adamStep(kernels, arrays, 2, 0.1);
    const m = 0.9 * 0.05 - 0.1, v = 0.999 * 0.00025 + 0.001;
    const wanted = 0.9 - 0.1 * (m / (1 - 0.81)) / (Math.sqrt(v / (1 - 0.999 ** 2)) + 1e-8);
    expect(arrays.values[0]).toBeCloseTo(wanted, 5);
  });

  test("against float64 over many steps; the same bits everywhere and for any number of threads", () => {
    const n = 70_001, steps = 20;
    const run = (of: typeof kernels, threads: number) => {
      const arrays = {
        values: gaussians(1, n),
        gradients: new Float32Array(n),
        first: new Float32Array(n),
        second: new Float32Array(n),
      };
      for (let step = 1; step <= steps; step++) {
        arrays.gradients.set(gaussians(1 + step % 4, n));
        adamStep(withThreads(of, threads), arrays, step, 0.01);
      }
      return arrays;
    };
    const wanted = run(kernels, 1);
    for (const { kernels: each } of everywhere) {
      for (const threads of [1, 3]) expect(run(each, threads)).toEqual(wanted);
    }
    const gradients = [0, 1, 2, 3].map((i) => gaussians(1 + i, n));
    for (const i of [0, 1, 12_345, n - 1]) {
      let value = gaussians(1, n)[i]!, m = 0, v = 0;
      for (let step = 1; step <= steps; step++) {
        const g = gradients[step % 4]![i]!;
        m = 0.9 * m + 0.1 * g;
        v = 0.999 * v + 0.001 * g * g;
        value -= 0.01 * (m / (1 - 0.9 ** step)) / (Math.sqrt(v / (1 - 0.999 ** step)) + 1e-8);
      }
      expect(wanted.values[i]).toBeCloseTo(value, 5);
    }
  });

  test("bad input", () => {
    const good = () => ({
      values: new Float32Array(2),
      gradients: new Float32Array(2),
      first: new Float32Array(2),
      second: new Float32Array(2),
    });
    expect(() => adamStep(kernels, { ...good(), first: new Float32Array(1) }, 1, 0.1)).toThrow(TypeError);
    expect(() => adamStep(kernels, good(), 0, 0.1)).toThrow("a value out of range");
  });
});

describe("optimize", () => {
  /** Σ a (x − b)². */
  function bowl(start = [3, -2], options: { readonly units?: number[] } = {}) {
    const values = Float32Array.from(start), gradients = new Float32Array(2);
    const a = [1, 100], b = [1, 0.5];
    const loss = () => {
      let sum = 0;
      for (let i = 0; i < 2; i++) {
        gradients[i]! += 2 * a[i]! * (values[i]! - b[i]!);
        sum += a[i]! * (values[i]! - b[i]!) ** 2;
      }
      return sum;
    };
    const units = options.units && Float32Array.from(options.units);
    return { values, problem: { parameters: [{ name: "x", values, gradients, units }], loss } };
  }

  test("finds a minimum, records every loss, keeps the best", () => {
    const { values, problem } = bowl();
    const report = optimize(kernels, problem, {
      learningRate: 0.3,
      maxIterations: 200,
      convergenceThreshold: 0,
    });
    expect(values[0]).toBeCloseTo(1, 2);
    expect(values[1]).toBeCloseTo(0.5, 2);
    expect(report.losses.total.length).toBe(200);
    expect(report.gradientNorms.length).toBe(200);
    expect([report.converged, report.diverged]).toEqual([false, false]);
    expect(report.best).toBe(Math.min(...report.losses.total));
    expect(report.best).toBe(problem.loss()); // what is left in place
    expect(report.initial).toBe(report.losses.total[0]!);
  });

  test("converges by the loss's relative change, and stops", () => {
    let calls = 0;
    const report = optimize(kernels, {
      ...bowl().problem,
      loss: () => 1 + 1e-9 * (calls++ % 3),
    }, { maxIterations: 500, convergenceThreshold: 1e-4 });
    expect(report.converged).toBe(true);
    expect(report.iterations).toBe(28); // two windows of ten losses, ten times
    expect(report.reason).toContain("changed by less than 0.0001");
    // The same change is no convergence when the loss is small beside it.
    let loss = 1;
    const falling = optimize(kernels, { ...bowl().problem, loss: () => loss *= 0.9 }, { maxIterations: 100 });
    expect(falling.converged).toBe(false);
  });

  test("terms are recorded one by one, and their sum is minimised", () => {
    const { problem } = bowl();
    const terms = () => ({ quantization: problem.loss(), markov: 0.5, entropy: -0.25 });
    const report = optimize(kernels, { ...problem, loss: terms }, { maxIterations: 5 });
    const { quantization, markov, entropy, total } = report.losses;
    expect([markov, entropy]).toEqual([new Array(5).fill(0.5), new Array(5).fill(-0.25)]);
    expect(total).toEqual(quantization.map((loss) => loss + 0.25));
    expect(report.initial).toBe(total[0]!);
  });

  test("goes on from any look to the result of one that was never stopped", () => {
    const settings = { learningRate: 20, maxIterations: 60, convergenceThreshold: 0 };
    const looking = (more: object) => {
      const { values, problem } = bowl();
      const validate = () => (values[0]! - 0.9) ** 2 + (values[1]! - 0.5) ** 2;
      // Far from the minimum the steps are long: it diverges, and backs off, before it settles.
      const report = optimize(
        kernels,
        { ...problem, validate, validateEvery: 7, clock: () => 0, ...more },
        settings,
      );
      return { report, values: [...values] };
    };
    const states: OptimizerState[] = [];
    const whole = looking({
      onState: ({ progress, pieces }: OptimizerState) =>
        states.push({ progress, pieces: [...pieces].map((piece) => piece.slice()) }),
    });
    expect(whole.report.backOffs).toBeGreaterThan(0);
    expect(states.length).toBeGreaterThan(5);
    for (const start of states) expect(looking({ start })).toEqual(whole);
    const [first] = states;
    expect(() => looking({ start: { ...first, pieces: [new Float32Array(12)] } })).toThrow(
      "there must be 2 parameters, got 3",
    );
  });

  test("after a divergence it goes on from the best with half the step, and finds the minimum", () => {
    const { values, problem } = bowl();
    const report = optimize(kernels, problem, {
      learningRate: 20,
      maxIterations: 300,
      convergenceThreshold: 0,
    });
    expect([report.diverged, report.backOffs > 0, report.iterations]).toEqual([false, true, 300]);
    expect(values[0]).toBeCloseTo(1, 1);
    expect(values[1]).toBeCloseTo(0.5, 1);
  });

  test("a loss that keeps blowing up stops it, the best stays, and the report says so", () => {
    const { values, problem } = bowl();
    const report = optimize(kernels, problem, {
      learningRate: 1e4,
      maxIterations: 100,
      convergenceThreshold: 0,
      schedule: "constant",
    });
    expect(report.diverged).toBe(true);
    expect(report.reason).toContain("diverged in iteration 12, the 6th time");
    expect([report.backOffs, report.losses.total.length]).toEqual([6, 12]);
    expect(report.reason).toContain("the best parameters were kept");
    expect([...values]).toEqual([3, -2]);
    expect(report.bestIteration).toBe(0);
  });

  test("NaN in the loss or the gradient later on is divergence, at the start an error", () => {
    const { values, problem } = bowl();
    let calls = 0;
    const report = optimize(kernels, { ...problem, loss: () => ++calls > 3 ? NaN : problem.loss() });
    expect([report.diverged, calls]).toEqual([true, 9]);
    expect(values.every(Number.isFinite)).toBe(true);
    expect(() => optimize(kernels, { ...problem, loss: () => NaN })).toThrow(
      "Cannot optimize: the loss must be finite at the start, got NaN",
    );
    const gradients = Float32Array.of(NaN);
    expect(() =>
      optimize(kernels, {
        parameters: [{ name: "x", values: new Float32Array(1), gradients }],
        loss: () => (gradients[0] = NaN, 1),
      })
    ).toThrow("the gradient must be finite at the start");
  });

  test("validation decides what is best, the start included", () => {
    const { values, problem } = bowl();
    let looks = 0;
    const report = optimize(kernels, { ...problem, validate: () => looks++, validateEvery: 5 }, {
      maxIterations: 20,
      convergenceThreshold: 0,
    });
    expect(looks).toBe(5);
    expect([report.bestIteration, report.best, report.initial]).toEqual([0, 0, 0]);
    expect([...values]).toEqual([3, -2]);
    const better = optimize(kernels, { ...bowl().problem, validate: () => 10 - looks++, validateEvery: 8 }, {
      maxIterations: 20,
      convergenceThreshold: 0,
    });
    expect(better.bestIteration).toBe(20); // the last is looked at, too
  });

  /** A bowl whose steps take 10 and whose looks take 4 on a clock of its own. */
  function timed(maxMilliseconds: number, slower = 0) {
    const { values, problem } = bowl();
    let now = 100, step = 10;
    const plans: OptimizationPlan[] = [];
    const loss = () => (now += step, step += slower, problem.loss());
    const validate = () => (now += 4, problem.loss());
    const onPlan = (plan: OptimizationPlan) => plans.push(plan);
    const report = optimize(
      kernels,
      { parameters: problem.parameters, loss, validate, validateEvery: 10, clock: () => now, onPlan },
      { learningRate: 0.3, maxIterations: 100, convergenceThreshold: 0, maxMilliseconds },
    );
    return { values: [...values], report, plan: plans[0]!, plans: plans.length, milliseconds: now - 100 };
  }

  test("time that suffices changes nothing, and the plan is what it takes", () => {
    const { values, report, plan, plans, milliseconds } = timed(1044);
    expect(plans).toBe(1);
    expect(plan).toEqual({
      iterations: 100,
      validations: 11,
      stepMilliseconds: 10,
      validationMilliseconds: 4,
      milliseconds: 1044,
    });
    expect([report.iterations, report.outOfTime, milliseconds]).toEqual([100, false, 1044]);
    expect(values).toEqual(timed(Infinity).values);
  });

  test("time that does not suffice is planned for behind two steps; the step size falls to 0 within it", () => {
    for (const budget of [900, 300, 61, 40]) {
      const { report, plan, milliseconds } = timed(budget);
      expect(milliseconds).toBeLessThanOrEqual(budget);
      expect(milliseconds).toBeGreaterThan(budget - 15);
      expect([plan.iterations, plan.milliseconds]).toEqual([report.iterations, milliseconds]);
      expect([report.outOfTime, report.converged, report.diverged]).toEqual([true, false, false]);
      expect(report.reason).toBe(`the time allowed ${report.iterations} of 100 iterations`);
      expect(report.best).toBeLessThanOrEqual(report.initial);
    }
    expect(timed(900).report.best).toBeLessThan(0.01 * timed(900).report.initial);
  });

  test("steps that become slower than planned end in time, with the best so far", () => {
    const { values, report, plan, milliseconds } = timed(300, 2);
    expect(report.iterations).toBeLessThan(plan.iterations);
    expect(milliseconds).toBeLessThanOrEqual(300 + 4);
    expect(report.outOfTime).toBe(true);
    const { problem } = bowl(values);
    expect(problem.loss()).toBe(report.best);
  });

  test("one step that takes longer than all the time is the only one", () => {
    expect(timed(5).report).toMatchObject({ iterations: 1, outOfTime: true });
  });

  test("long gradients are shortened, all by the same factor", () => {
    const run = (clipNorm?: number) => {
      const { values, problem } = bowl();
      const report = optimize(kernels, problem, { maxIterations: 3, learningRate: 0.1, clipNorm });
      return { values: [...values], clipped: report.clipped, norm: report.gradientNorms[0]! };
    };
    expect(run().clipped).toBe(0);
    expect(run(1).clipped).toBe(3);
    expect(run(1).norm).toBeCloseTo(Math.hypot(4, 500), 3);
  });

  test("units: a step of 1 moves a value by its unit", () => {
    const { values, problem } = bowl([3, -2], { units: [0.01, 10] });
    optimize(kernels, problem, { learningRate: 0.1, maxIterations: 1 });
    expect([...values]).toEqual([3, -2]); // one loss was seen: the start is the best
    const moved = bowl([3, -2], { units: [0.01, 10] });
    const seen: number[][] = [];
    optimize(kernels, { ...moved.problem, onIteration: () => seen.push([...moved.values]) }, {
      learningRate: 0.1,
      maxIterations: 2,
      schedule: "constant",
    });
    expect(seen[1]![0]).toBeCloseTo(3 - 0.001, 5);
    expect(seen[1]![1]).toBeCloseTo(-2 + 1, 4);
  });

  test("bad options", () => {
    const { problem } = bowl();
    const bad: [object, string][] = [
      [{ learningRate: 0 }, "learningRate must be a number above 0, got 0"],
      [{ learningRate: NaN }, "learningRate"],
      [{ maxIterations: 0 }, "maxIterations must be a whole number from 1 to 100000"],
      [{ convergenceThreshold: 2 }, "convergenceThreshold must be in [0, 1]"],
      [{ clipNorm: 0 }, "clipNorm must be above 0"],
      [{ maxMilliseconds: 0 }, "maxMilliseconds must be above 0"],
      [{ schedule: "step" }, 'schedule must be "constant" or "cosine", got "step"'],
    ];
    for (const [options, message] of bad) {
      expect(() => optimize(kernels, problem, options)).toThrow(RangeError);
      expect(() => optimize(kernels, problem, options)).toThrow(message);
    }
    const parameters = [{ name: "x", values: new Float32Array(2), gradients: new Float32Array(1) }];
    expect(() => optimize(kernels, { ...problem, parameters })).toThrow('Cannot optimize "x"');
  });
});
