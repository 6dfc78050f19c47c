/* dispatch.h: the kernels of each instruction set. */
#ifndef AQ_DISPATCH_H
#define AQ_DISPATCH_H

#include "backward/kernels.h"
#include "forward/kernels.h"
#include "int8/kernels.h"
#include "product/kernels.h"
#include "quantize/kernels.h"
#include "solver/rows.h"
#include "solver/trellis.h"
#include "trellis/kernels.h"
#include "two_level/kernels.h"

typedef struct {
  int (*supported)(void); /* whether this processor has it; null: it is not in this build */
  const aq_quantize_kernels *quantize;
  aq_two_level_function *two_level;
  const aq_forward_kernels *forward;
  const aq_row_kernels *rows;
  const aq_trellis_kernels *trellis;
  const aq_product_kernels *product;
  const aq_int8_kernels *int8;
  const aq_backward_kernels *backward;
  aq_levels_function *levels[2]; /* of trellis codes of 2 and of 3 bits */
  const aq_trellis_tokens *tokens; /* on them; null: as `forward` and `int8` take them */
} aq_kernels;

/* The kernels of an AQ_ISA_*; null: not in this build or not on this processor. */
const aq_kernels *aq_choose_kernels(int32_t isa);

/* Declares `kernels`, those of `isa`, or leaves the function with AQ_E_ISA. */
#define AQ_KERNELS(isa)                               \
  const aq_kernels *kernels = aq_choose_kernels(isa); \
  if (!kernels) return AQ_E_ISA

#endif
