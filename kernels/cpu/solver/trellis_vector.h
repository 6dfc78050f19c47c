/* solver/trellis_vector.h: solver/trellis.h over vectors of AQ_W rows, included once by each unit of isa/
 * behind solver/vector.h; every lane repeats the oracle's operations in its order. */
#include "trellis.h"

/* Columns whose products with a chunk are made at once: few enough for their rows of a wide moment to
 * stream. */
#define AQ_TRELLIS_PART 16

AQ_INLINE vu v_load_bits(const float *p) {
  vu v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

AQ_INLINE void v_store_bits(float *p, vu v) { __builtin_memcpy(p, &v, sizeof v); }

AQ_INLINE vu v_select_bits(vi mask, vu yes, vu no) { return (vu)((mask & (vi)yes) | (~mask & (vi)no)); }

AQ_INLINE vu v_splat_bits(uint32_t x) { return (vu){0} + x; }

/* What a row of groups holds in the lanes of a chunk; lanes beyond `rows` repeat the last row. */
static void load_lines(const float *from, size_t rows, size_t groups, float *chunk) {
  for (size_t lane = 0; lane < AQ_ROWS; lane++)
    for (size_t g = 0; g < groups; g++) chunk[g * AQ_ROWS + lane] = from[aq_min_size(lane, rows - 1) * groups + g];
}

/* Search ------------------------------------------------------------------------------------------------- */

/* A survivor: its cost, the columns of a block with its errors passed on, and its codes in this block and in
 * the one before, in words. It lies where the code of the column k is digit k mod (codes of a window) of its
 * place, so that the survivors of a window take the places of those that they come from. */
#define AQ_SURVIVOR ((AQ_TRELLIS_BLOCK + 5) * AQ_W)
#define AQ_TARGET(survivor, k) ((survivor) + (1 + (k)) * AQ_W)
#define AQ_NOW(survivor, word) ((survivor) + (1 + AQ_TRELLIS_BLOCK + (word)) * AQ_W)
#define AQ_THEN(survivor, word) ((survivor) + (3 + AQ_TRELLIS_BLOCK + (word)) * AQ_W)

/* Terms of levels that are sums as in arithmetic/trellis.h: two permutations find a level faster than loads
 * of each lane. */
typedef struct {
  float first[16], second[16];
  int are_there;
} search_terms;

#if !defined(AQ_OWN_SIXTEEN)
AQ_INLINE vf v_sixteen(const float *numbers, vu at) { return v_lookup(numbers, at & 15); } /* no terms are there */
#define AQ_SIXTEEN 0
#else
#define AQ_SIXTEEN 1
#endif

static search_terms terms_of(int32_t bits, const float *table) {
  const uint32_t windows = (uint32_t)aq_trellis_windows(bits);
  search_terms terms = {.are_there = AQ_SIXTEEN};
  for (uint32_t w = 0; w < windows; w++)
    if (aq_trellis_first(w) == 0) terms.second[aq_trellis_second(w, bits)] = table[w];
  for (uint32_t w = 0; w < windows; w++)
    if (aq_trellis_second(w, bits) == 0) terms.first[aq_trellis_first(w)] = table[w] - terms.second[0];
  for (uint32_t w = 0; w < windows; w++)
    terms.are_there &= terms.first[aq_trellis_first(w)] + terms.second[aq_trellis_second(w, bits)] == table[w];
  return terms;
}

AQ_INLINE vf level_of(const int bits, const search_terms *terms, const float *table, vu window) {
  if (!terms->are_there) return v_lookup(table, window);
  const vu shifted = window >> 2;
  return v_sixteen(terms->first, shifted) +
         v_sixteen(terms->second, window ^ shifted ^ window >> (uint32_t)(bits + 2));
}

typedef struct {
  const aq_search_job *job;
  search_terms terms;
  const float *turned;      /* [codes of a window, windows]: levels by place, for each digit that was written last */
  float *weights, *target;  /* [cols, AQ_ROWS] */
  float *scale, *offset;    /* [groups, AQ_ROWS] */
  float *survivors[2];      /* for each vector of the chunk */
  float *errors;            /* [AQ_TRELLIS_BLOCK, AQ_ROWS], of columns that were just decided */
  uint8_t *codes;           /* [cols, AQ_ROWS] */
  vu older[2][2];           /* words of the block before the undecided ones */
} beam_chunk;

/* Codes of a word, and words of a block. */
#define AQ_WORD_CODES(bits) ((bits) == 2 ? 16 : 8)
#define AQ_WORDS(bits) ((bits) == 2 ? 1 : 2)

/* The window of column k of a block. */
AQ_INLINE vu window_in(const int bits, const vu *words, const vu *before, size_t k) {
  const size_t codes = AQ_WORD_CODES(bits), word = k / codes, at = k % codes * (size_t)bits;
  const vu own = words[word], front = word > 0 ? words[word - 1] : before[AQ_WORDS(bits) - 1];
  const uint32_t mask = (64u << bits) - 1;
  if (at >= AQ_TRELLIS_BEFORE) return own >> (uint32_t)(at - AQ_TRELLIS_BEFORE) & mask;
  const uint32_t back = (uint32_t)(AQ_TRELLIS_BEFORE - at);
  return (own << back | front >> ((uint32_t)(codes * (size_t)bits) - back)) & mask;
}

/* The place of a window when the digit of column `col` was written last. */
AQ_INLINE size_t place_of(const int bits, size_t window, size_t col) {
  const size_t digits = 1 + aq_trellis_reach(bits), turn = (size_t)bits * (digits - 1 - col % digits);
  const size_t all = (size_t)bits * digits, windows = (size_t)1 << all;
  return turn == 0 ? window : (window >> turn | window << (all - turn)) & (windows - 1);
}

/* The one of `choices` values that a tournament in pairs left. */
AQ_INLINE vu taken(const int choices, const vi *won, const vu *from) {
  vu left[8];
  for (int i = 0; i < choices; i++) left[i] = from[i];
#pragma GCC unroll 3
  for (int n = choices / 2; n > 0; won += n, n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) left[i] = v_select_bits(won[i], left[2 * i + 1], left[2 * i]);
  return left[0];
}

AQ_INLINE vf compete(const int choices, vf *cost, vi *won) {
#pragma GCC unroll 3
  for (int n = choices / 2; n > 0; won += n, n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      won[i] = cost[2 * i + 1] < cost[2 * i];
      cost[i] = v_select(won[i], cost[2 * i + 1], cost[2 * i]);
    }
  return cost[0];
}

/* Column k of the block that begins at `first`, of `part` columns. */
AQ_INLINE void search_column(const int bits, const beam_chunk *b, int v, size_t first, size_t k, size_t part) {
  const int choices = 1 << bits;
  const aq_search_job *job = b->job;
  const size_t windows = (size_t)64 << bits, col = first + k, digit = col % (1 + aq_trellis_reach(bits));
  const size_t step = (size_t)1 << ((size_t)bits * digit), lane = (size_t)v * AQ_W;
  const size_t g = col / job->group_size * AQ_ROWS + lane;
  const vf scale = v_load(b->scale + g), offset = v_load(b->offset + g), weight = v_load(b->weights + col * AQ_ROWS + lane);
  const vf pivot = v_splat(job->pivots[col]);
  const float *levels = b->turned + digit * windows;
  const aq_block_row factor = aq_row_of_blocks(job->factor, job->cols, job->block, col);
  for (size_t i = 0; i < windows >> bits; i++) {
    const size_t place = i / step * (step << bits) + i % step;
    float *survivor[8];
    vf cost[8], target[8], error[8];
    vi won[8][8];
    for (int x = 0; x < choices; x++) {
      survivor[x] = b->survivors[v] + (place + (size_t)x * step) * AQ_SURVIVOR;
      cost[x] = v_load(survivor[x]);
      target[x] = v_load(AQ_TARGET(survivor[x], k));
    }
#pragma GCC unroll 4
    for (int c = 0; c < choices; c++) {
      const vf value = v_exact_fma(scale, v_splat(levels[place + (size_t)c * step]), offset);
      vf tried[8];
#pragma GCC unroll 8
      for (int x = 0; x < choices; x++) {
        const vf left = target[x] - value;
        tried[x] = v_exact_fma(left * pivot, left, cost[x]);
      }
      v_store(survivor[c], compete(choices, tried, won[c]));
      error[c] = weight - value;
    }
    const size_t own = k / AQ_WORD_CODES(bits), shift = k % AQ_WORD_CODES(bits) * (size_t)bits;
    for (size_t word = 0; word < 2 * AQ_WORDS(bits); word++) {
      vu from[8];
      for (int x = 0; x < choices; x++)
        from[x] = v_load_bits(word & 1 ? AQ_THEN(survivor[x], word / 2) : AQ_NOW(survivor[x], word / 2));
      for (int c = 0; c < choices; c++) {
        const vu path = taken(choices, won[c], from);
        if (word & 1) v_store_bits(AQ_THEN(survivor[c], word / 2), path);
        else v_store_bits(AQ_NOW(survivor[c], word / 2), word / 2 == own ? path | (uint32_t)c << shift : path);
      }
    }
    for (size_t m = k + 1; m < part; m++) {
      const vf u = v_splat(factor.row[first + m]);
      vu from[8];
#pragma GCC unroll 8
      for (int x = 0; x < choices; x++) from[x] = v_load_bits(AQ_TARGET(survivor[x], m));
#pragma GCC unroll 8
      for (int c = 0; c < choices; c++)
        v_store(AQ_TARGET(survivor[c], m), v_exact_fma(error[c], u, (vf)taken(choices, won[c], from)));
    }
  }
}

/* The cheapest survivor of each lane, the first window of equals: its cost and its words. */
AQ_INLINE vf best_survivor(const int bits, const float *survivors, size_t last, vu now[2], vu then[2], vu *window) {
  vf least = v_splat(0.0f);
  *window = v_splat_bits(0);
  for (size_t n = 0; n < (size_t)64 << bits; n++) {
    const float *survivor = survivors + place_of(bits, n, last) * AQ_SURVIVOR;
    const vf cost = v_load(survivor);
    const vi better = n == 0 ? ~(vi){0} : cost < least;
    least = v_select(better, cost, least);
    *window = v_select_bits(better, v_splat_bits((uint32_t)n), *window);
    for (size_t word = 0; word < AQ_WORDS(bits); word++) {
      now[word] = v_select_bits(better, v_load_bits(AQ_NOW(survivor, word)), now[word]);
      then[word] = v_select_bits(better, v_load_bits(AQ_THEN(survivor, word)), then[word]);
    }
  }
  return least;
}

/* One survivor is left of all. */
AQ_INLINE void keep_one(const int bits, float *survivors, size_t col) {
  vu now[2] = {{0}}, then[2] = {{0}}, window;
  best_survivor(bits, survivors, col, now, then, &window);
  for (size_t n = 0; n < (size_t)64 << bits; n++) {
    float *cost = survivors + place_of(bits, n, col) * AQ_SURVIVOR;
    v_store(cost, v_select((vi)(window == v_splat_bits((uint32_t)n)), v_load(cost), v_splat(__builtin_inff())));
  }
}

/* Codes of the block at `first`, and their errors. */
AQ_INLINE void write_codes(const int bits, beam_chunk *b, int v, size_t first, size_t part, const vu *words) {
  const size_t lane = (size_t)v * AQ_W, g = first / b->job->group_size * AQ_ROWS + lane;
  const vf scale = v_load(b->scale + g), offset = v_load(b->offset + g);
  for (size_t k = 0; k < part; k++) {
    const vu window = window_in(bits, words, b->older[v], k);
    const vf value = v_exact_fma(scale, v_lookup(b->job->table, window), offset);
    v_narrow_bytes(b->codes + (first + k) * AQ_ROWS + lane, (vi)(window >> AQ_TRELLIS_BEFORE));
    v_store(b->errors + k * AQ_ROWS + lane, v_load(b->weights + (first + k) * AQ_ROWS + lane) - value);
  }
  for (size_t word = 0; word < AQ_WORDS(bits); word++) b->older[v][word] = words[word];
}

/* Behind the block at `first`: decides the one before it, or both behind the last. The best cost. */
AQ_INLINE vf decide(const int bits, beam_chunk *b, int v, size_t first, size_t part) {
  const int is_last = first + part == b->job->cols;
  vu now[2] = {{0}}, then[2] = {{0}}, window;
  const vf least = best_survivor(bits, b->survivors[v], first + part - 1, now, then, &window);
  if (first > 0) write_codes(bits, b, v, first - AQ_TRELLIS_BLOCK, AQ_TRELLIS_BLOCK, then);
  if (is_last) {
    write_codes(bits, b, v, first, part, now);
    return least;
  }
  for (size_t n = 0; n < (size_t)64 << bits; n++) {
    float *survivor = b->survivors[v] + n * AQ_SURVIVOR;
    vi shared = (vi)(v_load_bits(AQ_THEN(survivor, 0)) == then[0]);
    if (AQ_WORDS(bits) == 2) shared &= (vi)(v_load_bits(AQ_THEN(survivor, 1)) == then[1]);
    v_store(survivor, v_select(shared, v_load(survivor) - least, v_splat(__builtin_inff())));
  }
  return least;
}

/* The columns of the block at `next` as each survivor sees them, with its errors in the block before. */
AQ_INLINE void begin_block(const int bits, const beam_chunk *b, int v, size_t next, size_t part) {
  const aq_search_job *job = b->job;
  const size_t lane = (size_t)v * AQ_W;
  const int follows = next % job->block != 0;
  const size_t first = next - (next > 0 ? AQ_TRELLIS_BLOCK : 0), g = first / job->group_size * AQ_ROWS + lane;
  const vf scale = v_load(b->scale + g), offset = v_load(b->offset + g);
  const aq_block_row factor = aq_row_of_blocks(job->factor, job->cols, job->block, first);
  const size_t stride = factor.end - factor.begin;
  for (size_t n = 0; n < (size_t)64 << bits; n++) {
    float *survivor = b->survivors[v] + n * AQ_SURVIVOR;
    vu now[2] = {{0}}, then[2] = {{0}};
    for (size_t word = 0; word < AQ_WORDS(bits); word++) {
      now[word] = v_load_bits(AQ_NOW(survivor, word));
      then[word] = v_load_bits(AQ_THEN(survivor, word));
      v_store_bits(AQ_THEN(survivor, word), now[word]);
      v_store_bits(AQ_NOW(survivor, word), v_splat_bits(0));
    }
    vf error[AQ_TRELLIS_BLOCK];
    if (follows)
      for (size_t k = 0; k < AQ_TRELLIS_BLOCK; k++) {
        const vf level = level_of(bits, &b->terms, job->table, window_in(bits, now, then, k));
        error[k] = v_load(b->weights + (first + k) * AQ_ROWS + lane) - v_exact_fma(scale, level, offset);
      }
    for (size_t m = 0; m < part; m++) {
      vf target = v_load(b->target + (next + m) * AQ_ROWS + lane);
      const float *u = factor.row + next + m;
      if (follows)
#pragma GCC unroll 16
        for (size_t k = 0; k < AQ_TRELLIS_BLOCK; k++) target = v_exact_fma(error[k], v_splat(u[k * stride]), target);
      v_store(AQ_TARGET(survivor, m), target);
    }
  }
}

AQ_INLINE void search_chunk(const int bits, beam_chunk *b, double *objective, size_t rows) {
  const aq_search_job *job = b->job;
  const size_t n = job->cols, windows = (size_t)64 << bits;
  for (int v = 0; v < 2; v++)
    for (size_t i = 0; i < windows; i++) {
      float *survivor = __builtin_memset(b->survivors[v] + i * AQ_SURVIVOR, 0, AQ_SURVIVOR * sizeof(float));
      v_store(survivor, v_splat(i ? __builtin_inff() : 0.0f));
    }
  for (size_t first = 0; first < n && !aq_stopped(); first += AQ_TRELLIS_BLOCK) {
    const size_t part = aq_min_size(AQ_TRELLIS_BLOCK, n - first), end = first + part;
    for (int v = 0; v < 2; v++) {
      if ((size_t)v * AQ_W >= rows) continue;
      begin_block(bits, b, v, first, part);
      for (size_t k = 0; k < part; k++) {
        search_column(bits, b, v, first, k, part);
        if (job->survivors == 1) keep_one(bits, b->survivors[v], first + k);
      }
      const vf least = decide(bits, b, v, first, part);
      for (size_t lane = 0; lane < AQ_W && (size_t)v * AQ_W + lane < rows; lane++)
        objective[(size_t)v * AQ_W + lane] += (double)least[lane];
    }
    if (first == 0) continue;
    const aq_block_row factor = aq_row_of_blocks(job->factor, n, job->block, first - AQ_TRELLIS_BLOCK);
    if (end < factor.end)
      columns_products(0, factor.end - end, factor.row + end, factor.end - factor.begin, b->errors, AQ_TRELLIS_BLOCK,
                       b->target + end * AQ_ROWS);
  }
}

static void search(const aq_search_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols, groups = job->groups, windows = aq_trellis_windows(job->bits);
  float turned[3 * AQ_TRELLIS_MOST_WINDOWS], errors[AQ_TRELLIS_BLOCK * AQ_ROWS] = {0};
  for (size_t digit = 0; digit <= aq_trellis_reach(job->bits); digit++)
    for (size_t i = 0; i < windows; i++)
      turned[digit * windows + place_of(job->bits, i, digit)] = job->table[i];
  beam_chunk b = {.job = job, .terms = terms_of(job->bits, job->table), .turned = turned, .errors = errors,
                  .survivors = {work, work + windows * AQ_SURVIVOR}};
  b.weights = work + 2 * windows * AQ_SURVIVOR;
  b.target = b.weights + n * AQ_ROWS;
  b.scale = b.target + n * AQ_ROWS;
  b.offset = b.scale + groups * AQ_ROWS;
  b.codes = (uint8_t *)(b.offset + groups * AQ_ROWS);
  load_chunk(job->weights + row * n, n, rows, n, b.weights);
  __builtin_memcpy(b.target, b.weights, n * AQ_ROWS * sizeof(float));
  load_lines(job->scale + row * groups, rows, groups, b.scale);
  load_lines(job->offset + row * groups, rows, groups, b.offset);
  for (size_t i = 0; i < rows; i++) job->objective[row + i] = 0;
  if (job->bits == 2)
    search_chunk(2, &b, job->objective + row, rows);
  else
    search_chunk(3, &b, job->objective + row, rows);
  for (size_t i = 0; i < rows; i++)
    for (size_t k = 0; k < n; k++) job->codes[(row + i) * n + k] = b.codes[k * AQ_ROWS + i];
}

/* Scales, offsets and descent ---------------------------------------------------------------------------- */

typedef struct {
  float *weights, *gradient, *levels, *products; /* [cols, AQ_ROWS] */
  float *scale, *offset;                         /* [groups, AQ_ROWS] */
  uint8_t *codes;                                /* [cols, AQ_ROWS] */
} settle_chunk;

AQ_INLINE vu chunk_window(const aq_settle_job *job, const settle_chunk *s, size_t col, size_t lane) {
  vu window = {0};
  for (size_t i = 0; i <= aq_trellis_reach(job->bits); i++) {
    window <<= (uint32_t)job->bits;
    if (i <= col) window |= (vu)v_widen_bytes(s->codes + (col - i) * AQ_ROWS + lane);
  }
  return window;
}

AQ_INLINE vf window_value(const aq_settle_job *job, const settle_chunk *s, vu window, size_t col, size_t lane) {
  const size_t g = col / job->group_size * AQ_ROWS + lane;
  return v_exact_fma(v_load(s->scale + g), v_lookup(job->table, window), v_load(s->offset + g));
}

AQ_INLINE vf chunk_value(const aq_settle_job *job, const settle_chunk *s, size_t col, size_t lane) {
  return window_value(job, s, chunk_window(job, s, col, lane), col, lane);
}

/* out (+-)= columns [begin, end) of x times their rows of the moment, outside [skip, skip_end). */
static void chunk_products(const aq_settle_job *job, int subtract, const float *x, size_t begin, size_t end,
                           size_t skip, size_t skip_end, float *out) {
  for (size_t k = begin, part; k < end; k += part) {
    const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, k);
    const size_t stride = row.end - row.begin;
    part = aq_min_size(AQ_TRELLIS_PART, aq_min_size(end, row.end) - k);
    const float *own = x + (k - begin) * AQ_ROWS;
    const size_t left = skip < row.begin ? row.begin : aq_min_size(skip, row.end);
    const size_t right = skip_end < row.begin ? row.begin : aq_min_size(skip_end, row.end);
    if (left > row.begin)
      columns_products(subtract, left - row.begin, row.row + row.begin, stride, own, part, out + row.begin * AQ_ROWS);
    if (right < row.end)
      columns_products(subtract, row.end - right, row.row + right, stride, own, part, out + right * AQ_ROWS);
  }
}

static void chunk_objective(const aq_settle_job *job, const settle_chunk *s, double *objective) {
  for (size_t lane = 0; lane < AQ_ROWS; lane++) objective[lane] = 0;
  for (size_t first = 0; first < job->cols; first += AQ_PART)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
      vf sum = {0};
      for (size_t k = first; k < aq_min_size(first + AQ_PART, job->cols); k++) {
        const vf error = v_load(s->weights + k * AQ_ROWS + v) - chunk_value(job, s, k, v);
        sum = v_exact_fma(error, v_load(s->gradient + k * AQ_ROWS + v), sum);
      }
      for (size_t lane = 0; lane < AQ_W; lane++) objective[v + lane] += (double)sum[lane];
    }
}

/* New scales and offsets from the sums of a chunk, [4, AQ_ROWS]. */
static int chunk_lines(double ones, const double *sums, float *scale, float *offset) {
  int any = 0;
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    const double own[4] = {sums[lane], sums[AQ_ROWS + lane], sums[2 * AQ_ROWS + lane], sums[3 * AQ_ROWS + lane]};
    any |= aq_best_line(own, ones, scale + lane, offset + lane);
  }
  return any;
}

/* Adds what columns [first, end) mean for the sums; levels and products are of columns from `base` on. */
static void line_sums(const settle_chunk *s, const float *levels, const float *products, size_t base, size_t first,
                      size_t end, double *sums) {
  for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
    vf sum[4] = {{0}};
    for (size_t k = first; k < end; k++) {
      const size_t at = (k - base) * AQ_ROWS + v;
      const vf level = v_load(levels + at), product = v_load(products + at), p = v_load(s->gradient + k * AQ_ROWS + v);
      sum[0] = v_exact_fma(level, product, sum[0]);
      sum[1] += product;
      sum[2] = v_exact_fma(level, p, sum[2]);
      sum[3] += p;
    }
    for (size_t i = 0; i < 4; i++)
      for (size_t lane = 0; lane < AQ_W; lane++) sums[i * AQ_ROWS + v + lane] += (double)sum[i][lane];
  }
}

static void chunk_levels(const aq_settle_job *job, const settle_chunk *s, size_t first, size_t end, float *levels) {
  for (size_t k = first; k < end; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
      v_store(levels + (k - first) * AQ_ROWS + v, v_lookup(job->table, chunk_window(job, s, k, v)));
}

static void fit_rows(const aq_settle_job *job, settle_chunk *s) {
  const size_t n = job->cols;
  float step[AQ_ROWS], shift[AQ_ROWS];
  double sums[4 * AQ_ROWS] = {0};
  chunk_levels(job, s, 0, n, s->levels);
  __builtin_memset(s->products, 0, n * AQ_ROWS * sizeof(float));
  chunk_products(job, 0, s->levels, 0, n, 0, 0, s->products);
  for (size_t first = 0; first < n; first += AQ_PART)
    line_sums(s, s->levels, s->products, 0, first, aq_min_size(first + AQ_PART, n), sums);
  __builtin_memcpy(step, s->scale, sizeof step);
  __builtin_memcpy(shift, s->offset, sizeof shift);
  if (!chunk_lines(job->group_sums[0], sums, s->scale, s->offset)) return;
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    step[lane] -= s->scale[lane];
    shift[lane] -= s->offset[lane];
  }
  for (size_t k = 0; k < n; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
      float *p = s->gradient + k * AQ_ROWS + v;
      const vf along = v_exact_fma(v_load(step + v), v_load(s->products + k * AQ_ROWS + v), v_load(p));
      v_store(p, v_exact_fma(v_load(shift + v), v_splat(job->ones[k]), along));
    }
}

/* Scales and offsets of the group of columns [first, first + size); gradients of columns before `end`. */
static void fit_groups(const aq_settle_job *job, settle_chunk *s, size_t first, size_t size, size_t end,
                       const float *values) {
  const size_t g = first / job->group_size * AQ_ROWS;
  const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, first);
  const size_t stride = row.end - row.begin;
  double sums[4 * AQ_ROWS] = {0};
  chunk_levels(job, s, first, first + size, s->levels);
  __builtin_memset(s->products, 0, size * AQ_ROWS * sizeof(float));
  columns_products(0, size, row.row + first, stride, s->levels, size, s->products);
  line_sums(s, s->levels, s->products, first, first, first + size, sums);
  if (!chunk_lines(job->group_sums[first / job->group_size], sums, s->scale + g, s->offset + g)) return;
  for (size_t k = 0; k < size; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
      v_store(s->levels + k * AQ_ROWS + v,
              chunk_value(job, s, first + k, v) - v_load(values + k * AQ_ROWS + v));
  columns_products(1, aq_min_size(end, row.end) - first, row.row + first, stride, s->levels, size,
                   s->gradient + first * AQ_ROWS);
}

/* Codes of a column; gradients of columns [first, end). */
AQ_INLINE void descend_column(const int bits, const aq_settle_job *job, settle_chunk *s, size_t first, size_t col,
                              size_t end) {
  const size_t reach = aq_min_size(AQ_TRELLIS_BEFORE / (size_t)bits, job->cols - 1 - col);
  aq_block_row rows[4];
  float moments[4][4];
  vf steps[2][4] = {{{0}}};
  vi moved = {0};
  for (size_t i = 0; i <= reach; i++) {
    rows[i] = aq_row_of_blocks(job->moment, job->cols, job->block, col + i);
    for (size_t l = 0; l <= reach; l++) moments[i][l] = aq_element_of(&rows[i], col + l);
  }
  for (size_t v = 0; v < 2; v++) {
    uint8_t *codes = s->codes + col * AQ_ROWS + v * AQ_W;
    vu windows[4], chosen = (vu)v_widen_bytes(codes);
    vf values[4], gradients[4], least = {0};
    for (size_t i = 0; i <= reach; i++) {
      windows[i] = chunk_window(job, s, col + i, v * AQ_W);
      values[i] = window_value(job, s, windows[i], col + i, v * AQ_W);
      gradients[i] = -2.0f * v_load(s->gradient + (col + i) * AQ_ROWS + v * AQ_W);
    }
    for (uint32_t code = 0; code < 1u << bits; code++) {
      vf change = {0}, own[4] = {{0}};
      for (size_t i = 0; i <= reach; i++) {
        const uint32_t at = AQ_TRELLIS_BEFORE - (uint32_t)i * (uint32_t)bits, mask = ((1u << bits) - 1) << at;
        own[i] = window_value(job, s, (windows[i] & ~mask) | code << at, col + i, v * AQ_W) - values[i];
      }
      for (size_t i = 0; i <= reach; i++) {
        vf sum = gradients[i];
        for (size_t l = 0; l <= reach; l++) sum = v_exact_fma(v_splat(moments[i][l]), own[l], sum);
        change = v_exact_fma(own[i], sum, change);
      }
      const vi better = change < least;
      least = v_select(better, change, least);
      chosen = v_select_bits(better, v_splat_bits(code), chosen);
      for (size_t i = 0; i <= reach; i++) steps[v][i] = v_select(better, own[i], steps[v][i]);
      moved |= better;
    }
    v_narrow_bytes(codes, (vi)chosen);
  }
  int moves = 0;
  for (size_t lane = 0; lane < AQ_W; lane++) moves |= moved[lane];
  if (!moves) return;
  for (size_t i = 0; i <= reach; i++)
    for (size_t j = first > rows[i].begin ? first : rows[i].begin; j < aq_min_size(end, rows[i].end); j++) {
      const vf factor = v_splat(-rows[i].row[j]);
      float *p = s->gradient + j * AQ_ROWS;
      v_store(p, v_exact_fma(factor, steps[0][i], v_load(p)));
      v_store(p + AQ_W, v_exact_fma(factor, steps[1][i], v_load(p + AQ_W)));
    }
}

AQ_INLINE void descend_chunk(const int bits, const aq_settle_job *job, settle_chunk *s) {
  const size_t n = job->cols, most = job->groups > 1 && job->refit ? job->group_size : AQ_PART;
  float steps[(AQ_SEGMENT + 4) * AQ_ROWS];
  for (size_t first = 0; first < n && !aq_stopped(); first += most) {
    const size_t part = aq_min_size(most, n - first);
    const size_t end = aq_min_size(first + part + AQ_TRELLIS_BEFORE / (size_t)bits, n);
    for (size_t k = first; k < end; k++)
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
        v_store(steps + (k - first) * AQ_ROWS + v, chunk_value(job, s, k, v));
    if (job->groups > 1 && job->refit) fit_groups(job, s, first, part, end, steps);
    for (size_t k = first; k < first + part; k++) descend_column(bits, job, s, first, k, end);
    for (size_t k = first; k < end; k++)
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
        float *step = steps + (k - first) * AQ_ROWS + v;
        v_store(step, chunk_value(job, s, k, v) - v_load(step));
      }
    chunk_products(job, 1, steps, first, end, first, end, s->gradient);
  }
}

static void settle(const aq_settle_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols, groups = job->groups;
  settle_chunk s = {.weights = work, .gradient = work + n * AQ_ROWS, .levels = work + 2 * n * AQ_ROWS,
                    .products = work + 3 * n * AQ_ROWS, .scale = work + 4 * n * AQ_ROWS};
  double before[AQ_ROWS], after[AQ_ROWS];
  s.offset = s.scale + groups * AQ_ROWS;
  s.codes = (uint8_t *)(s.offset + groups * AQ_ROWS);
  load_chunk(job->weights + row * n, n, rows, n, s.weights);
  load_lines(job->scale + row * groups, rows, groups, s.scale);
  load_lines(job->offset + row * groups, rows, groups, s.offset);
  for (size_t lane = 0; lane < AQ_ROWS; lane++)
    for (size_t k = 0; k < n; k++)
      s.codes[k * AQ_ROWS + lane] = job->codes[(row + aq_min_size(lane, rows - 1)) * n + k];
  for (size_t k = 0; k < n; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
      v_store(s.levels + k * AQ_ROWS + v, v_load(s.weights + k * AQ_ROWS + v) - chunk_value(job, &s, k, v));
  __builtin_memset(s.gradient, 0, n * AQ_ROWS * sizeof(float));
  chunk_products(job, 0, s.levels, 0, n, 0, 0, s.gradient);
  chunk_objective(job, &s, before);
  __builtin_memcpy(job->objective + row, before, rows * sizeof *before);
  if (job->rounds == 0) return;
  for (int32_t round = 0; round < job->rounds && !aq_stopped(); round++) {
    if (job->refit && groups == 1) fit_rows(job, &s);
    if (job->bits == 2)
      descend_chunk(2, job, &s);
    else
      descend_chunk(3, job, &s);
  }
  chunk_objective(job, &s, after);
  for (size_t i = 0; i < rows; i++) {
    if (!(after[i] < before[i])) continue;
    job->objective[row + i] = after[i];
    for (size_t k = 0; k < n; k++) job->codes[(row + i) * n + k] = s.codes[k * AQ_ROWS + i];
    for (size_t g = 0; g < groups; g++) {
      job->scale[(row + i) * groups + g] = s.scale[g * AQ_ROWS + i];
      job->offset[(row + i) * groups + g] = s.offset[g * AQ_ROWS + i];
    }
  }
}

const aq_trellis_kernels AQ_NAMED(trellis) = {AQ_ROWS, search, settle};
